#include "cpu/philox.h"

#include "binding.h"

namespace sparse_gen {

// seed: (E,) int64; step: () int64; returns (E, count) int32, the bits of each word.
Tensor philox(const Tensor& seed, const Tensor& step, int64_t stream, int64_t count) {
  const int64_t experiments = seed.size(0);
  Tensor words = torch::stable::empty({experiments, count}, ScalarType::Int);
  const int64_t* seeds = seed.const_data_ptr<int64_t>();
  const int64_t at_step = *step.const_data_ptr<int64_t>();
  int32_t* out = words.mutable_data_ptr<int32_t>();
  parallel_over_chunks(experiments, count, [&](int64_t e, int64_t begin, int64_t end) {
    SPARSE_GEN_DISPATCH(philox, out + e * count + begin, seeds[e], at_step, stream, begin, end);
  });
  return words;
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) { m.impl("philox", TORCH_BOX(&sparse_gen::philox)); }
