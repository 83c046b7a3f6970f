#include "sparse_conv2d.h"

#include "add_chunks.h"
#include "launch.h"
#include "sparse_conv2d_body.h"

namespace sparse_gen::cuda {

namespace {

template <class Body>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) convolve(const Body body) {
  __shared__ typename Body::Shared shared;
  typename Body::State state;
  body.begin(blockIdx.x, threadIdx.x, state);
  const int steps = state.group.steps();
  for (int step = 0; step < steps; ++step) {
    __syncthreads();
    body.stage(threadIdx.x, step, state, shared);
    __syncthreads();
    body.accumulate(step, shared, state);
  }
  body.finish(state);
}

template <class Body>
__global__ void __launch_bounds__(kThreads, kGradientBlocksAtOnce) weight_gradient(const Body body) {
  const int lane = threadIdx.x % kWarp;
  typename Body::State state;
  body.begin(blockIdx.x, lane, state);
  for (long long k = state.group.begin + threadIdx.x / kWarp; k < state.group.end; k += Body::kWarps) {
    auto sum = body.dot(k, state);
    for (int apart = kWarp / 2; apart; apart /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, apart);
    if (lane == 0) state.partial[k] = sum;
  }
}

template <class Body>
const char* launch_convolution(const Body& body, void* stream) {
  return launch(convolve<Body>, body.blocks(), kThreads, stream, body);
}

template <class Loads, class T>
const char* forward(const ConvShape& s, const ConvPattern& p, const Image<T>& x, const T* values, const T* bias, T* out,
                    void* stream) {
  if (many_pixels(s.out_plane()))
    return launch_convolution(ForwardBlock<T, kManyConvPixels, Loads>{s, p, x, values, bias, out}, stream);
  return launch_convolution(ForwardBlock<T, kFewConvPixels, Loads>{s, p, x, values, bias, out}, stream);
}

template <class T>
const char* backward_x(const ConvShape& s, const ConvPattern& p, const T* grad_out, const T* values, T* grad_x,
                       void* stream) {
  if (many_pixels(s.plane()))
    return launch_convolution(InputGradientBlock<T, kManyConvPixels>{s, p, grad_out, values, grad_x}, stream);
  return launch_convolution(InputGradientBlock<T, kFewConvPixels>{s, p, grad_out, values, grad_x}, stream);
}

template <class Loads, class T>
const char* backward_values(const ConvShape& s, const ConvPattern& p, const T* grad_out, const Image<T>& x, T* partial,
                            T* grad_values, void* stream) {
  if (s.kept == 0) return nullptr;
  const auto launch_body = [&](auto body) -> const char* {
    const int chunks = body.chunks();
    if (chunks == 1) body.partial = grad_values;
    const char* error = launch(weight_gradient<decltype(body)>, body.blocks(), kThreads, stream, body);
    if (error || chunks == 1) return error;
    return launch_add_chunks<T>(partial, chunks, s.kept, s.experiments, grad_values, stream);
  };
  if (many_pixels(s.out_plane()))
    return launch_body(WeightGradientWarp<T, kManyGradientPixels, Loads>{s, p, grad_out, x, partial});
  return launch_body(WeightGradientWarp<T, kFewGradientPixels, Loads>{s, p, grad_out, x, partial});
}

}  // namespace

#define SPARSE_GEN_DEFINE(T)                                                                                          \
  const char* sparse_conv2d_forward(const ConvShape& s, const ConvPattern& p, const Image<T>& x, const T* values,     \
                                    const T* bias, T* out, void* stream) {                                            \
    return x.load ? forward<Load<T>>(s, p, x, values, bias, out, stream)                                              \
                  : forward<NoLoad<T>>(s, p, x, values, bias, out, stream);                                           \
  }                                                                                                                   \
  const char* sparse_conv2d_backward_x(const ConvShape& s, const ConvPattern& p, const T* grad_out, const T* values,  \
                                       T* grad_x, void* stream) {                                                     \
    return backward_x(s, p, grad_out, values, grad_x, stream);                                                        \
  }                                                                                                                   \
  const char* sparse_conv2d_backward_values(const ConvShape& s, const ConvPattern& p, const T* grad_out,              \
                                            const Image<T>& x, T* partial, T* grad_values, void* stream) {            \
    return x.load ? backward_values<Load<T>>(s, p, grad_out, x, partial, grad_values, stream)                         \
                  : backward_values<NoLoad<T>>(s, p, grad_out, x, partial, grad_values, stream);                      \
  }
SPARSE_GEN_DEFINE(float)
SPARSE_GEN_DEFINE(double)
#undef SPARSE_GEN_DEFINE

long long sparse_conv2d_partial_size(const ConvShape& s) {
  const int a_warp = kWarp * (many_pixels(s.out_plane()) ? kManyGradientPixels : kFewGradientPixels);
  const int chunks = round_up_quotient(s.out_plane(), a_warp);
  return chunks == 1 ? 0 : (long long)s.experiments * chunks * s.kept;
}

}  // namespace sparse_gen::cuda
