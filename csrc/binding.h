// What the bindings in this folder share. They see tensors only through LibTorch's stable ABI, so that one
// build serves every torch from TORCH_TARGET_VERSION on. Schemas, shape checks and autograd are in Python
// (sparse_gen/ops): there they also serve an installation without this library.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace sparse_gen {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Indices handled between two looks at the thread pool: 64 KiB of floats an array, small enough to balance
// two threads over one layer, large enough to hide the call. A multiple of every kernel's group.
constexpr int64_t kChunk = 16384;

// Calls body(experiment, begin, end) over experiments x numel indices, in parallel.
template <class Body>
void parallel_over_chunks(int64_t experiments, int64_t numel, const Body& body) {
  const int64_t chunks = (numel + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, experiments * chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % chunks * kChunk;
      body(i / chunks, begin, begin + kChunk < numel ? begin + kChunk : numel);
    }
  });
}

// Calls body with a value of the tensor's element type, and gives what it gives.
template <class Body>
auto for_float_type(const Tensor& tensor, const Body& body) {
  return tensor.scalar_type() == ScalarType::Double ? body(double{}) : body(float{});
}

}  // namespace sparse_gen
