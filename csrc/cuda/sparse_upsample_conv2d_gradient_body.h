// What every thread of the up-sampling sparse convolution's backward kernel does. A block takes one window of the small
// image. Its warps together put the output's gradient, added up in the tap planes, into shared memory; then each
// multiplies for `Channels` input channels of its own, which stay in registers: a plane's pixel is read once for the
// image's and the weight's gradient.
#pragma once

#include "sparse_upsample_conv2d_body.h"

namespace sparse_gen::cuda {

constexpr int kGradientChannels = 4;  // of a warp, where there are blocks enough

template <class T>
struct alignas(16) GradientWeight {
  T value;
  int offset;  // of its tap plane among the staged ones, or -1
  int place;   // among the values
};

template <class T, bool Linear, int Channels>
struct UpBackward {
  static constexpr int kChannels = Channels;
  static constexpr int kPlanePixels = kStripRows * kWarp;
  static constexpr int kPlanes = kSharedBytes / (int)sizeof(T) / kPlanePixels;
  static constexpr int kBatch = 32, kAtOnce = 4;  // weights staged, and summed over a warp, at once

  struct Shared {
    T plane[kPlanes * kPlanePixels];  // planes × rows × lanes
    GradientWeight<T> weight[kMostWarps][kBatch];
  };

  UpShape s;
  TapPattern pattern;
  const T* grad_out;
  SmallImage<T> x;
  const T* values;
  T *grad_x, *partial;  // partial (E, windows, kept); either may be null
  int warps;            // of a block

  struct State {
    Strips::Place place;
    int experiment, window, channel, warp, lane, first_top, last_top, first_column;
    int at[Channels], end[Channels];  // each channel's next weight
    T x[Channels][kStripRows], sum[Channels][kStripRows];
    T share[Linear ? kUpRows : 1];  // of the strip's up-sampled rows' second sources
    T half[kStripRows][2];          // one tap row's planes before the kernel's columns are told apart
    T dot[kAtOnce];
  };

  SPARSE_GEN_HD Strips strips() const { return {s.height, s.width, halo_of(s.padding, s.upsample)}; }
  SPARSE_GEN_HD int groups() const { return round_up_quotient(s.in_channels, warps * Channels); }
  SPARSE_GEN_HD long long blocks() const { return (long long)s.experiments * strips().windows() * groups(); }
  // A unit is the planes of one output channel's taps of one kernel row.
  SPARSE_GEN_HD int units() const { return s.out_channels * s.kernel; }
  SPARSE_GEN_HD int a_chunk() const { return kPlanes / s.kernel; }
  SPARSE_GEN_HD int chunks() const { return round_up_quotient(units(), a_chunk()); }
  SPARSE_GEN_HD int units_of(int chunk) const {
    const int left = units() - chunk * a_chunk();
    return left < a_chunk() ? left : a_chunk();
  }

  SPARSE_GEN_HD void begin(int block, int thread, State& state) const {
    const Strips all = strips();
    state.window = block / groups() % all.windows();
    state.experiment = block / groups() / all.windows();
    state.warp = thread / kWarp;
    state.lane = thread % kWarp;
    state.channel = (block % groups() * warps + state.warp) * Channels;
    state.place = all.place(state.window, state.lane);
    state.first_top = all.place(state.window, 0).top;
    state.last_top = all.place(state.window, kWarp - 1).top;
    state.first_column = all.place(state.window, 0).column;
    SPARSE_GEN_UNROLL
    for (int c = 0; c < Channels; ++c) {
      const int channel = state.channel + c;
      const bool there = channel < s.in_channels;
      state.at[c] = there ? (int)read(pattern.by_input + channel) : 0;
      state.end[c] = there ? (int)read(pattern.by_input + channel + 1) : 0;
      const long long plane = (long long)state.experiment * s.in_channels + channel;
      const Load<T> load = there && x.load ? Load<T>::of(x.load + plane * 5) : Load<T>{};
      SPARSE_GEN_UNROLL
      for (int r = 0; r < kStripRows; ++r) {
        state.sum[c][r] = state.x[c][r] = 0;
        if (!partial || !there || !state.place.inside || state.place.top + r >= s.height) continue;
        const T pixel = read(x.data + plane * s.plane() + (state.place.top + r) * s.width + state.place.column);
        state.x[c][r] = x.load ? load(pixel) : pixel;
      }
    }
    if (!Linear) return;
    const UpAxis<T> axis = axis_of(s.height);
    SPARSE_GEN_UNROLL
    for (int j = 0; j < kUpRows; ++j) state.share[Linear ? j : 0] = axis.share(2 * state.place.top + j);
  }

  // The rows of grad_out that a small row sees through kernel row ky, in the two columns above each lane's own.
  SPARSE_GEN_HD void add_rows(int unit, State& state) const {
    const int channel = unit / s.kernel, shift = unit % s.kernel - s.padding, top = 2 * state.place.top;
    const T* from = grad_out + ((long long)state.experiment * s.out_channels + channel) * s.out_plane() +
                    2 * state.place.column;
    SPARSE_GEN_UNROLL
    for (int r = 0; r < kStripRows; ++r) state.half[r][0] = state.half[r][1] = 0;
    SPARSE_GEN_UNROLL
    for (int j = Linear ? -1 : 0; j < kUpRows + (Linear ? 1 : 0); ++j) {
      const int up = top + j;
      if (up < 0 || up >= 2 * s.height) continue;
      const Pair<T> pair = row_of(from, up - shift);
      const int near = j >> 1, second = near + (j & 1 ? 1 : -1);
      if (!Linear) {
        add(near, T(1), pair, state);
        continue;
      }
      const T share = j >= 0 && j < kUpRows ? state.share[Linear ? j : 0] : axis_of(s.height).share(up);
      const int other = state.place.top + second;
      // At the ends the second source is the first.
      const bool alone = other < 0 || other >= s.height;
      if (near >= 0 && near < kStripRows) add(near, alone ? T(1) : T(1) - share, pair, state);
      if (second >= 0 && second < kStripRows && !alone) add(second, share, pair, state);
    }
    // What stands in the padding.
    if (s.mode == kZeros || shift == 0) return;
    const int reach = s.padding / 2 + 1;
    if (shift < 0 ? state.first_top > reach : state.last_top + kStripRows + reach < s.height) return;
    const UpAxis<T> axis = axis_of(s.height);
    const int first = shift < 0 ? 0 : 2 * s.height - shift, last = shift < 0 ? -shift : 2 * s.height;
    for (int y = first < 0 ? 0 : first; y < last && y < 2 * s.height; ++y) {
      const Sources<T> seen = axis.sources(y + shift);
      const Pair<T> pair = row_of(from, y);
      SPARSE_GEN_UNROLL
      for (int r = 0; r < kStripRows; ++r) add(r, seen.factor_of(state.place.top + r), pair, state);
    }
  }

  // The planes of the taps in column kx of a unit, the n-th staged.
  template <class From>
  SPARSE_GEN_HD void add_columns(int n, int kx, const From& from, const State& state, Shared& shared) const {
    const UpAxis<T> axis = axis_of(s.width);
    const int shift = kx - s.padding, column = state.place.column;
    T sum[kStripRows] = {};
    SPARSE_GEN_UNROLL
    for (int j = Linear ? -1 : 0; j < (Linear ? 3 : 2); ++j) {
      const int up = 2 * column + j, at = j - shift, apart = at >> 1;
      const T factor = up < 0 || up >= 2 * s.width || !in_row(2 * column + at) ? T(0) : axis.sources(up).factor_of(column);
      add_column(at & 1, (state.lane + apart) & (kWarp - 1), apart == 0, factor, from, state, sum);
    }
    if (s.mode != kZeros && shift != 0 && (shift < 0 ? sees_left(state) : sees_right(state))) {
      const int first = shift < 0 ? 0 : 2 * s.width - shift, last = shift < 0 ? -shift : 2 * s.width;
      for (int at = first < 0 ? 0 : first; at < last && at < 2 * s.width; ++at) {
        // From far away there is nothing to see, and the lane asked is any.
        const int lane = (state.lane + at / 2 - column) & (kWarp - 1);
        add_column(at & 1, lane, false, axis.sources(at + shift).factor_of(column), from, state, sum);
      }
    }
    T* to = shared.plane + (n * s.kernel + kx) * kPlanePixels + state.lane;
    SPARSE_GEN_UNROLL
    for (int r = 0; r < kStripRows; ++r) to[r * kWarp] = sum[r];
  }

  // The next weights of a channel, which are in the planes' order; -1 behind those that see a staged plane.
  SPARSE_GEN_HD void stage_weights(int chunk, int at, int end, const State& state, Shared& shared) const {
    const int first = chunk * a_chunk() * s.kernel, planes = units_of(chunk) * s.kernel;
    GradientWeight<T> weight{T(0), -1, 0};
    if (at + state.lane < end) {
      const long long k = read(pattern.input_order + at + state.lane);
      const int channel = read(pattern.taps + k), ky = read(pattern.taps + 2LL * s.kept + k);
      const int plane = (channel * s.kernel + ky) * s.kernel + read(pattern.taps + 3LL * s.kept + k) - first;
      if (plane < planes)
        weight = {read(values + (long long)state.experiment * s.kept + k), plane * kPlanePixels, (int)k};
    }
    shared.weight[state.warp][state.lane] = weight;
  }

  // kAtOnce weights of channel c; how many there are.
  SPARSE_GEN_HD int multiply(int c, int first, const Shared& shared, State& state) const {
    int count = 0;
    SPARSE_GEN_UNROLL
    for (int n = 0; n < kAtOnce; ++n) {
      const GradientWeight<T> weight = shared.weight[state.warp][first + n];
      count += weight.offset >= 0;
      const T* plane = shared.plane + (weight.offset >= 0 ? weight.offset : 0) + state.lane;
      T dot = 0;
      SPARSE_GEN_UNROLL
      for (int r = 0; r < kStripRows; ++r) {
        const T gradient = plane[r * kWarp];
        state.sum[c][r] += weight.value * gradient;
        dot += state.x[c][r] * gradient;
      }
      state.dot[n] = dot;
    }
    return count;
  }

  // One weight's sum over the window.
  SPARSE_GEN_HD void store_dot(int n, T sum, const Shared& shared, const State& state) const {
    const GradientWeight<T> weight = shared.weight[state.warp][n];
    if (weight.offset >= 0)
      partial[((long long)state.experiment * strips().windows() + state.window) * s.kept + weight.place] = sum;
  }

  SPARSE_GEN_HD void finish(const State& state) const {
    if (!grad_x || !state.place.inside) return;
    SPARSE_GEN_UNROLL
    for (int c = 0; c < Channels; ++c) {
      if (state.channel + c >= s.in_channels) return;
      T* to = grad_x + ((long long)state.experiment * s.in_channels + state.channel + c) * s.plane() + state.place.column;
      SPARSE_GEN_UNROLL
      for (int r = 0; r < kStripRows; ++r)
        if (state.place.top + r < s.height) to[(state.place.top + r) * s.width] = state.sum[c][r];
    }
  }

 private:
  SPARSE_GEN_HD UpAxis<T> axis_of(int length) const { return UpAxis<T>::of(length, s.padding, s.mode, s.upsample); }
  SPARSE_GEN_HD bool in_row(int at) const { return at >= 0 && at < 2 * s.width; }

  SPARSE_GEN_HD Pair<T> row_of(const T* from, int y) const {
    if (y < 0 || y >= 2 * s.height) return {T(0), T(0)};
    const T* row = from + y * 2 * s.width;
    return read_pair(row);
  }

  SPARSE_GEN_HD void add(int r, T factor, const Pair<T>& pair, State& state) const {
    state.half[r][0] += factor * pair.first;
    state.half[r][1] += factor * pair.second;
  }

  // Whether a lane of the window is near enough to the image's side for what stands beyond it.
  SPARSE_GEN_HD bool sees_left(const State& state) const {
    return state.first_column <= s.padding / 2 + 1 || state.first_column + kWarp > s.width;
  }
  SPARSE_GEN_HD bool sees_right(const State& state) const {
    return state.first_column + kWarp + s.padding / 2 + 1 >= s.width;
  }

  template <class From>
  SPARSE_GEN_HD void add_column(int b, int lane, bool own, T factor, const From& from, const State& state,
                                T (&sum)[kStripRows]) const {
    SPARSE_GEN_UNROLL
    for (int r = 0; r < kStripRows; ++r) {
      const T mine = b ? state.half[r][1] : state.half[r][0];
      sum[r] += factor * (own ? mine : from(mine, 2 * r + b, lane));
    }
  }
};

// The sums over a warp's lanes of kAtOnce = 4 numbers a lane, in six exchanges: which of them a lane then holds.
SPARSE_GEN_HD int summed_by(int lane) { return (lane & 16 ? 2 : 0) + (lane & 8 ? 1 : 0); }

}  // namespace sparse_gen::cuda
