// Launchers of the soft mask's CUDA kernels: raw device pointers and a stream. Each returns the CUDA error in words, or
// null.
#pragma once

#include <cmath>

namespace sparse_gen::cuda {

// (E, N) arrays; weights lie weight_stride apart, which is 0 where all experiments share them.
struct Rows {
  long long experiments, numel, weight_stride;

#ifdef __CUDACC__
#define SPARSE_GEN_ROWS __host__ __device__
#else
#define SPARSE_GEN_ROWS
#endif
  // Four logits share one call of Philox.
  SPARSE_GEN_ROWS long long groups_a_row() const { return (numel + 3) / 4; }
  SPARSE_GEN_ROWS long long groups() const { return experiments * groups_a_row(); }
  // Every row begins where a vector of four may.
  SPARSE_GEN_ROWS bool whole() const { return numel % 4 == 0; }
#undef SPARSE_GEN_ROWS
};

// Which random numbers: seed (E,) and step () are read on the device, so that a captured graph draws new ones.
struct Draw {
  const long long *seed, *step;
  long long stream;
  double inverse_temperature;
};

// What is known of Adam and the KL before the step is.
struct AdamNumbers {
  double kl_weight, log_prior_odds, lr, log_beta1, log_beta2, decay1, decay2, eps;

  static AdamNumbers of(double kl_weight, double prior, double lr, double beta1, double beta2, double eps) {
    const double log_prior_odds = std::log(prior) - std::log1p(-prior);
    return {kl_weight, log_prior_odds, lr, std::log(beta1), std::log(beta2), 1 - beta1, 1 - beta2, eps};
  }
};

template <class T>
struct Sample {
  Rows rows;
  Draw draw;
  const T *logits, *weight;
  T *soft_mask, *masked_weight;
};

template <class T>
struct Gradient {
  Rows rows;
  double inverse_temperature;
  const T *grad_soft_mask, *grad_masked_weight, *weight, *soft_mask;
  T *grad_logits, *grad_weight;
};

// The step's gradient, Adam and the sample of step + 1: logits and averages are changed, masked_weight is written.
template <class T>
struct Update {
  Rows rows;
  Draw draw;
  T *logits, *exp_avg, *exp_avg_sq, *masked_weight;
  const T *weight, *grad_masked_weight;
  AdamNumbers adam;
};

const char* concrete_mask_sample(const Sample<float>&, void* stream);
const char* concrete_mask_sample(const Sample<double>&, void* stream);
const char* concrete_mask_gradient(const Gradient<float>&, void* stream);
const char* concrete_mask_gradient(const Gradient<double>&, void* stream);
const char* concrete_mask_update(const Update<float>&, void* stream);
const char* concrete_mask_update(const Update<double>&, void* stream);

}  // namespace sparse_gen::cuda
