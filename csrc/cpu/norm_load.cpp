#include "norm_load.h"

#include "sums.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

template <class T>
void make_load(const T* x, long long count, const ChannelNorms<T>& norms, double eps, double eps2, Load<T>* load,
               ChannelMoments<T>* found) {
  using V = typename Vector<T>::type;
  const Moments first = moments(x, count);
  found->mean = (T)first.mean;
  found->rstd = (T)(1 / __builtin_sqrt(first.variance + eps));
  const T factor = norms.gamma * found->rstd, shift = norms.beta - found->mean * factor, slope = norms.slope;
  *load = {factor, shift, slope, T(1), T(0)};
  found->mean2 = 0, found->rstd2 = 1;
  if (!norms.has_second) return;
  const Moments second = moments_of<T>(count, [&](long long i) {
    const V z = load_within(x, i, count) * factor + shift;
    return z > 0 ? z : z * slope;
  });
  found->mean2 = (T)second.mean;
  found->rstd2 = (T)(1 / __builtin_sqrt(second.variance + eps2));
  load->factor2 = norms.gamma2 * found->rstd2;
  load->shift2 = norms.beta2 - found->mean2 * load->factor2;
}

template <class T>
void apply(const T* x, T* y, long long count, const Load<T>& load) {
  using V = typename Vector<T>::type;
  for (long long i = 0; i < count; i += kWidth<T>) {
    const V z = load_within(x, i, count) * load.factor + load.shift;
    store_within(y, i, count, (z > 0 ? z : z * load.slope) * load.factor2 + load.shift2);
  }
}

template <class T>
void backward(const T* grad, const T* x, T* grad_x, long long count, const ChannelNorms<T>& norms,
              const ChannelMoments<T>& m, ChannelGradients<T>* result) {
  using V = typename Vector<T>::type;
  const T factor = norms.gamma * m.rstd, shift = norms.beta - m.mean * factor, slope = norms.slope;
  // Gradient behind the first activation: the given one, or what the second normalisation makes of it.
  T factor2 = 1, mean_gradient2 = 0, mean_product2 = 0;
  *result = {};
  if (norms.has_second) {
    double sums[2];
    block_sums<T>(count, sums, [&](long long i, V* term) {
      const V z = load_within(x, i, count) * factor + shift, y = z > 0 ? z : z * slope;
      term[0] = load_within(grad, i, count);
      term[1] = term[0] * ((y - m.mean2) * m.rstd2);
    });
    result->beta2 = (T)sums[0];
    result->gamma2 = (T)sums[1];
    factor2 = norms.gamma2 * m.rstd2;
    mean_gradient2 = (T)(sums[0] / count), mean_product2 = (T)(sums[1] / count);
  }
  const auto gradient_at = [&](long long i, V value) {
    const V z = value * factor + shift, g = load_within(grad, i, count);
    const V y = z > 0 ? z : z * slope;
    const V grad_y = factor2 * (g - mean_gradient2 - (y - m.mean2) * m.rstd2 * mean_product2);
    return z > 0 ? grad_y : grad_y * slope;
  };
  double sums[2];
  block_sums<T>(count, sums, [&](long long i, V* term) {
    const V value = load_within(x, i, count);
    term[0] = gradient_at(i, value);
    term[1] = term[0] * ((value - m.mean) * m.rstd);
  });
  result->beta = (T)sums[0];
  result->gamma = (T)sums[1];
  const T mean_gradient = (T)(sums[0] / count), mean_product = (T)(sums[1] / count);
  for (long long i = 0; i < count; i += kWidth<T>) {
    const V value = load_within(x, i, count);
    store_within(grad_x, i, count,
                 factor * (gradient_at(i, value) - mean_gradient - (value - m.mean) * m.rstd * mean_product));
  }
}

}  // namespace

void norm_load(const float* x, long long count, const ChannelNorms<float>& norms, double eps, double eps2,
               Load<float>* load, ChannelMoments<float>* moments) {
  make_load(x, count, norms, eps, eps2, load, moments);
}
void norm_load(const double* x, long long count, const ChannelNorms<double>& norms, double eps, double eps2,
               Load<double>* load, ChannelMoments<double>* moments) {
  make_load(x, count, norms, eps, eps2, load, moments);
}
void apply_load(const float* x, float* y, long long count, const Load<float>& load) { apply(x, y, count, load); }
void apply_load(const double* x, double* y, long long count, const Load<double>& load) { apply(x, y, count, load); }
void norm_load_backward(const float* grad, const float* x, float* grad_x, long long count,
                        const ChannelNorms<float>& norms, const ChannelMoments<float>& moments,
                        ChannelGradients<float>* result) {
  backward(grad, x, grad_x, count, norms, moments, result);
}
void norm_load_backward(const double* grad, const double* x, double* grad_x, long long count,
                        const ChannelNorms<double>& norms, const ChannelMoments<double>& moments,
                        ChannelGradients<double>* result) {
  backward(grad, x, grad_x, count, norms, moments, result);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
