#include "block_sparse_conv2d.h"

#include "add_chunks.h"
#include "block_sparse_conv2d_gradient_body.h"
#include "launch.h"

namespace sparse_gen::cuda {

namespace {

constexpr int kEachThreads = 256;

template <class Body>
__global__ void __launch_bounds__(kEachThreads) each(const Body body) {
  const long long i = (long long)blockIdx.x * kEachThreads + threadIdx.x;
  if (i < body.count()) body.run(i);
}

template <class Body>
const char* launch_each(const Body& body, void* stream) {
  return launch(each<Body>, round_up_quotient(body.count(), (long long)kEachThreads), kEachThreads, stream, body);
}

__device__ float* shared_memory() {
  extern __shared__ __align__(16) float memory[];
  return memory;
}

template <class Body>
__global__ void __launch_bounds__(kHaloThreads, 2) halo_convolution(const Body body) {
  auto* tile = shared_memory();
  typename Body::State state;
  body.begin(blockIdx.x, threadIdx.x, state);
  for (int chunk = body.first_chunk(state); chunk < body.end_chunk(state); ++chunk) {
    if (body.start(chunk, 0, state) == body.start(chunk, Body::kGroups, state)) continue;
    __syncthreads();
    body.stage(chunk, threadIdx.x, state, tile);
    __syncthreads();
    SPARSE_GEN_UNROLL
    for (int group = 0; group < Body::kGroups; ++group) {
      const int end = body.start(chunk, group + 1, state);
      for (int step = body.start(chunk, group, state); step < end; ++step) {
        typename Body::Fragment fragment;
        body.load(step, state, tile, fragment);
        body.multiply(fragment, state.sum[group]);
      }
    }
  }
  body.finish(state);
}

template <class Body>
__global__ void __launch_bounds__(kHaloThreads, 2) halo_weight_gradient(const Body body) {
  auto* shared = shared_memory();
  typename Body::State state;
  body.begin(blockIdx.x, threadIdx.x, state);
  body.name_channels(threadIdx.x, state, shared);
  for (int tile = body.first_tile(state); tile < body.end_tile(state); ++tile) {
    __syncthreads();
    body.stage(tile, threadIdx.x, state, shared);
    __syncthreads();
    SPARSE_GEN_UNROLL
    for (int n = 0; n < Body::kPieces; ++n) {
      if (body.piece(n, state) >= state.end) break;
      for (int first = state.share * 8; first < kGradientPixels; first += body.shares * 8) {
        typename Body::Fragment fragment;
        body.load(n, first, state, shared, fragment);
        body.multiply(fragment, state.sum[n]);
      }
    }
  }
  body.finish(state);
}

// Calls `then` with the product and how often eight channels make a group.
template <class Then>
const char* by_product(bool tf32, int width, const Then& then) {
  if (width == 8) return tf32 ? then.template operator()<TensorCores, 1>() : then.template operator()<ThreadByThread, 1>();
  if (width == 16) return tf32 ? then.template operator()<TensorCores, 2>() : then.template operator()<ThreadByThread, 2>();
  return tf32 ? then.template operator()<TensorCores, 4>() : "expected groups of 8 or 16 channels without tensor cores";
}

const char* convolve(const HaloPass& pass, const HaloLists& lists, int kept, const float* values, const float* bias,
                     const HaloBuffers& buffers, int splits, bool tf32, float* out, void* stream) {
  const int plane = pass.tile.plane(kForwardBanks);
  return by_product(tf32, lists.width, [&]<class Product, int N>() -> const char* {
    using Body = HaloConvolution<Product, N>;
    const PlaceBody place{lists.codes, lists.columns, plane, pass.tile, buffers.places};
    const PackBody<Product> pack{lists, place, pass.experiments, kept, values, buffers.packed};
    if (const char* error = launch_each(pack, stream)) return error;
    const Body body{pass, lists, plane, buffers.packed, bias, buffers.places, out, splits};
    const int shared_bytes = lists.chunk * plane * (int)sizeof(float);
    return launch_with(shared_bytes, halo_convolution<Body>, body.blocks(), kHaloThreads, stream, body);
  });
}

}  // namespace

const char* block_sparse_conv2d_forward(const ConvShape& s, const HaloLists& lists, const float* x,
                                        const float* values, const float* bias, const HaloBuffers& buffers, bool tf32,
                                        float* out, void* stream) {
  const HaloPass pass = forward_pass(s, x);
  const int splits = halo_splits(pass, lists);
  float* to = splits == 1 ? out : buffers.parts;
  const char* error = convolve(pass, lists, s.kept, values, bias, buffers, splits, tf32, to, stream);
  if (error || splits == 1) return error;
  return launch_add_chunks(to, splits, pass.outputs * pass.plane(), s.experiments, out, stream);
}

const char* block_sparse_conv2d_backward_x(const ConvShape& s, const HaloLists& lists, const float* grad_out,
                                           const float* values, const HaloBuffers& buffers, bool tf32, float* grad_x,
                                           void* stream) {
  const HaloPass pass = input_gradient_pass(s, grad_out);
  const int splits = halo_splits(pass, lists);
  float* to = splits == 1 && !folds(s) ? grad_x : buffers.parts;
  const char* error = convolve(pass, lists, s.kept, values, nullptr, buffers, splits, tf32, to, stream);
  if (error || to == grad_x) return error;
  if (folds(s)) return launch_each(FoldPadding{s, to, splits, grad_x}, stream);
  return launch_add_chunks(to, splits, pass.outputs * pass.plane(), s.experiments, grad_x, stream);
}

const char* block_sparse_conv2d_backward_values(const ConvShape& s, const HaloRounds& lists, const float* grad_out,
                                                const float* x, const HaloBuffers& buffers, bool tf32, float* grad_values,
                                                void* stream) {
  if (s.kept == 0) return nullptr;
  const HaloTile tile = gradient_tile(s);
  const int plane = tile.plane(kGradientBanks), splits = gradient_splits(s, lists);
  return by_product(tf32, lists.width, [&]<class Product, int N>() -> const char* {
    if (const char* error = launch_each(PlaceBody{lists.codes, lists.columns, plane, tile, buffers.places}, stream))
      return error;
    using Body = HaloWeightGradient<Product, N>;
    const int shares = gradient_shares<Body>(lists), chunks = splits * shares;
    float* to = chunks == 1 ? grad_values : buffers.parts;
    const Body body{s, lists, tile, plane, x, grad_out, buffers.places, to, splits, shares};
    const char* error =
        launch_with(body.shared_bytes(), halo_weight_gradient<Body>, body.blocks(), kHaloThreads, stream, body);
    if (error || chunks == 1) return error;
    return launch_add_chunks(to, chunks, s.kept, s.experiments, grad_values, stream);
  });
}

HaloScratch halo_forward_scratch(const ConvShape& s, const HaloLists& lists) {
  const HaloPass pass = forward_pass(s, nullptr);
  const int splits = halo_splits(pass, lists);
  return {packed_size(s, lists), lists.columns, splits == 1 ? 0 : parts_size(pass, splits)};
}

HaloScratch halo_backward_x_scratch(const ConvShape& s, const HaloLists& lists) {
  const HaloPass pass = input_gradient_pass(s, nullptr);
  const int splits = halo_splits(pass, lists);
  return {packed_size(s, lists), lists.columns, splits == 1 && !folds(s) ? 0 : parts_size(pass, splits)};
}

HaloScratch halo_backward_values_scratch(const ConvShape& s, const HaloRounds& lists) {
  return {0, lists.columns, (long long)s.experiments * gradient_splits(s, lists) * kHaloWarps * s.kept};
}

}  // namespace sparse_gen::cuda
