// What a thread does for the gradient of the block-sparse convolution's kept weights. A block of threads takes one round
// of pieces, each sixteen columns by a group of output channels, and holds their sums in registers while it walks over its
// share of the image: a chunk of channels with its halo and a slab of the output's gradient come into shared memory once.
#pragma once

#include "block_sparse_conv2d_body.h"

namespace sparse_gen::cuda {

constexpr int kGradientPixels = 64;  // of a tile
// Here eight channels of four pixels in a row are to meet no bank twice, nor eight rows of the gradient.
constexpr int kGradientBanks = 4, kGradientRow = kGradientPixels + kGradientBanks;

inline HaloTile gradient_tile(const ConvShape& s) {
  return HaloTile::of(kGradientPixels, s.out_w(), s.stride, s.kernel_h, s.kernel_w);
}

// Into how many parts the image is split.
inline int gradient_splits(const ConvShape& s, const HaloRounds& lists) {
  const HaloTile tile = gradient_tile(s);
  const int tiles = tile.tiles_down(s.out_h()) * tile.tiles_across(s.out_w());
  const int wanted = lists.count ? kHaloBlocks / lists.count : 1;
  return wanted < 1 ? 1 : wanted < tiles ? wanted : tiles;
}

// How many warps may have the same pieces, with pixels of their own, when all warps hold the pieces of the largest round.
template <class Body>
int gradient_shares(const HaloRounds& lists) {
  int shares = kHaloWarps;
  while (shares > 1 && lists.most > kHaloWarps / shares * Body::kPieces) shares /= 2;
  return shares;
}

// What a thread reads of eight pixels.
template <class Product, int N>
struct GradientFragment {
  float columns[4], gradient[N][2];
};
template <int N>
struct GradientFragment<ThreadByThread, N> {
  const float* columns[4];
  const float* gradient[N];
};

template <class Product, int N>
struct HaloWeightGradient {
  using Fragment = GradientFragment<Product, N>;
  static constexpr int kWidth = 8 * N;
  // Of a warp at once: with one more some spill. sparse_gen/ops/block_halo.py fills rounds by it.
  static constexpr int kPieces = N == 1 ? 8 : 8 - N;

  ConvShape s;
  HaloRounds lists;
  HaloTile tile;
  int plane;  // from a channel to the next in the tile
  const float *x, *grad_out;
  const int* places;
  float* partial;  // (E, splits · shares, kept)
  int splits, shares;  // of the image; and of a tile's pixels, dealt to warps that have the same pieces

  struct State {
    int lane, team, share, experiment, split, slab, chunk, first, end;  // of the pieces
    // Where this lane's columns lie in the tile, two of 16 bits; thread by thread there are two more. And the group's
    // first row of the slab.
    unsigned columns[kPieces], more[kPieces];
    int row[kPieces];
    float sum[kPieces][4 * N];
  };

  SPARSE_GEN_HD int teams() const { return kHaloWarps / shares; }
  SPARSE_GEN_HD int tiles() const { return tile.tiles_down(s.out_h()) * tile.tiles_across(s.out_w()); }
  SPARSE_GEN_HD long long blocks() const { return (long long)s.experiments * splits * lists.count; }
  SPARSE_GEN_HD int first_tile(const State& state) const { return (int)((long long)state.split * tiles() / splits); }
  SPARSE_GEN_HD int end_tile(const State& state) const { return (int)((long long)(state.split + 1) * tiles() / splits); }
  SPARSE_GEN_HD int piece(int n, const State& state) const { return state.first + n * teams() + state.team; }
  SPARSE_GEN_HD int slab_rows() const { return lists.slab * kWidth; }
  // Words of the chunk's tile; behind them stand the gradient's slab and the channels that its rows are of.
  SPARSE_GEN_HD int image_size() const { return lists.chunk * plane; }
  SPARSE_GEN_HD int shared_bytes() const {
    return (image_size() + slab_rows() * kGradientRow) * (int)sizeof(float) + slab_rows() * (int)sizeof(int);
  }

  // The rounds of one part of the image follow one another.
  SPARSE_GEN_HD void begin(int block, int thread, State& state) const {
    state.lane = thread % kWarp;
    state.team = thread / kWarp % teams();
    state.share = thread / kWarp / teams();
    const int round = block % lists.count;
    state.split = block / lists.count % splits;
    state.experiment = block / lists.count / splits;
    state.slab = read(lists.rounds + round);
    state.chunk = read(lists.rounds + lists.count + round);
    state.first = read(lists.rounds + 2 * lists.count + round);
    state.end = state.first + read(lists.rounds + 3 * lists.count + round);
    SPARSE_GEN_UNROLL
    for (int n = 0; n < kPieces; ++n) {
      const bool there = piece(n, state) < state.end;
      const int* place = places + (there ? piece(n, state) * 16 : 0) + state.lane / (Product::kByWarp ? 4 : 8);
      state.columns[n] = there ? read(place) | read(place + (Product::kByWarp ? 8 : 4)) << 16 : 0;
      state.more[n] = there && !Product::kByWarp ? read(place + 8) | read(place + 12) << 16 : 0;
      state.row[n] = there ? read(lists.pieces + piece(n, state)) * kWidth : 0;
      for (int i = 0; i < 4 * N; ++i) state.sum[n][i] = 0;
    }
  }

  SPARSE_GEN_HD void name_channels(int thread, const State& state, float* shared) const {
    const Groups groups{kWidth, lists.block, s.out_channels};
    for (int row = thread; row < slab_rows(); row += kHaloThreads) {
      const int group = state.slab * lists.slab + row / kWidth, member = row % kWidth;
      const bool there = group < lists.groups && member < groups.count(group);
      channels_of(shared)[row] = there ? groups.first(group) + member : -1;
    }
  }

  SPARSE_GEN_HD void stage(int at, int thread, const State& state, float* shared) const {
    const int across = tile.tiles_across(s.out_w()), top = at / across * tile.rows, left = at % across * tile.columns();
    const int channels = s.in_channels - state.chunk * lists.chunk;
    const long long channel = (long long)state.experiment * s.in_channels + state.chunk * lists.chunk;
    const HaloImage image{x + channel * s.plane(), s.height, s.width, s.padding, s.mode};
    stage_halo<Product>(thread, tile, image, channels < lists.chunk ? channels : lists.chunk, top * s.stride - s.padding,
                        left * s.stride - s.padding, plane, shared);
    // Rows of the slab by warps, pixels across lanes.
    constexpr int kAhead = 4, kHalves = kGradientPixels / kWarp;
    const int* channel_of = channels_of(shared);
    const float* from = grad_out + (long long)state.experiment * s.out_channels * s.out_plane();
    float* gradient = shared + image_size();
    SPARSE_GEN_UNROLL
    for (int half = 0; half < kHalves; ++half) {
      const int pixel = half * kWarp + thread % kWarp;
      const int y = top + (pixel >> tile.columns_log), column = left + (pixel & (tile.columns() - 1));
      const bool there = y < s.out_h() && column < s.out_w();
      const int place = there ? y * s.out_w() + column : 0;
      for (int first = thread / kWarp; first < slab_rows(); first += kHaloWarps * kAhead) {
        float value[kAhead];
        SPARSE_GEN_UNROLL
        for (int n = 0; n < kAhead; ++n) {
          const int row = first + n * kHaloWarps, wanted = row < slab_rows() ? channel_of[row] : -1;
          value[n] = there && wanted >= 0 ? read(from + wanted * s.out_plane() + place) : 0.0f;
        }
        SPARSE_GEN_UNROLL
        for (int n = 0; n < kAhead; ++n) {
          const int row = first + n * kHaloWarps;
          if (row < slab_rows()) gradient[row * kGradientRow + pixel] = Product::rounded(value[n]);
        }
      }
    }
  }

  // Eight pixels from `first` on of a warp's n-th piece.
  SPARSE_GEN_HD void load(int n, int first, const State& state, const float* shared, Fragment& fragment) const {
    const float* pixels = shared + tile.base(first);
    const float* gradient = shared + image_size() + state.row[n] * kGradientRow + first;
    if constexpr (Product::kByWarp) {
      const int t = state.lane % 4;
      const float *near = pixels + (state.columns[n] & 0xffff) + t, *far = pixels + (state.columns[n] >> 16) + t;
      fragment.columns[0] = near[0];
      fragment.columns[1] = far[0];
      fragment.columns[2] = near[4];
      fragment.columns[3] = far[4];
      SPARSE_GEN_UNROLL
      for (int i = 0; i < N; ++i) {
        fragment.gradient[i][0] = gradient[(i * 8 + state.lane / 4) * kGradientRow + t];
        fragment.gradient[i][1] = gradient[(i * 8 + state.lane / 4) * kGradientRow + t + 4];
      }
    } else {
      SPARSE_GEN_UNROLL
      for (int i = 0; i < 4; ++i)
        fragment.columns[i] = pixels + ((i < 2 ? state.columns[n] : state.more[n]) >> i % 2 * 16 & 0xffff);
      SPARSE_GEN_UNROLL
      for (int i = 0; i < N; ++i) fragment.gradient[i] = gradient + (i * 8 + state.lane % 8) * kGradientRow;
    }
  }

  SPARSE_GEN_HD static void multiply(const GradientFragment<ThreadByThread, N>& fragment, float* sum) {
    SPARSE_GEN_ROLLED
    for (int pixel = 0; pixel < 8; ++pixel) {
      SPARSE_GEN_UNROLL
      for (int i = 0; i < 4; ++i) {
        SPARSE_GEN_UNROLL
        for (int n = 0; n < N; ++n) sum[i * N + n] += fragment.columns[i][pixel] * fragment.gradient[n][pixel];
      }
    }
  }

#ifdef __CUDACC__
  __device__ static void multiply(const GradientFragment<TensorCores, N>& fragment, float* sum) {
    SPARSE_GEN_UNROLL
    for (int n = 0; n < N; ++n) TensorCores::multiply(fragment.columns, fragment.gradient[n], sum + n * 4);
  }
#endif

  SPARSE_GEN_HD void finish(const State& state) const {
    float* to = partial + (((long long)state.experiment * splits + state.split) * shares + state.share) * s.kept;
    SPARSE_GEN_UNROLL
    for (int n = 0; n < kPieces; ++n) {
      if (piece(n, state) >= state.end) return;
      SPARSE_GEN_UNROLL
      for (int i = 0; i < 4 * N; ++i) {
        const int column = Product::kByWarp ? i / 2 % 2 * 8 + state.lane / 4 : i / N * 4 + state.lane / 8;
        const int member = Product::kByWarp ? i / 4 * 8 + state.lane % 4 * 2 + i % 2 : i % N * 8 + state.lane % 8;
        const int slot = read(lists.slots + ((long long)piece(n, state) * 16 + column) * kWidth + member);
        if (slot >= 0) to[slot] = state.sum[n][i];
      }
    }
  }

 private:
  SPARSE_GEN_HD int* channels_of(float* shared) const {
    return reinterpret_cast<int*>(shared + image_size() + slab_rows() * kGradientRow);
  }
};

}  // namespace sparse_gen::cuda
