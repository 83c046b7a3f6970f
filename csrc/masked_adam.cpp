#include "cpu/masked_adam.h"

#include <cmath>

#include "binding.h"

namespace sparse_gen {

// All tensors (E, kept) but the step, whose number counts from 0; experiments are no more than a longer vector.
void masked_adam(const Tensor& values, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& grad,
                 const Tensor& step, double lr, double beta1, double beta2, double eps) {
  const double count = (double)(*step.const_data_ptr<int64_t>() + 1);
  const double step_size = lr / (1 - std::pow(beta1, count));
  const double root_correction2 = std::sqrt(1 - std::pow(beta2, count));
  for_float_type(values, [&](auto type) {
    using T = decltype(type);
    const MaskedAdam<T> arguments{values.mutable_data_ptr<T>(),
                                  exp_avg.mutable_data_ptr<T>(),
                                  exp_avg_sq.mutable_data_ptr<T>(),
                                  grad.const_data_ptr<T>(),
                                  beta1,
                                  beta2,
                                  eps,
                                  step_size,
                                  root_correction2};
    parallel_over_chunks(1, values.numel(), [&](int64_t, int64_t begin, int64_t end) {
      SPARSE_GEN_DISPATCH(masked_adam, arguments, begin, end);
    });
  });
}

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CPU, m) { m.impl("masked_adam", TORCH_BOX(&sparse_gen::masked_adam)); }
