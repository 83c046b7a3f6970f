#pragma once

namespace sparse_gen::cuda {

// The shape of one convolution; a plane is one channel of one experiment.
struct ConvShape {
  int experiments, in_channels, height, width, out_channels, kernel_h, kernel_w, stride, padding, mode;
  int kept;  // weights of one experiment

#ifdef __CUDACC__
#define SPARSE_GEN_SHAPE __host__ __device__
#else
#define SPARSE_GEN_SHAPE
#endif
  SPARSE_GEN_SHAPE int out_h() const { return (height + 2 * padding - kernel_h) / stride + 1; }
  SPARSE_GEN_SHAPE int out_w() const { return (width + 2 * padding - kernel_w) / stride + 1; }
  SPARSE_GEN_SHAPE int plane() const { return height * width; }
  SPARSE_GEN_SHAPE int out_plane() const { return out_h() * out_w(); }
  // The stride is 1 or 2; a GPU divides by a number it does not know in some twenty instructions.
  SPARSE_GEN_SHAPE int odd() const { return stride - 1; }
  SPARSE_GEN_SHAPE int halved(int length) const { return (length + odd()) >> odd(); }
#undef SPARSE_GEN_SHAPE
};

}  // namespace sparse_gen::cuda
