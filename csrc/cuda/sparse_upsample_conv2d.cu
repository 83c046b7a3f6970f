#include "sparse_upsample_conv2d.h"

#include "add_chunks.h"
#include "launch.h"
#include "sparse_upsample_conv2d_gradient_body.h"

namespace sparse_gen::cuda {

namespace {

// For the compiler: 80 registers a thread for the commonest kernel, 128 for its like, and as many as it wants in double,
// with which nothing spills on sm_80 to sm_90.
template <class T, bool Linear>
constexpr int kUpBlocksAtOnce = sizeof(T) == 8 ? 1 : Linear ? 2 : 3;
template <class T>
constexpr int kUpGradientBlocksAtOnce = sizeof(T) == 8 ? 1 : 2;
// Fewer blocks than this leave multiprocessors idle: then fewer channels a block.
constexpr long long kEnoughBlocks = 256;

template <class T>
struct FromLane {
  __device__ T operator()(T own, int, int lane) const { return __shfl_sync(0xffffffffu, own, lane); }
};

template <class T, class Body>
__global__ void __launch_bounds__(kMostWarps* kWarp, kUpBlocksAtOnce<T, Body::kLinear>) up_forward(const Body body) {
  extern __shared__ __align__(16) unsigned char memory[];
  typename Body::Shared& shared = *reinterpret_cast<typename Body::Shared*>(memory);
  typename Body::State state;
  body.begin(blockIdx.x, threadIdx.x, state);
  const int chunks = body.chunks(), segments = body.segments(state);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    __syncthreads();
    body.stage_image(chunk, state, shared);
    __syncthreads();
    for (int segment = 0; segment < segments; ++segment) {
      if (chunk == 0 || segments > 1) {
        __syncwarp();
        body.stage_weights(segment, state, shared);
        __syncwarp();
      }
      for (int kx = 0; kx < body.s.kernel; ++kx)
        if (body.add_rows(kx, segment, shared, state)) {
          __syncwarp();
          body.add_columns(kx, FromLane<T>(), state);
        }
    }
  }
  body.finish(state);
}

template <class T>
__device__ T sum_over_warp(const T (&dot)[4], int lane) {
  const bool high = lane & 16, upper = lane & 8;
  T first = high ? dot[2] : dot[0], second = high ? dot[3] : dot[1];
  first += __shfl_xor_sync(0xffffffffu, high ? dot[0] : dot[2], 16);
  second += __shfl_xor_sync(0xffffffffu, high ? dot[1] : dot[3], 16);
  T sum = upper ? second : first;
  sum += __shfl_xor_sync(0xffffffffu, upper ? first : second, 8);
  for (int apart = 4; apart; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
  return sum;
}

template <class T, class Body>
__global__ void __launch_bounds__(kMostWarps* kWarp, kUpGradientBlocksAtOnce<T>) up_backward(const Body body) {
  extern __shared__ __align__(16) unsigned char memory[];
  typename Body::Shared& shared = *reinterpret_cast<typename Body::Shared*>(memory);
  typename Body::State state;
  body.begin(blockIdx.x, threadIdx.x, state);
  const int chunks = body.chunks();
  for (int chunk = 0; chunk < chunks; ++chunk) {
    __syncthreads();
    for (int n = state.warp; n < body.units_of(chunk); n += body.warps) {
      body.add_rows(chunk * body.a_chunk() + n, state);
      __syncwarp();
      for (int kx = 0; kx < body.s.kernel; ++kx) body.add_columns(n, kx, FromLane<T>(), state, shared);
    }
    __syncthreads();
    SPARSE_GEN_UNROLL
    for (int c = 0; c < Body::kChannels; ++c) {
      for (bool more = state.at[c] < state.end[c]; more;) {
        __syncwarp();
        body.stage_weights(chunk, state.at[c], state.end[c], state, shared);
        __syncwarp();
        for (int n = 0; n < Body::kBatch && more; n += Body::kAtOnce) {
          const int count = body.multiply(c, n, shared, state);
          state.at[c] += count;
          more = count == Body::kAtOnce;
          if (!body.partial || count == 0) continue;
          const T sum = sum_over_warp(state.dot, state.lane);
          if (state.lane % 8 == 0) body.store_dot(n + summed_by(state.lane), sum, shared, state);
        }
      }
    }
  }
  body.finish(state);
}

template <bool Linear, class T>
const char* forward(const UpShape& s, const TapPattern& p, const SmallImage<T>& x, const T* values, const T* bias, T* out,
                    void* stream) {
  using Body = UpForward<T, Linear>;
  Body body{s, p, x, values, bias, out, kMostWarps};
  while (body.warps > 2 && body.blocks() < kEnoughBlocks) body.warps /= 2;
  return launch_with(sizeof(typename Body::Shared), up_forward<T, Body>, body.blocks(), body.warps * kWarp, stream, body);
}

template <class Body, class T>
const char* backward(Body body, T* partial, T* grad_values, void* stream) {
  const int windows = body.strips().windows();
  const bool weights = grad_values && body.s.kept;
  body.partial = !weights ? nullptr : windows == 1 ? grad_values : partial;
  const char* error = launch_with(sizeof(typename Body::Shared), up_backward<T, Body>, body.blocks(),
                                  body.warps * kWarp, stream, body);
  if (error || !weights || windows == 1) return error;
  return launch_add_chunks<T>(partial, windows, body.s.kept, body.s.experiments, grad_values, stream);
}

template <bool Linear, class T>
const char* backward(const UpShape& s, const TapPattern& p, const T* grad_out, const SmallImage<T>& x, const T* values,
                     T* partial, T* grad_x, T* grad_values, void* stream) {
  // In double there are no registers for more channels than one. One experiment's shape decides, so that its bits are
  // the same beside others: the compiler may contract the two kernels' products differently.
  if constexpr (sizeof(T) == 4) {
    const UpBackward<T, Linear, kGradientChannels> many{s, p, grad_out, x, values, grad_x, nullptr, kMostWarps};
    if (many.blocks() / s.experiments >= kEnoughBlocks) return backward(many, partial, grad_values, stream);
  }
  return backward(UpBackward<T, Linear, 1>{s, p, grad_out, x, values, grad_x, nullptr, kMostWarps}, partial, grad_values,
                  stream);
}

}  // namespace

#define SPARSE_GEN_DEFINE(T)                                                                                           \
  const char* sparse_upsample_conv2d_forward(const UpShape& s, const TapPattern& p, const SmallImage<T>& x,            \
                                             const T* values, const T* bias, T* out, void* stream) {                   \
    return s.upsample == kNearest ? forward<false>(s, p, x, values, bias, out, stream)                                 \
                                  : forward<true>(s, p, x, values, bias, out, stream);                                 \
  }                                                                                                                    \
  const char* sparse_upsample_conv2d_backward(const UpShape& s, const TapPattern& p, const T* grad_out,                \
                                              const SmallImage<T>& x, const T* values, T* partial, T* grad_x,          \
                                              T* grad_values, void* stream) {                                          \
    return s.upsample == kNearest                                                                                      \
               ? backward<false>(s, p, grad_out, x, values, partial, grad_x, grad_values, stream)                      \
               : backward<true>(s, p, grad_out, x, values, partial, grad_x, grad_values, stream);                      \
  }
SPARSE_GEN_DEFINE(float)
SPARSE_GEN_DEFINE(double)
#undef SPARSE_GEN_DEFINE

long long sparse_upsample_conv2d_partial_size(const UpShape& s) {
  const int windows = Strips{s.height, s.width, halo_of(s.padding, s.upsample)}.windows();
  return windows == 1 ? 0 : (long long)s.experiments * windows * s.kept;
}

}  // namespace sparse_gen::cuda
