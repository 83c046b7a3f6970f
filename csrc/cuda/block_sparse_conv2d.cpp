#include "cuda/block_sparse_conv2d.h"

#include <optional>
#include <tuple>

#include "cuda/conv_binding.h"
#include "cuda/on_device.h"

namespace sparse_gen {

namespace {

int groups_of(int64_t channels, int64_t block, int width) {
  return number(cuda::round_up_quotient(channels, block) * cuda::round_up_quotient(block, int64_t{width}));
}

cuda::HaloLists lists_of(const Tensor& codes, const Tensor& slots, const Tensor& starts, int64_t chunk, int64_t block,
                         int64_t channels) {
  const int width = number(slots.size(1));
  return {codes.const_data_ptr<int32_t>(),
          slots.const_data_ptr<int32_t>(),
          starts.const_data_ptr<int32_t>(),
          number(codes.size(0)),
          number(chunk),
          groups_of(channels, block, width),
          width,
          number(block)};
}

cuda::HaloRounds rounds_of(const Tensor& codes, const Tensor& slots, const Tensor& pieces, const Tensor& rounds,
                           int64_t chunk, int64_t slab, int64_t most, int64_t block, int64_t channels) {
  const int width = number(slots.size(1));
  return {codes.const_data_ptr<int32_t>(),
          slots.const_data_ptr<int32_t>(),
          pieces.const_data_ptr<int32_t>(),
          rounds.const_data_ptr<int32_t>(),
          number(codes.size(0)),
          number(chunk),
          groups_of(channels, block, width),
          number(slab),
          width,
          number(block),
          number(rounds.size(1)),
          number(most)};
}

// Scratch memory of a launch; the caching allocator keeps it for what comes later on the stream.
struct Scratch {
  Tensor packed, places, parts;

  Scratch(const Tensor& like, const cuda::HaloScratch& sizes)
      : packed(torch::stable::new_empty(like, {sizes.packed})),
        places(torch::stable::new_empty(like, {sizes.places}, ScalarType::Int)),
        parts(torch::stable::new_empty(like, {sizes.parts})) {}

  cuda::HaloBuffers buffers() const {
    return {packed.mutable_data_ptr<float>(), places.mutable_data_ptr<int32_t>(), parts.mutable_data_ptr<float>()};
  }
};

}  // namespace

// Lists are those of sparse_gen/ops/block_halo.py; index (kept,) is for the reference alone.
Tensor block_sparse_conv2d_halo_cuda(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                                     const Tensor& /*index*/, const Tensor& codes, const Tensor& slots,
                                     const Tensor& starts, int64_t chunk, int64_t block, int64_t out_channels,
                                     int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding, int64_t mode,
                                     bool tf32) {
  const OnDevice device(x);
  device.expect_here("values and pattern", values, codes, slots, starts);
  const cuda::ConvShape shape = conv_shape_of(x, values, out_channels, kernel_h, kernel_w, stride, padding, mode);
  const cuda::HaloLists lists = lists_of(codes, slots, starts, chunk, block, out_channels);
  Tensor out = torch::stable::new_empty(x, {x.size(0), out_channels, shape.out_h(), shape.out_w()});
  const Scratch scratch(x, cuda::halo_forward_scratch(shape, lists));
  device.check(cuda::block_sparse_conv2d_forward(shape, lists, x.const_data_ptr<float>(), values.const_data_ptr<float>(),
                                                 bias ? bias->const_data_ptr<float>() : nullptr, scratch.buffers(), tf32,
                                                 out.mutable_data_ptr<float>(), device.stream()));
  return out;
}

std::tuple<Tensor, Tensor> block_sparse_conv2d_halo_backward_cuda(
    const Tensor& grad_out, const Tensor& x, const Tensor& values, const Tensor& /*index*/, const Tensor& codes,
    const Tensor& slots, const Tensor& starts, int64_t chunk, int64_t block, const Tensor& piece_codes,
    const Tensor& piece_slots, const Tensor& pieces, const Tensor& rounds, int64_t piece_chunk, int64_t slab, int64_t most,
    int64_t piece_block, int64_t out_channels, int64_t kernel_h, int64_t kernel_w, int64_t stride, int64_t padding,
    int64_t mode, bool tf32, bool needs_grad_x, bool needs_grad_values) {
  const OnDevice device(x);
  device.expect_here("gradient, values and pattern", grad_out, values, codes, slots, starts, piece_codes, piece_slots,
                     pieces, rounds);
  const cuda::ConvShape shape = conv_shape_of(x, values, out_channels, kernel_h, kernel_w, stride, padding, mode);
  Tensor grad_x = needs_grad_x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  Tensor grad_values = needs_grad_values ? torch::stable::empty_like(values) : torch::stable::new_empty(x, {0});
  const float* gradient = grad_out.const_data_ptr<float>();
  if (needs_grad_x) {
    const cuda::HaloLists lists = lists_of(codes, slots, starts, chunk, block, x.size(1));
    const Scratch scratch(x, cuda::halo_backward_x_scratch(shape, lists));
    device.check(cuda::block_sparse_conv2d_backward_x(shape, lists, gradient, values.const_data_ptr<float>(),
                                                      scratch.buffers(), tf32, grad_x.mutable_data_ptr<float>(),
                                                      device.stream()));
  }
  if (needs_grad_values) {
    const cuda::HaloRounds lists =
        rounds_of(piece_codes, piece_slots, pieces, rounds, piece_chunk, slab, most, piece_block, out_channels);
    const Scratch scratch(x, cuda::halo_backward_values_scratch(shape, lists));
    device.check(cuda::block_sparse_conv2d_backward_values(shape, lists, gradient, x.const_data_ptr<float>(),
                                                           scratch.buffers(), tf32, grad_values.mutable_data_ptr<float>(),
                                                           device.stream()));
  }
  return {grad_x, grad_values};
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CUDA, m) {
  m.impl("block_sparse_conv2d_halo", TORCH_BOX(&sparse_gen::block_sparse_conv2d_halo_cuda));
  m.impl("block_sparse_conv2d_halo_backward", TORCH_BOX(&sparse_gen::block_sparse_conv2d_halo_backward_cuda));
}
