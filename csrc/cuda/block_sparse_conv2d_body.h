// What a thread of the block-sparse convolution does, forward and for the input's gradient, which is the same operation on
// the output's gradient. A block of threads holds 256 pixels of up to 64 output channels in registers; the image comes
// chunk by chunk of channels into shared memory, with its halo, and every kept weight of the chunk reads it there.
#pragma once

#include "block_sparse_conv2d.h"
#include "halo.h"
#include "products.h"

namespace sparse_gen::cuda {

// Sums a thread holds, with which two blocks share a multiprocessor.
constexpr int kHaloSums = 64;
constexpr int kHaloPixels = kWarp * kHaloWarps;
// Words beyond a multiple of the banks between channels: four channels of eight pixels in a row meet no bank twice.
constexpr int kForwardBanks = 8;

// Output channels that share a list of columns.
struct Groups {
  int width, block, channels;
  SPARSE_GEN_HD int of_block() const { return round_up_quotient(block, width); }
  SPARSE_GEN_HD int first(int group) const { return group / of_block() * block + group % of_block() * width; }
  // How many there are: a block's last group and the last block may have fewer.
  SPARSE_GEN_HD int count(int group) const {
    const int at = first(group), end = (group / of_block() + 1) * block;
    const int left = (end < channels ? end : channels) - at;
    return left < width ? left : width;
  }
};

// One launch: a source whose windows are read, and a plane of outputs, in phases of it where weights differ.
struct HaloPass {
  HaloImage source;  // of the first experiment
  int experiments, inputs, outputs;
  int plane_h, plane_w;  // of the outputs
  int phase_step;        // 2 where rows and columns of either parity have weights of their own
  int offset;            // rows and columns of a padded plane that stand before this one and are not wanted
  int shift_h, shift_w;  // from a window's upper left corner to where the output's own position is, in the source
  HaloTile tile;

  SPARSE_GEN_HD int phases() const { return phase_step * phase_step; }
  SPARSE_GEN_HD int of_phase(int length, int phase) const { return (length - phase + phase_step - 1) / phase_step; }
  SPARSE_GEN_HD int tiles() const {
    return tile.tiles_down(of_phase(plane_h, 0)) * tile.tiles_across(of_phase(plane_w, 0));
  }
  SPARSE_GEN_HD int plane() const { return plane_h * plane_w; }
};

inline HaloPass forward_pass(const ConvShape& s, const float* x) {
  const HaloTile tile = HaloTile::of(kHaloPixels, s.out_w(), s.stride, s.kernel_h, s.kernel_w);
  return {{x, s.height, s.width, s.padding, s.mode}, s.experiments, s.in_channels, s.out_channels, s.out_h(), s.out_w(),
          1, 0, s.padding, s.padding, tile};
}

// Whether the gradient of the padded image is wanted as a whole, to be folded where the padding repeats a pixel.
SPARSE_GEN_HD bool folds(const ConvShape& s) { return s.mode != kZeros && s.padding > 0; }

inline HaloPass input_gradient_pass(const ConvShape& s, const float* grad_out) {
  const int border = folds(s) ? 2 * s.padding : 0, odd = s.odd();
  const int shift_h = (s.kernel_h - 1) >> odd, shift_w = (s.kernel_w - 1) >> odd;
  const int width = s.width + border;
  const HaloTile tile = HaloTile::of(kHaloPixels, s.halved(width), 1, shift_h + 1, shift_w + 1);
  return {{grad_out, s.out_h(), s.out_w(), 0, kZeros}, s.experiments, s.out_channels, s.in_channels, s.height + border,
          width, s.stride, folds(s) ? 0 : s.padding, shift_h, shift_w, tile};
}

// What keeps an H100's or H200's 132 multiprocessors busy, two blocks on each.
constexpr int kHaloBlocks = 264;

// Into how many parts the chunks of channels are split where the outputs are too few for that. Shapes of one experiment
// alone decide, so that it has the same bits alone and beside others.
inline int halo_splits(const HaloPass& pass, const HaloLists& lists) {
  const int sets = round_up_quotient(lists.groups, kHaloSums / lists.width);
  const int chunks = round_up_quotient(pass.inputs, lists.chunk);
  const int wanted = kHaloBlocks / (pass.phases() * pass.tiles() * sets);
  return wanted < 1 ? 1 : wanted < chunks ? wanted : chunks;
}

inline long long packed_size(const ConvShape& s, const HaloLists& lists) {
  return (long long)s.experiments * lists.columns * lists.width;
}

inline long long parts_size(const HaloPass& pass, int splits) {
  return (long long)pass.experiments * splits * pass.outputs * pass.plane();
}

// Where the columns lie in the tile.
struct PlaceBody {
  const int* codes;
  int columns, plane;
  HaloTile tile;
  int* places;

  SPARSE_GEN_HD long long count() const { return columns; }
  SPARSE_GEN_HD void run(long long i) const {
    const int code = read(codes + i);
    places[i] = (code >> 16) * plane + tile.place(code >> 8 & 255, code & 255);
  }
};

// Weights as the kernels read them, and where their columns lie.
template <class Product>
struct PackBody {
  HaloLists lists;
  PlaceBody place;
  int experiments, kept;
  const float* values;
  float* packed;

  SPARSE_GEN_HD long long count() const { return (long long)experiments * lists.columns * lists.width; }
  SPARSE_GEN_HD void run(long long i) const {
    const long long weights = (long long)lists.columns * lists.width;
    const int slot = read(lists.slots + i % weights);
    packed[i] = slot < 0 ? 0.0f : Product::rounded(read(values + i / weights * kept + slot));
    if (i < lists.columns) place.run(i);
  }
};

// What a thread reads of eight columns: on tensor cores 32 pixels of a warp are the rows of two products.
template <class Product, int N>
struct HaloFragment {
  float pixels[2][4], weights[N][2];
};
template <int N>
struct HaloFragment<ThreadByThread, N> {
  const float *pixel, *weights;
  const int* places;
};

// N is how often eight output channels make a group.
template <class Product, int N>
struct HaloConvolution {
  using Fragment = HaloFragment<Product, N>;
  static constexpr int kWidth = 8 * N, kGroups = kHaloSums / kWidth;

  HaloPass pass;
  HaloLists lists;
  int plane;  // from a channel to the next in the tile
  const float *packed, *bias;
  const int* places;
  float* out;  // (E, splits, outputs, plane)
  int splits;

  struct State {
    int lane, warp, experiment, split, phase, set;
    int top, left, rows, columns;  // the tile's first output of its phase, and how many outputs the phase has
    int bases[Product::kByWarp ? 4 : 1];
    const float* image;
    const float* weights;
    float sum[kGroups][kWidth];
  };

  SPARSE_GEN_HD int chunks() const { return round_up_quotient(pass.inputs, lists.chunk); }
  SPARSE_GEN_HD int sets() const { return round_up_quotient(lists.groups, kGroups); }
  SPARSE_GEN_HD long long blocks() const {
    return (long long)pass.experiments * splits * pass.phases() * pass.tiles() * sets();
  }
  SPARSE_GEN_HD int channels(int chunk) const {
    const int left = pass.inputs - chunk * lists.chunk;
    return left < lists.chunk ? left : lists.chunk;
  }
  SPARSE_GEN_HD int first_chunk(const State& state) const { return state.split * chunks() / splits; }
  SPARSE_GEN_HD int end_chunk(const State& state) const { return (state.split + 1) * chunks() / splits; }

  // The sets of channels on the same pixels follow one another: they read the same part of the image.
  SPARSE_GEN_HD void begin(int block, int thread, State& state) const {
    state.lane = thread % kWarp;
    state.warp = thread / kWarp;
    state.set = block % sets();
    const int tile = block / sets() % pass.tiles(), rest = block / sets() / pass.tiles();
    state.phase = rest % pass.phases();
    state.split = rest / pass.phases() % splits;
    state.experiment = rest / pass.phases() / splits;
    const int across = pass.tile.tiles_across(pass.of_phase(pass.plane_w, 0));
    state.top = tile / across * pass.tile.rows;
    state.left = tile % across * pass.tile.columns();
    state.rows = pass.of_phase(pass.plane_h, state.phase / pass.phase_step);
    state.columns = pass.of_phase(pass.plane_w, state.phase % pass.phase_step);
    state.image = pass.source.data + (long long)state.experiment * pass.inputs * pass.source.height * pass.source.width;
    state.weights = packed + (long long)state.experiment * lists.columns * kWidth;
    constexpr int kBases = sizeof state.bases / sizeof(int);
    for (int i = 0; i < kBases; ++i)
      state.bases[i] = pass.tile.base(state.warp * kWarp + (Product::kByWarp ? i * 8 + state.lane / 4 : state.lane));
    for (int g = 0; g < kGroups; ++g)
      for (int i = 0; i < kWidth; ++i) state.sum[g][i] = 0;
  }

  // The first step of a group of this block's set; that of the next group ends it.
  SPARSE_GEN_HD int start(int chunk, int group, const State& state) const {
    const int wanted = state.set * kGroups + group, last = wanted < lists.groups ? wanted : lists.groups;
    const int first_y = state.phase / pass.phase_step, first_x = state.phase % pass.phase_step;
    const int phase = (first_y + pass.offset) % pass.phase_step * pass.phase_step +
                      (first_x + pass.offset) % pass.phase_step;
    return read(lists.starts + (phase * chunks() + chunk) * lists.groups + last);
  }

  SPARSE_GEN_HD void stage(int chunk, int thread, const State& state, float* tile) const {
    const int row = (state.phase / pass.phase_step + pass.offset) / pass.phase_step - pass.shift_h;
    const int column = (state.phase % pass.phase_step + pass.offset) / pass.phase_step - pass.shift_w;
    HaloImage image = pass.source;
    image.data = state.image + (long long)chunk * lists.chunk * image.height * image.width;
    stage_halo<Product>(thread, pass.tile, image, channels(chunk), state.top * pass.tile.step + row,
                        state.left * pass.tile.step + column, plane, tile);
  }

  SPARSE_GEN_HD void load(int step, const State& state, const float* tile, Fragment& fragment) const {
    if constexpr (Product::kByWarp) {
      const int column = step * 8 + state.lane % 4;
      const float* near = tile + read(places + column);
      const float* far = tile + read(places + column + 4);
      SPARSE_GEN_UNROLL
      for (int i = 0; i < 2; ++i) {
        fragment.pixels[i][0] = near[state.bases[2 * i]];
        fragment.pixels[i][1] = near[state.bases[2 * i + 1]];
        fragment.pixels[i][2] = far[state.bases[2 * i]];
        fragment.pixels[i][3] = far[state.bases[2 * i + 1]];
      }
      const float* weights = state.weights + (long long)column * kWidth + state.lane / 4;
      SPARSE_GEN_UNROLL
      for (int n = 0; n < N; ++n) {
        fragment.weights[n][0] = read(weights + n * 8);
        fragment.weights[n][1] = read(weights + n * 8 + 4 * kWidth);
      }
    } else {
      fragment = {tile + state.bases[0], state.weights + (long long)step * 8 * kWidth, places + step * 8};
    }
  }

  SPARSE_GEN_HD static void multiply(const HaloFragment<ThreadByThread, N>& fragment, float* sum) {
    SPARSE_GEN_ROLLED
    for (int k = 0; k < 8; ++k) {
      const float pixel = fragment.pixel[read(fragment.places + k)];
      SPARSE_GEN_UNROLL
      for (int i = 0; i < kWidth; i += 4) {
        float weights[4];
        read_four(fragment.weights + k * kWidth + i, weights);
        SPARSE_GEN_UNROLL
        for (int n = 0; n < 4; ++n) sum[i + n] += pixel * weights[n];
      }
    }
  }

#ifdef __CUDACC__
  __device__ static void multiply(const HaloFragment<TensorCores, N>& fragment, float* sum) {
    SPARSE_GEN_UNROLL
    for (int i = 0; i < 2; ++i) {
      SPARSE_GEN_UNROLL
      for (int n = 0; n < N; ++n) TensorCores::multiply(fragment.pixels[i], fragment.weights[n], sum + (i * N + n) * 4);
    }
  }
#endif

  SPARSE_GEN_HD void finish(const State& state) const {
    const Groups groups{kWidth, lists.block, pass.outputs};
    const long long image = ((long long)state.experiment * splits + state.split) * pass.outputs;
    SPARSE_GEN_UNROLL
    for (int g = 0; g < kGroups; ++g) {
      const int group = state.set * kGroups + g;
      if (group >= lists.groups) return;
      const int first = groups.first(group), count = groups.count(group);
      SPARSE_GEN_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const int member = member_of(i, state), pixel = pixel_of(i, state);
        const int row = state.top + (pixel >> pass.tile.columns_log);
        const int column = state.left + (pixel & (pass.tile.columns() - 1));
        if (member >= count || row >= state.rows || column >= state.columns) continue;
        const int y = state.phase / pass.phase_step + row * pass.phase_step;
        const int x = state.phase % pass.phase_step + column * pass.phase_step;
        const float start = bias && state.split == 0 ? read(bias + (long long)state.experiment * pass.outputs + first + member)
                                                 : 0.0f;
        out[(image + first + member) * pass.plane() + y * pass.plane_w + x] = state.sum[g][i] + start;
      }
    }
  }

 private:
  SPARSE_GEN_HD static int member_of(int i, const State& state) {
    return Product::kByWarp ? i / 4 % N * 8 + state.lane % 4 * 2 + i % 2 : i;
  }
  SPARSE_GEN_HD static int pixel_of(int i, const State& state) {
    const int lane = Product::kByWarp ? i / (4 * N) * 16 + i / 2 % 2 * 8 + state.lane / 4 : state.lane;
    return state.warp * kWarp + lane;
  }
};

// The image's gradient from that of its padded plane, whose partial sums are added on the way.
struct FoldPadding {
  ConvShape s;
  const float* plane;  // (E, splits, in, height + 2 · padding, width + 2 · padding)
  int splits;
  float* grad_x;

  SPARSE_GEN_HD long long count() const { return (long long)s.experiments * s.in_channels * s.plane(); }
  SPARSE_GEN_HD void run(long long i) const {
    const int y = (int)(i % s.plane()) / s.width, x = (int)(i % s.plane()) % s.width;
    const long long channel = i / s.plane();
    const int width = s.width + 2 * s.padding;
    const long long size = (long long)(s.height + 2 * s.padding) * width, part = size * s.in_channels;
    const float* from = plane + channel / s.in_channels * splits * part + channel % s.in_channels * size;
    const int rows = padded_count(y, s.height, s.padding, s.mode), columns = padded_count(x, s.width, s.padding, s.mode);
    float sum = 0;
    for (int split = 0; split < splits; ++split)
      for (int m = 0; m < rows; ++m) {
        const int row = padded_position(m, y, s.height, s.padding, s.mode) + s.padding;
        for (int n = 0; n < columns; ++n)
          sum += read(from + split * part + (long long)row * width +
                      padded_position(n, x, s.width, s.padding, s.mode) + s.padding);
      }
    grad_x[i] = sum;
  }
};

}  // namespace sparse_gen::cuda
