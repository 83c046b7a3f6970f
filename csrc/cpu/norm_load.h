#pragma once

#include "isa.h"

namespace sparse_gen {

// What a reader applies to one channel: factor2 * LeakyReLU(factor * x + shift) + shift2.
template <class T>
struct Load {
  T factor, shift, slope, factor2, shift2;
};

// One channel's normalisation, and a second one behind its activation where has_second.
template <class T>
struct ChannelNorms {
  T gamma, beta, slope;
  bool has_second;
  T gamma2, beta2;
};

template <class T>
struct ChannelMoments {
  T mean, rstd, mean2, rstd2;
};

template <class T>
struct ChannelGradients {
  T gamma, beta, gamma2, beta2;
};

// clang-format off
SPARSE_GEN_DECLARE(
  // The load of one channel of `count` pixels, from its own statistics.
  void norm_load(const float* x, long long count, const ChannelNorms<float>&, double eps, double eps2, Load<float>* load,
                 ChannelMoments<float>* moments);
  void norm_load(const double* x, long long count, const ChannelNorms<double>&, double eps, double eps2, Load<double>* load,
                 ChannelMoments<double>* moments);

  // What a reader sees of `count` pixels of a channel.
  void apply_load(const float* x, float* y, long long count, const Load<float>&);
  void apply_load(const double* x, double* y, long long count, const Load<double>&);

  // Its gradients from that of what the reader saw; grad_x may be grad.
  void norm_load_backward(const float* grad, const float* x, float* grad_x, long long count, const ChannelNorms<float>&,
                          const ChannelMoments<float>&, ChannelGradients<float>*);
  void norm_load_backward(const double* grad, const double* x, double* grad_x, long long count, const ChannelNorms<double>&,
                          const ChannelMoments<double>&, ChannelGradients<double>*);
)
// clang-format on

}  // namespace sparse_gen
