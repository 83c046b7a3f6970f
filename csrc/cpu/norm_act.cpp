#include "norm_act.h"

#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// Sums are taken in float over this many elements at most, and over those sums in double: a float sum over a whole
// image would lose three digits.
constexpr long long kBlock = 4096;

template <class T>
inline double add_up(typename Vector<T>::type v) {
  double sum = 0;
  for (int lane = 0; lane < kWidth<T>; ++lane) sum += v[lane];
  return sum;
}

// Sums f(i, vector or scalar loader) over count elements; f gives Sums vectors at a time.
template <class T, int Sums, class F>
inline void block_sums(long long count, double (&total)[Sums], F f) {
  using V = typename Vector<T>::type;
  for (double& t : total) t = 0;
  for (long long begin = 0; begin < count; begin += kBlock) {
    const long long end = begin + kBlock < count ? begin + kBlock : count;
    V sum[Sums][4] = {};
    long long i = begin;
    for (; i + 4 * kWidth<T> <= end; i += 4 * kWidth<T>)
      for (int u = 0; u < 4; ++u) {
        V term[Sums];
        f(i + u * kWidth<T>, term);
        for (int s = 0; s < Sums; ++s) sum[s][u] += term[s];
      }
    for (int s = 0; s < Sums; ++s) total[s] += add_up<T>((sum[s][0] + sum[s][1]) + (sum[s][2] + sum[s][3]));
    // What is left of the block goes through a vector of which the rest is cut off.
    for (; i < end; i += kWidth<T>) {
      V term[Sums];
      f(i, term);
      const long long real = end - i < kWidth<T> ? end - i : kWidth<T>;
      for (int s = 0; s < Sums; ++s)
        for (long long lane = 0; lane < real; ++lane) total[s] += term[s][lane];
    }
  }
}

// Loads a vector at i, zeros behind the end.
template <class T>
inline typename Vector<T>::type load_within(const T* p, long long i, long long count) {
  if (i + kWidth<T> <= count) return load_from(p + i);
  typename Vector<T>::type v = {};
  __builtin_memcpy(&v, p + i, (count - i) * sizeof(T));
  return v;
}

template <class T>
inline void store_within(T* p, long long i, long long count, typename Vector<T>::type v) {
  if (i + kWidth<T> <= count)
    store_to(p + i, v);
  else
    __builtin_memcpy(p + i, &v, (count - i) * sizeof(T));
}

template <class T>
void forward(const T* x, T* y, long long count, T gamma, T beta, double eps, double slope, T* mean, T* rstd) {
  using V = typename Vector<T>::type;
  double sum[1], squares[1];
  block_sums<T>(count, sum, [&](long long i, V* term) { term[0] = load_within(x, i, count); });
  const T center = (T)(sum[0] / count);
  // Around the mean, in a second pass: the difference of two large sums would cancel.
  block_sums<T>(count, squares, [&](long long i, V* term) {
    const V d = load_within(x, i, count) - center;
    term[0] = d * d;
  });
  const T scale = (T)(1 / __builtin_sqrt(squares[0] / count + eps));
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
