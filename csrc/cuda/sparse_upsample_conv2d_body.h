// What every thread of the up-sampling sparse convolution's forward kernel does. A block takes one window of the small
// image, staged in shared memory for all its warps, and a warp one output channel: weights are uniform in a warp, and
// the planes of its taps stay in registers, kStripRows pixels a lane, until they are up-sampled, shifted and added.
#pragma once

#include "host_device.h"
#include "image_load.h"
#include "sparse_upsample_conv2d.h"
#include "upsampling.h"

namespace sparse_gen::cuda {

constexpr int kMostWarps = 8;  // of a block
constexpr int kMostTaps = 11 * 11;
constexpr int kSharedBytes = 48 << 10;  // of pixels: three blocks fit into a multiprocessor of sm_90, with what else they need
constexpr int kUpRows = 2 * kStripRows;

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T first, second;
};

SPARSE_GEN_HD Pair<float> read_pair(const float* from) {
#ifdef __CUDA_ARCH__
  const float2 pair = __ldg(reinterpret_cast<const float2*>(from));
  return {pair.x, pair.y};
#else
  return {from[0], from[1]};
#endif
}
SPARSE_GEN_HD Pair<double> read_pair(const double* from) {
#ifdef __CUDA_ARCH__
  const double2 pair = __ldg(reinterpret_cast<const double2*>(from));
  return {pair.x, pair.y};
#else
  return {from[0], from[1]};
#endif
}

template <class T>
struct WeightAt {
  T value;
  int offset;  // of its input channel in the staged image
};

template <class T, bool Linear>
struct UpForward {
  static constexpr bool kLinear = Linear;
  static constexpr int kWeights = 256;  // of a channel, staged at once
  static constexpr int kPixels = kSharedBytes / sizeof(T);

  struct Shared {
    T image[kPixels];  // channels × rows × lanes
    WeightAt<T> weight[kMostWarps][kWeights];
    int begin[kMostWarps][kMostTaps + 1];
  };

  UpShape s;
  TapPattern pattern;
  SmallImage<T> x;
  const T *values, *bias;
  T* out;
  int warps;  // of a block

  struct State {
    Strips::Place place;
    int experiment, channel, warp, lane, first_top, last_top, kept;
    int offset;       // of the first staged channel
    long long begin;  // of the channel's weights
    T rows[kUpRows];  // up-sampled rows of the lane's own column
    T sum[kUpRows][2];
  };

  SPARSE_GEN_HD Strips strips() const { return {s.height, s.width, halo_of(s.padding, s.upsample)}; }
  SPARSE_GEN_HD int rows() const { return kStripRows + 2 * halo_of(s.padding, s.upsample); }
  SPARSE_GEN_HD int groups() const { return round_up_quotient(s.out_channels, warps); }
  SPARSE_GEN_HD long long blocks() const { return (long long)s.experiments * strips().windows() * groups(); }
  SPARSE_GEN_HD int chunks() const { return round_up_quotient(s.in_channels, kPixels / (rows() * kWarp)); }
  SPARSE_GEN_HD int a_chunk() const { return round_up_quotient(s.in_channels, chunks()); }
  SPARSE_GEN_HD int segments(const State& state) const { return round_up_quotient(state.kept, kWeights); }

  // Blocks of all channels on the same window follow one another: they read the same part of x.
  SPARSE_GEN_HD void begin(int block, int thread, State& state) const {
    const Strips all = strips();
    const int window = block / groups() % all.windows();
    state.experiment = block / groups() / all.windows();
    state.warp = thread / kWarp;
    state.lane = thread % kWarp;
    state.channel = block % groups() * warps + state.warp;
    state.place = all.place(window, state.lane);
    state.first_top = all.place(window, 0).top;
    state.last_top = all.place(window, kWarp - 1).top;
    const bool there = state.channel < s.out_channels;
    state.begin = there ? read(pattern.by_tap + (long long)state.channel * s.taps()) : 0;
    state.kept = there ? (int)(read(pattern.by_tap + (state.channel + 1LL) * s.taps()) - state.begin) : 0;
    const T start = there && bias ? read(bias + (long long)state.experiment * s.out_channels + state.channel) : T(0);
    SPARSE_GEN_UNROLL
    for (int j = 0; j < kUpRows; ++j) state.sum[j][0] = state.sum[j][1] = start;
  }

  // Rows and columns beyond the image are its border once more: the reading below needs no check.
  SPARSE_GEN_HD void stage_image(int chunk, State& state, Shared& shared) const {
    const int first = chunk * a_chunk(), left = s.in_channels - first, count = left < a_chunk() ? left : a_chunk();
    const int top = state.place.top - halo_of(s.padding, s.upsample);
    state.offset = first * rows() * kWarp;
    for (int channel = state.warp; channel < count; channel += warps) {
      const long long plane = (long long)state.experiment * s.in_channels + first + channel;
      const T* from = x.data + plane * s.plane() + state.place.column;
      T* to = shared.image + channel * rows() * kWarp + state.lane;
      const Load<T> load = x.load ? Load<T>::of(x.load + plane * 5) : Load<T>{};
      for (int row = 0; row < rows(); ++row) {
        const int y = top + row < 0 ? 0 : top + row < s.height ? top + row : s.height - 1;
        const T pixel = read(from + y * s.width);
        to[row * kWarp] = x.load ? load(pixel) : pixel;
      }
    }
  }

  SPARSE_GEN_HD void stage_weights(int segment, const State& state, Shared& shared) const {
    if (segment == 0 && state.channel < s.out_channels)
      for (int tap = state.lane; tap <= s.taps(); tap += kWarp)
        shared.begin[state.warp][tap] =
            (int)(read(pattern.by_tap + (long long)state.channel * s.taps() + tap) - state.begin);
    const int first = segment * kWeights, left = state.kept - first, count = left < kWeights ? left : kWeights;
    for (int n = state.lane; n < count; n += kWarp) {
      const long long k = read(pattern.tap_order + state.begin + first + n);
      shared.weight[state.warp][n] = {read(values + (long long)state.experiment * s.kept + k),
                                      read(pattern.taps + s.kept + k) * rows() * kWarp};
    }
  }

  // The kernel's column kx: every one of its taps' planes, up-sampled along the column and shifted, in state.rows.
  // False if there is nothing.
  SPARSE_GEN_HD bool add_rows(int kx, int segment, const Shared& shared, State& state) const {
    bool any = false;
    SPARSE_GEN_UNROLL
    for (int j = 0; j < kUpRows; ++j) state.rows[j] = 0;
    for (int ky = 0; ky < s.kernel; ++ky) {
      const Range range = weights_of(ky * s.kernel + kx, segment, shared, state);
      if (range.begin >= range.end) continue;
      any = true;
      const int shift = ky - s.padding;
      if (reflects(shift, state))
        add_anywhere(shift, range, shared, state);
      else if (shift & 1)
        add_tap<kStripRows + 1, true>(shift, range, shared, state);
      else
        add_tap<Linear ? kStripRows + 2 : kStripRows, false>(shift, range, shared, state);
    }
    return any;
  }

  // state.rows along the rows likewise, added to the output.
  template <class From>
  SPARSE_GEN_HD void add_columns(int kx, const From& from, State& state) const {
    const UpAxis<T> axis = UpAxis<T>::of(s.width, s.padding, s.mode, s.upsample);
    SPARSE_GEN_UNROLL
    for (int b = 0; b < 2; ++b) {
      const int shift = b + kx - s.padding;
      if (!Linear && (shift == 0 || shift == 1)) {  // the lane's own column
        SPARSE_GEN_UNROLL
        for (int j = 0; j < kUpRows; ++j) state.sum[j][b] += state.rows[j];
        continue;
      }
      const Sources<T> seen = axis.sources(2 * state.place.column + shift);
      const int near = lane_of(seen.near, state), second = lane_of(seen.second, state);
      SPARSE_GEN_UNROLL
      for (int j = 0; j < kUpRows; ++j) {
        state.sum[j][b] += seen.near_factor * from(state.rows[j], j, near);
        if (Linear) state.sum[j][b] += seen.second_factor * from(state.rows[j], j, second);
      }
    }
  }

  SPARSE_GEN_HD void finish(const State& state) const {
    if (!state.place.inside || state.channel >= s.out_channels) return;
    T* to = out + ((long long)state.experiment * s.out_channels + state.channel) * s.out_plane() + 2 * state.place.column;
    SPARSE_GEN_UNROLL
    for (int j = 0; j < kUpRows; ++j) {
      const int y = 2 * state.place.top + j;
      if (y < 2 * s.height) *reinterpret_cast<Pair<T>*>(to + y * 2 * s.width) = {state.sum[j][0], state.sum[j][1]};
    }
  }

 private:
  struct Range {
    int begin, end;
  };

  // A lane whose result nobody wants may ask for one that is not there.
  SPARSE_GEN_HD int lane_of(int column, const State& state) const {
    return (state.lane + column - state.place.column) & (kWarp - 1);
  }

  SPARSE_GEN_HD UpAxis<T> row_axis() const { return UpAxis<T>::of(s.height, s.padding, s.mode, s.upsample); }

  // Where a tap's weights lie that are staged and read the staged channels: they are in the channels' order.
  SPARSE_GEN_HD Range weights_of(int tap, int segment, const Shared& shared, const State& state) const {
    const int* begin = shared.begin[state.warp] + tap;
    const int first = segment * kWeights;
    Range range{begin[0] - first, begin[1] - first};
    range.begin = range.begin < 0 ? 0 : range.begin;
    range.end = range.end > kWeights ? kWeights : range.end;
    if (chunks() == 1 || range.begin >= range.end) return range;
    const int from = first_at(state.offset, range, shared, state);
    return {from, first_at(state.offset + a_chunk() * rows() * kWarp, {from, range.end}, shared, state)};
  }

  SPARSE_GEN_HD int first_at(int offset, Range range, const Shared& shared, const State& state) const {
    while (range.begin < range.end) {
      const int middle = (range.begin + range.end) / 2;
      if (shared.weight[state.warp][middle].offset < offset)
        range.begin = middle + 1;
      else
        range.end = middle;
    }
    return range.begin;
  }

  // Whether some row of the window is a reflected one which a row that stands for the border does not give.
  SPARSE_GEN_HD bool reflects(int shift, const State& state) const {
    if (s.mode != kReflect || (!Linear && shift >= -1 && shift <= 1)) return false;
    const int end = state.last_top + kStripRows < s.height ? state.last_top + kStripRows : s.height;
    return 2 * state.first_top + shift < 0 || 2 * end - 1 + shift >= 2 * s.height;
  }

  // Any rows of the staged ones, up to two for every up-sampled row.
  SPARSE_GEN_HD void add_anywhere(int shift, Range range, const Shared& shared, State& state) const {
    const UpAxis<T> axis = row_axis();
    const int halo = halo_of(s.padding, s.upsample);
    SPARSE_GEN_UNROLL
    for (int first = 0; first < kUpRows; first += kStripRows)
      for (int source = 0; source < (Linear ? 2 : 1); ++source) {
        int at[kStripRows];
        T factor[kStripRows], sum[kStripRows];
        SPARSE_GEN_UNROLL
        for (int j = 0; j < kStripRows; ++j) {
          const Sources<T> seen = axis.sources(2 * state.place.top + first + j + shift);
          const int row = (source ? seen.second : seen.near) - state.place.top + halo;
          // Those below the image are stored nowhere, and may be any.
          at[j] = (row < 0 ? 0 : row < rows() ? row : rows() - 1) * kWarp + state.lane - state.offset;
          factor[j] = source ? seen.second_factor : seen.near_factor;
          sum[j] = 0;
        }
        SPARSE_GEN_ROLLED
        for (int n = range.begin; n < range.end; ++n) {
          const WeightAt<T> weight = shared.weight[state.warp][n];
          SPARSE_GEN_UNROLL
          for (int j = 0; j < kStripRows; ++j) sum[j] += weight.value * shared.image[weight.offset + at[j]];
        }
        SPARSE_GEN_UNROLL
        for (int j = 0; j < kStripRows; ++j) state.rows[first + j] += factor[j] * sum[j];
      }
  }

  template <int Rows, bool Odd>
  SPARSE_GEN_HD void add_tap(int shift, Range range, const Shared& shared, State& state) const {
    const int first = halo_of(s.padding, s.upsample) + (shift >> 1) - (Linear && !Odd ? 1 : 0);
    const WeightAt<T>* weights = shared.weight[state.warp];
    const int at = first * kWarp + state.lane - state.offset;
    T sum[Rows] = {};
    for (int n = range.begin; n < range.end; ++n) {
      const WeightAt<T> weight = weights[n];
      const T* column = shared.image + weight.offset + at;
      SPARSE_GEN_UNROLL
      for (int j = 0; j < Rows; ++j) sum[j] += weight.value * column[j * kWarp];
    }
    const UpAxis<T> axis = row_axis();
    SPARSE_GEN_UNROLL
    for (int j = 0; j < kUpRows; ++j) {
      const int up = 2 * state.place.top + j + shift;
      const int near = Odd ? (j + 1) / 2 : j / 2 + (Linear ? 1 : 0);
      T value = sum[near];
      if (Linear) {
        const int second = Odd ? (j & 1 ? near - 1 : near + 1) : (j & 1 ? near + 1 : near - 1);
        value += axis.share(up) * (sum[second] - value);
      }
      if (s.mode != kZeros || (up >= 0 && up < 2 * s.height)) state.rows[j] += value;
    }
  }
};

}  // namespace sparse_gen::cuda
