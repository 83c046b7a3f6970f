#include "norm_head.h"

#include "sums.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

// The affine map of one channel and what its activation does.
template <class T>
struct Channel {
  T factor, shift, slope;

  Channel(const Head<T>& h, long long c)
      : factor(h.gamma[c] * h.rstd[c]), shift(h.beta[c] - h.mean[c] * factor), slope(h.slope) {}
};

template <class T, int Outputs>
inline void load_weights(const Head<T>& h, long long c, T (&weight)[Outputs]) {
#pragma GCC unroll 4
  for (int o = 0; o < Outputs; ++o) weight[o] = h.weight[o * h.channels + c];
}

// Channel by channel over a few pixels: planes of a power of two lie in one set of the cache, and reading all of them
// pixel by pixel would drive each other out.
constexpr long long kStrip = 512;

template <class T, int Outputs>
void forward(const Head<T>& h, const T* bias, T* out, long long begin, long long end) {
  using V = typename Vector<T>::type;
  V sum[Outputs][kStrip / kWidth<T>];
  for (long long first = begin; first < end; first += kStrip) {
    const long long length = end - first < kStrip ? end - first : kStrip;
    const long long vectors = (length + kWidth<T> - 1) / kWidth<T>;
    for (int o = 0; o < Outputs; ++o)
      for (long long v = 0; v < vectors; ++v) sum[o][v] = V{} + (bias ? bias[o] : T(0));
    for (long long c = 0; c < h.channels; ++c) {
      const Channel<T> channel(h, c);
      T weight[Outputs];
      load_weights(h, c, weight);
      const T* x = h.x + c * h.count;
      for (long long v = 0; v < vectors; ++v) {
        const V z = load_within(x, first + v * kWidth<T>, h.count) * channel.factor + channel.shift;
        const V y = z > 0 ? z : z * channel.slope;
#pragma GCC unroll 4
        for (int o = 0; o < Outputs; ++o) sum[o][v] += weight[o] * y;
      }
    }
    for (int o = 0; o < Outputs; ++o)
      for (long long v = 0; v < vectors; ++v) store_within(out + o * h.count, first + v * kWidth<T>, h.count, sum[o][v]);
  }
}

// The gradient behind the activation of one channel, from those of the outputs.
template <class T, int Outputs>
inline typename Vector<T>::type gradient_at(const typename Vector<T>::type (&g)[Outputs], const T (&weight)[Outputs]) {
  typename Vector<T>::type sum = g[0] * weight[0];
#pragma GCC unroll 4
  for (int o = 1; o < Outputs; ++o) sum += g[o] * weight[o];
  return sum;
}

template <class T, int Outputs>
inline void load_gradients(const Head<T>& h, const T* grad_out, long long i, typename Vector<T>::type (&g)[Outputs]) {
#pragma GCC unroll 4
  for (int o = 0; o < Outputs; ++o) g[o] = load_within(grad_out + o * h.count, i, h.count);
}

template <class T, int Outputs>
void sums(const Head<T>& h, const T* grad_out, double* result, long long begin, long long end) {
  using V = typename Vector<T>::type;
  for (long long c = 0; c < h.channels; ++c) {
    const Channel<T> channel(h, c);
    const T mean = h.mean[c], rstd = h.rstd[c];
    T weight[Outputs];
    load_weights(h, c, weight);
    const T* x = h.x + c * h.count;
    // Pixels behind the end have gradients of zero, so that nothing of them is added.
    V sum[Outputs + 2] = {};
    for (long long i = begin; i < end; i += kWidth<T>) {
      V g[Outputs];
      load_gradients(h, grad_out, i, g);
      const V value = load_within(x, i, h.count), z = value * channel.factor + channel.shift;
      const V grad_y = gradient_at<T>(g, weight), grad_z = z > 0 ? grad_y : grad_y * channel.slope;
      sum[0] += grad_z;
      sum[1] += grad_z * ((value - mean) * rstd);
      const V y = z > 0 ? z : z * channel.slope;
#pragma GCC unroll 4
      for (int o = 0; o < Outputs; ++o) sum[2 + o] += g[o] * y;
    }
    for (int s = 0; s < Outputs + 2; ++s) result[c * (Outputs + 2) + s] = add_up<T>(sum[s]);
  }
}

template <class T, int Outputs>
void gradient(const Head<T>& h, const T* grad_out, const double* sums, T* grad_x, long long begin, long long end) {
  using V = typename Vector<T>::type;
  for (long long c = 0; c < h.channels; ++c) {
    const Channel<T> channel(h, c);
    const T mean = h.mean[c], rstd = h.rstd[c];
    const T mean_gradient = (T)(sums[2 * c] / h.count), mean_product = (T)(sums[2 * c + 1] / h.count);
    T weight[Outputs];
    load_weights(h, c, weight);
    const T* x = h.x + c * h.count;
    for (long long i = begin; i < end; i += kWidth<T>) {
      V g[Outputs];
      load_gradients(h, grad_out, i, g);
      const V value = load_within(x, i, h.count), z = value * channel.factor + channel.shift;
      const V grad_y = gradient_at<T>(g, weight);
      const V grad_z = z > 0 ? grad_y : grad_y * channel.slope;
      store_within(grad_x + c * h.count, i, h.count,
                   channel.factor * (grad_z - mean_gradient - (value - mean) * rstd * mean_product));
    }
  }
}

template <class T>
void write_moments(const T* x, long long count, double eps, T* mean, T* rstd) {
  const Moments found = moments(x, count);
  *mean = (T)found.mean;
  *rstd = (T)(1 / __builtin_sqrt(found.variance + eps));
}

}  // namespace

// Calls one of the templates above by the number of outputs.
#define SPARSE_GEN_BY_OUTPUTS(function, T, ...)       \
  switch (h.outputs) {                                \
    case 1: return function<T, 1>(h, __VA_ARGS__);    \
    case 2: return function<T, 2>(h, __VA_ARGS__);    \
    case 3: return function<T, 3>(h, __VA_ARGS__);    \
    default: return function<T, 4>(h, __VA_ARGS__);   \
  }

void norm_moments(const float* x, long long count, double eps, float* mean, float* rstd) {
  write_moments(x, count, eps, mean, rstd);
}
void norm_moments(const double* x, long long count, double eps, double* mean, double* rstd) {
  write_moments(x, count, eps, mean, rstd);
}
void norm_head(const Head<float>& h, const float* bias, float* out, long long begin, long long end) {
  SPARSE_GEN_BY_OUTPUTS(forward, float, bias, out, begin, end)
}
void norm_head(const Head<double>& h, const double* bias, double* out, long long begin, long long end) {
  SPARSE_GEN_BY_OUTPUTS(forward, double, bias, out, begin, end)
}
void norm_head_sums(const Head<float>& h, const float* grad_out, double* result, long long begin, long long end) {
  SPARSE_GEN_BY_OUTPUTS(sums, float, grad_out, result, begin, end)
}
void norm_head_sums(const Head<double>& h, const double* grad_out, double* result, long long begin, long long end) {
  SPARSE_GEN_BY_OUTPUTS(sums, double, grad_out, result, begin, end)
}
void norm_head_gradient(const Head<float>& h, const float* grad_out, const double* sums, float* grad_x, long long begin,
                        long long end) {
  SPARSE_GEN_BY_OUTPUTS(gradient, float, grad_out, sums, grad_x, begin, end)
}
void norm_head_gradient(const Head<double>& h, const double* grad_out, const double* sums, double* grad_x,
                        long long begin, long long end) {
  SPARSE_GEN_BY_OUTPUTS(gradient, double, grad_out, sums, grad_x, begin, end)
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
