#include "norm_act.h"

#include "sums.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

template <class T>
void forward(const T* x, T* y, long long count, T gamma, T beta, double eps, double slope, T* mean, T* rstd) {
  using V = typename Vector<T>::type;
  const Moments found = moments(x, count);
  const T center = (T)found.mean, scale = (T)(1 / __builtin_sqrt(found.variance + eps));
  *mean = center;
  *rstd = scale;
  const T factor = gamma * scale, shift = beta - center * factor, negative = (T)slope;
  for (long long i = 0; i < count; i += kWidth<T>) {
    const V z = load_within(x, i, count) * factor + shift;
    store_within(y, i, count, z > 0 ? z : z * negative);
  }
}

template <class T>
void backward(const T* grad_y, const T* x, T* grad_x, long long count, T gamma, T beta, T mean, T rstd, double slope,
              T* grad_gamma, T* grad_beta) {
  using V = typename Vector<T>::type;
  const T factor = gamma * rstd, shift = beta - mean * factor, negative = (T)slope;
  double sums[2];
  const auto through_activation = [&](V g, V value) {
    const V z = value * factor + shift;
    return z > 0 ? g : g * negative;
  };
  block_sums<T>(count, sums, [&](long long i, V* term) {
    const V value = load_within(x, i, count);
    term[0] = through_activation(load_within(grad_y, i, count), value);
    term[1] = term[0] * ((value - mean) * rstd);
  });
  *grad_beta = (T)sums[0];
  *grad_gamma = (T)sums[1];
  const T mean_gradient = (T)(sums[0] / count), mean_product = (T)(sums[1] / count);
  for (long long i = 0; i < count; i += kWidth<T>) {
    const V value = load_within(x, i, count);
    const V g = through_activation(load_within(grad_y, i, count), value);
    store_within(grad_x, i, count, factor * (g - mean_gradient - (value - mean) * rstd * mean_product));
  }
}

}  // namespace

void norm_act(const float* x, float* y, long long count, float gamma, float beta, double eps, double slope, float* mean,
              float* rstd) {
  forward(x, y, count, gamma, beta, eps, slope, mean, rstd);
}
void norm_act(const double* x, double* y, long long count, double gamma, double beta, double eps, double slope,
              double* mean, double* rstd) {
  forward(x, y, count, gamma, beta, eps, slope, mean, rstd);
}
void norm_act_backward(const float* grad_y, const float* x, float* grad_x, long long count, float gamma, float beta,
                       float mean, float rstd, double slope, float* grad_gamma, float* grad_beta) {
  backward(grad_y, x, grad_x, count, gamma, beta, mean, rstd, slope, grad_gamma, grad_beta);
}
void norm_act_backward(const double* grad_y, const double* x, double* grad_x, long long count, double gamma,
                       double beta, double mean, double rstd, double slope, double* grad_gamma, double* grad_beta) {
  backward(grad_y, x, grad_x, count, gamma, beta, mean, rstd, slope, grad_gamma, grad_beta);
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
