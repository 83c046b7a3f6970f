#include "sparse_conv2d.h"

#include "launch.h"
#include "sparse_conv2d_body.h"

namespace sparse_gen::cuda {

namespace {

template <class Body, class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) convolve(const Body body) {
  __shared__ Taps<T> shared;
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

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocksAtOnce) add_chunks(const T* partial, int chunks, int kept, long long count, T* to) {
  const long long i = (long long)blockIdx.x * kThreads + threadIdx.x;
  if (i >= count) return;
  to[i] = sum_of_chunks(partial + i / kept * chunks * kept + i % kept, chunks, kept);
}

template <template <class, int> class Block, class T, class... Pointers>
const char* launch_convolution(int pixels, void* stream, const ConvShape& shape, const ConvPattern& pattern,
                               Pointers... pointers) {
  const auto launch_body = [&](const auto& body) {
    return launch(convolve<std::decay_t<decltype(body)>, T>, body.blocks(), kThreads, stream, body);
  };
  if (many_pixels(pixels)) return launch_body(Block<T, kManyConvPixels>{shape, pattern, pointers...});
  return launch_body(Block<T, kFewConvPixels>{shape, pattern, pointers...});
}

template <class T>
const char* backward_values(const ConvShape& shape, const ConvPattern& pattern, const T* grad_out, const T* x,
                            T* partial, T* grad_values, void* stream) {
  if (shape.kept == 0) return nullptr;
  const auto launch_body = [&](auto body) -> const char* {
    const int chunks = body.chunks();
    if (chunks == 1) body.partial = grad_values;
    const char* error = launch(weight_gradient<decltype(body)>, body.blocks(), kThreads, stream, body);
    if (error || chunks == 1) return error;
    const long long count = (long long)shape.experiments * shape.kept;
    return launch(add_chunks<T>, round_up_quotient(count, (long long)kThreads), kThreads, stream, (const T*)partial,
                  chunks, shape.kept, count, grad_values);
  };
  if (many_pixels(shape.out_plane()))
    return launch_body(WeightGradientWarp<T, kManyGradientPixels>{shape, pattern, grad_out, x, partial});
  return launch_body(WeightGradientWarp<T, kFewGradientPixels>{shape, pattern, grad_out, x, partial});
}

}  // namespace

const char* sparse_conv2d_forward(const ConvShape& s, const ConvPattern& p, const float* x, const float* values,
                                  const float* bias, float* out, void* stream) {
  return launch_convolution<ForwardBlock, float>(s.out_plane(), stream, s, p, x, values, bias, out);
}
const char* sparse_conv2d_forward(const ConvShape& s, const ConvPattern& p, const double* x, const double* values,
                                  const double* bias, double* out, void* stream) {
  return launch_convolution<ForwardBlock, double>(s.out_plane(), stream, s, p, x, values, bias, out);
}
const char* sparse_conv2d_backward_x(const ConvShape& s, const ConvPattern& p, const float* grad_out,
                                     const float* values, float* grad_x, void* stream) {
  return launch_convolution<InputGradientBlock, float>(s.plane(), stream, s, p, grad_out, values, grad_x);
}
const char* sparse_conv2d_backward_x(const ConvShape& s, const ConvPattern& p, const double* grad_out,
                                     const double* values, double* grad_x, void* stream) {
  return launch_convolution<InputGradientBlock, double>(s.plane(), stream, s, p, grad_out, values, grad_x);
}
const char* sparse_conv2d_backward_values(const ConvShape& s, const ConvPattern& p, const float* grad_out,
                                          const float* x, float* partial, float* grad_values, void* stream) {
  return backward_values(s, p, grad_out, x, partial, grad_values, stream);
}
const char* sparse_conv2d_backward_values(const ConvShape& s, const ConvPattern& p, const double* grad_out,
                                          const double* x, double* partial, double* grad_values, void* stream) {
  return backward_values(s, p, grad_out, x, partial, grad_values, stream);
}

long long sparse_conv2d_partial_size(const ConvShape& s) {
  const int a_warp = kWarp * (many_pixels(s.out_plane()) ? kManyGradientPixels : kFewGradientPixels);
  const int chunks = round_up_quotient(s.out_plane(), a_warp);
  return chunks == 1 ? 0 : (long long)s.experiments * chunks * s.kept;
}

}  // namespace sparse_gen::cuda
