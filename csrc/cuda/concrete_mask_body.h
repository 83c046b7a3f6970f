// What a thread of the soft mask's kernels does with one group: four logits, one call of Philox, one vector an array.
#pragma once

#include <cmath>

#include "concrete_mask.h"
#include "host_device.h"
#include "philox.h"

namespace sparse_gen::cuda {

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

// Where a group lies and how much of it there is. A division of 64 bits would cost a GPU as much as a call of Philox.
struct GroupPlace {
  long long experiment, group, row, weight;
  int count;

  SPARSE_GEN_HD GroupPlace(const Rows& rows, long long i)
      : experiment(rows.groups() >> 32 ? i / rows.groups_a_row() : (unsigned)i / (unsigned)rows.groups_a_row()),
        group(i - experiment * rows.groups_a_row()),
        row(experiment * rows.numel + 4 * group),
        weight(experiment * rows.weight_stride + 4 * group),
        count(rows.numel - 4 * group < 4 ? (int)(rows.numel - 4 * group) : 4) {}
};

template <bool kWhole, class T>
SPARSE_GEN_HD Four<T> load_four(const T* from, int count) {
  if constexpr (kWhole) return *reinterpret_cast<const Four<T>*>(from);
  Four<T> four{};
  for (int i = 0; i < 4; ++i)
    if (i < count) four.at[i] = from[i];
  return four;
}

template <bool kWhole, class T>
SPARSE_GEN_HD void store_four(T* to, const Four<T>& four, int count) {
  if constexpr (kWhole) {
#ifdef __CUDA_ARCH__
    // nvcc 13.0 turns an assignment into four stores, a float4's too; this stays one.
    if constexpr (sizeof(T) == 4) {
      __stwb(reinterpret_cast<float4*>(to), make_float4(four.at[0], four.at[1], four.at[2], four.at[3]));
      return;
    }
#endif
    *reinterpret_cast<Four<T>*>(to) = four;
  } else {
    for (int i = 0; i < 4; ++i)
      if (i < count) to[i] = four.at[i];
  }
}

SPARSE_GEN_HD float exponential(float x) { return expf(x); }
SPARSE_GEN_HD double exponential(double x) { return exp(x); }
SPARSE_GEN_HD float logarithm(float x) { return logf(x); }
SPARSE_GEN_HD double logarithm(double x) { return log(x); }
SPARSE_GEN_HD float square_root(float x) { return sqrtf(x); }
SPARSE_GEN_HD double square_root(double x) { return sqrt(x); }

// Beyond it the exponential is infinite, and infinity times the mask's zero is no number.
template <class T>
SPARSE_GEN_HD T capped(T exponent) {
  constexpr T kMost = sizeof(T) == 4 ? T(88) : T(709);
  return exponent < kMost ? exponent : kMost;
}

// sigmoid((logit + ln u - ln(1 - u)) / temperature) and its complement, which 1 - mask would round away near 1.
template <class T>
struct SoftMask {
  T mask, complement;

  SPARSE_GEN_HD SoftMask(T logit, unsigned word, T inverse_temperature) {
    const T u = uniform(word);
    const T odds = exponential(capped((logarithm((1 - u) / u) - logit) * inverse_temperature));
    mask = 1 / (1 + odds);
    complement = odds * mask;
  }
};

// Derivative by the logit of p ln((p + e) / p0) + (1 - p) ln((1 - p + e) / (1 - p0)), p = sigmoid(logit), e = 1e-6.
template <class T>
SPARSE_GEN_HD T kl_gradient(T logit, T log_prior_odds) {
  const T e = T(1e-6), odds = exponential(capped(-logit));
  const T p = 1 / (1 + odds), q = odds * p;
  const T pe = p + e, qe = q + e, inverse = 1 / (pe * qe);
  return p * q * (logarithm(pe * pe * inverse) - log_prior_odds + e * (p - q) * inverse);
}

// The bias corrections, in double: at the first step a float would keep four digits of 1 - 0.999.
template <class T>
struct AdamStep {
  T step_size, inverse_root2;

  AdamStep() = default;
  SPARSE_GEN_HD AdamStep(const AdamNumbers& adam, long long step) {
    const double count = (double)step + 1;
    step_size = (T)(adam.lr / -expm1(count * adam.log_beta1));
    inverse_root2 = (T)(1 / sqrt(-expm1(count * adam.log_beta2)));
  }
};

template <class T>
struct SampleBody : Sample<T> {
  template <bool kWhole>
  SPARSE_GEN_HD void run(long long i) const {
    const GroupPlace place(this->rows, i);
    const Four<T> logit = load_four<kWhole>(this->logits + place.row, place.count);
    const Four<T> weight = load_four<kWhole>(this->weight + place.weight, place.count);
    const Words words = philox(this->draw.seed[place.experiment], *this->draw.step, this->draw.stream, place.group);
    Four<T> soft_mask, masked;
    SPARSE_GEN_UNROLL
    for (int j = 0; j < 4; ++j) {
      soft_mask.at[j] = SoftMask<T>(logit.at[j], words.word[j], (T)this->draw.inverse_temperature).mask;
      masked.at[j] = soft_mask.at[j] * weight.at[j];
    }
    store_four<kWhole>(this->soft_mask + place.row, soft_mask, place.count);
    store_four<kWhole>(this->masked_weight + place.row, masked, place.count);
  }
};

template <class T>
struct GradientBody : Gradient<T> {
  template <bool kWhole>
  SPARSE_GEN_HD void run(long long i) const {
    const GroupPlace place(this->rows, i);
    const Four<T> grad_mask = load_four<kWhole>(this->grad_soft_mask + place.row, place.count);
    const Four<T> grad_masked = load_four<kWhole>(this->grad_masked_weight + place.row, place.count);
    const Four<T> weight = load_four<kWhole>(this->weight + place.weight, place.count);
    const Four<T> mask = load_four<kWhole>(this->soft_mask + place.row, place.count);
    const T inverse_temperature = (T)this->inverse_temperature;
    Four<T> grad_logit, grad_weight;
    SPARSE_GEN_UNROLL
    for (int j = 0; j < 4; ++j) {
      const T sum = grad_mask.at[j] + grad_masked.at[j] * weight.at[j];
      grad_logit.at[j] = sum * mask.at[j] * (1 - mask.at[j]) * inverse_temperature;
      grad_weight.at[j] = grad_masked.at[j] * mask.at[j];
    }
    store_four<kWhole>(this->grad_logits + place.row, grad_logit, place.count);
    store_four<kWhole>(this->grad_weight + place.row, grad_weight, place.count);
  }
};

// 36 bytes a logit in float: five arrays read, four written. The old sample is drawn again rather than read back.
template <class T>
struct UpdateBody : Update<T> {
  template <bool kWhole>
  SPARSE_GEN_HD void run(long long i, const AdamStep<T>& step) const {
    const GroupPlace place(this->rows, i);
    Four<T> logit = load_four<kWhole>(this->logits + place.row, place.count);
    Four<T> exp_avg = load_four<kWhole>(this->exp_avg + place.row, place.count);
    Four<T> exp_avg_sq = load_four<kWhole>(this->exp_avg_sq + place.row, place.count);
    const Four<T> weight = load_four<kWhole>(this->weight + place.weight, place.count);
    const Four<T> grad_masked = load_four<kWhole>(this->grad_masked_weight + place.row, place.count);
    const long long seed = this->draw.seed[place.experiment], at = *this->draw.step;
    const Words before = philox(seed, at, this->draw.stream, place.group);
    const Words after = philox(seed, at + 1, this->draw.stream, place.group);

    const T inverse_temperature = (T)this->draw.inverse_temperature, kl_weight = (T)this->adam.kl_weight;
    const T log_prior_odds = (T)this->adam.log_prior_odds, eps = (T)this->adam.eps;
    const T decay1 = (T)this->adam.decay1, decay2 = (T)this->adam.decay2;
    Four<T> masked;
    SPARSE_GEN_UNROLL
    for (int j = 0; j < 4; ++j) {
      const SoftMask<T> soft(logit.at[j], before.word[j], inverse_temperature);
      const T gradient = grad_masked.at[j] * weight.at[j] * soft.mask * soft.complement * inverse_temperature +
                         kl_weight * kl_gradient(logit.at[j], log_prior_odds);
      exp_avg.at[j] += (gradient - exp_avg.at[j]) * decay1;
      exp_avg_sq.at[j] += (gradient * gradient - exp_avg_sq.at[j]) * decay2;
      logit.at[j] -= step.step_size * exp_avg.at[j] / (square_root(exp_avg_sq.at[j]) * step.inverse_root2 + eps);
      masked.at[j] = SoftMask<T>(logit.at[j], after.word[j], inverse_temperature).mask * weight.at[j];
    }
    store_four<kWhole>(this->logits + place.row, logit, place.count);
    store_four<kWhole>(this->exp_avg + place.row, exp_avg, place.count);
    store_four<kWhole>(this->exp_avg_sq + place.row, exp_avg_sq, place.count);
    store_four<kWhole>(this->masked_weight + place.row, masked, place.count);
  }
};

}  // namespace sparse_gen::cuda
