#include "concrete_mask.h"

#include "groups.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

constexpr double kLog2E = 1.44269504088896341;  // 1 / ln 2

// The soft mask sigmoid((logit + ln u - ln(1 - u)) / temperature) from log2((1 - u) / u), and its complement. The
// complement is not taken as 1 - mask, which would lose all its digits where the mask is nearly one.
template <class V>
struct SoftMask {
  V mask, complement;

  template <class S>
  SoftMask(V logit, V noise, S inverse_temperature) {
    const V pruned = exponential2(noise * inverse_temperature - logit * (inverse_temperature * (S)kLog2E));
    mask = (S)1 / ((S)1 + pruned);
    complement = pruned * mask;
  }
};

// Derivative by the logit of p ln((p + e) / p0) + (1 - p) ln((1 - p + e) / (1 - p0)), p = sigmoid(logit), e = 1e-6.
//
// That is p q (logit - ln(p0 / (1 - p0)) + f(e / p) - f(e / q)), q = 1 - p, f(x) = ln(1 + x) - x / (1 + x) < x^2 / 2.
// Below |logit| = 6 f is less than 9e-8, which is below a float's rounding of what it is added to: a logarithm spared.
template <bool Near, class V, class S>
inline V kl_gradient(V logit, S log_prior_odds) {
  const S e = (S)1e-6;
  const V odds = exponential2(logit * (S)-kLog2E);
  const V p = quotient(V{} + 1, (S)1 + odds);
  const V q = odds * p;
  if constexpr (Near) return p * q * (logit - log_prior_odds);
  const V pe = p + e, qe = q + e;
  const V inverse = (S)1 / (pe * qe);
  return p * q * (logarithm2(pe * pe * inverse) * (S)(1 / kLog2E) - log_prior_odds + e * (p - q) * inverse);
}

template <class T>
void sample(const ConcreteMaskSample<T>& a, long long begin, long long end) {
  using L = Lanes<T>;
  const Philox random(a.seed, a.step, a.stream);
  const T inverse_temperature = (T)(1 / a.temperature);
  for_each_group<T>({a.logits, a.weight}, {a.soft_mask, a.masked_weight}, begin, end,
                    [&](long long i, const T* const* in, T* const* out) {
                      const PhiloxGroup group = random.group(i);
                      for (int k = 0; k < kPhiloxGroup; k += L::width) {
                        const SoftMask<typename L::V> soft(L::load(in[0] + k), logarithm2(L::odds(group, k)),
                                                           inverse_temperature);
                        L::store(out[0] + k, soft.mask);
                        L::store(out[1] + k, soft.mask * L::load(in[1] + k));
                      }
                    });
}

template <class T>
void gradient(const ConcreteMaskGradient<T>& a, long long begin, long long end) {
  using L = Lanes<T>;
  const T inverse_temperature = (T)(1 / a.temperature);
  for_each_group<T>({a.grad_soft_mask, a.grad_masked_weight, a.weight, a.soft_mask}, {a.grad_logits, a.grad_weight},
                    begin, end, [&](long long, const T* const* in, T* const* out) {
                      for (int k = 0; k < kPhiloxGroup; k += L::width) {
                        const typename L::V grad_masked = L::load(in[1] + k), mask = L::load(in[3] + k);
                        const typename L::V grad_mask = L::load(in[0] + k) + grad_masked * L::load(in[2] + k);
                        L::store(out[0] + k, grad_mask * mask * ((T)1 - mask) * inverse_temperature);
                        L::store(out[1] + k, grad_masked * mask);
                      }
                    });
}

// 36 bytes an element: five arrays read, four written. The old sample is drawn again from its index rather
// than read back, which would make it 44.
template <class T>
void update(const ConcreteMaskUpdate<T>& a, long long begin, long long end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const Philox old_random(a.seed, a.step, a.stream), new_random(a.seed, a.step + 1, a.stream);
  const T inverse_temperature = (T)(1 / a.temperature), kl_weight = (T)a.kl_weight;
  const T log_prior_odds = (T)((logarithm2(a.prior) - logarithm2(1 - a.prior)) / kLog2E);
  const T decay1 = (T)(1 - a.beta1), decay2 = (T)(1 - a.beta2), beta2 = (T)a.beta2, eps = (T)a.eps;
  const T step_size = (T)a.step_size, inverse_root2 = (T)(1 / a.root_correction2);
  // In stages over the group's vectors, with the random numbers of the next group drawn between the gradient and Adam:
  // one vector's chain of dependent instructions is longer than what a processor looks ahead.
  constexpr int vectors = kPhiloxGroup / L::width;
  V old_noise[vectors], new_noise[vectors];
  const auto draw = [&](long long first) {
    const PhiloxGroup old_group = old_random.group(first), new_group = new_random.group(first);
    for (int v = 0; v < vectors; ++v) {
      old_noise[v] = logarithm2(L::odds(old_group, v * L::width));
      new_noise[v] = logarithm2(L::odds(new_group, v * L::width));
    }
  };
  draw(begin);
  for_each_group<T>(
      {a.logits, a.exp_avg, a.exp_avg_sq, a.weight, a.grad_masked_weight},
      {a.logits, a.exp_avg, a.exp_avg_sq, a.masked_weight}, begin, end,
      [&](long long i, const T* const* in, T* const* out) {
        V logit[vectors], noise[vectors], gradient[vectors];
        bool near = sizeof(T) == 4;
        for (int v = 0; v < vectors; ++v) {
          noise[v] = new_noise[v];
          logit[v] = L::load(in[0] + v * L::width);
          near = near && all_below(logit[v], 6);
        }
        if (near) [[likely]]
          for (int v = 0; v < vectors; ++v) gradient[v] = kl_gradient<true>(logit[v], log_prior_odds);
        else
          for (int v = 0; v < vectors; ++v) gradient[v] = kl_gradient<false>(logit[v], log_prior_odds);
        for (int v = 0; v < vectors; ++v) {
          const int k = v * L::width;
          const SoftMask<V> soft(logit[v], old_noise[v], inverse_temperature);
          const V scale = L::load(in[4] + k) * L::load(in[3] + k) * inverse_temperature;
          gradient[v] = scale * soft.mask * soft.complement + kl_weight * gradient[v];
        }
        draw(i + kPhiloxGroup);
        for (int v = 0; v < vectors; ++v) {
          const int k = v * L::width;
          const V exp_avg = L::load(in[1] + k) + (gradient[v] - L::load(in[1] + k)) * decay1;
          const V exp_avg_sq = L::load(in[2] + k) * beta2 + gradient[v] * gradient[v] * decay2;
          logit[v] -= step_size * exp_avg / (square_root(exp_avg_sq) * inverse_root2 + eps);
          L::store(out[0] + k, logit[v]);
          L::store(out[1] + k, exp_avg);
          L::store(out[2] + k, exp_avg_sq);
        }
        for (int v = 0; v < vectors; ++v) {
          const int k = v * L::width;
          const SoftMask<V> soft(logit[v], noise[v], inverse_temperature);
          L::store(out[3] + k, soft.mask * L::load(in[3] + k));
        }
      });
}

}  // namespace

void concrete_mask_sample(const ConcreteMaskSample<float>& a, long long begin, long long end) { sample(a, begin, end); }
void concrete_mask_sample(const ConcreteMaskSample<double>& a, long long begin, long long end) { sample(a, begin, end); }
void concrete_mask_gradient(const ConcreteMaskGradient<float>& a, long long begin, long long end) { gradient(a, begin, end); }
void concrete_mask_gradient(const ConcreteMaskGradient<double>& a, long long begin, long long end) { gradient(a, begin, end); }
void concrete_mask_update(const ConcreteMaskUpdate<float>& a, long long begin, long long end) { update(a, begin, end); }
void concrete_mask_update(const ConcreteMaskUpdate<double>& a, long long begin, long long end) { update(a, begin, end); }

}  // namespace sparse_gen::SPARSE_GEN_ISA
