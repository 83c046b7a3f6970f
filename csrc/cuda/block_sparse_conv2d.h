// Launchers of the block-sparse convolution's CUDA kernels: raw device pointers and a stream. Each returns the CUDA error
// in words, or null.
#pragma once

#include "conv_shape.h"

namespace sparse_gen::cuda {

// Columns, one channel at one tap, of a block of output channels or a part of it ("group"), eight to a step; see
// sparse_gen/ops/block_halo.py. Steps of a phase, a chunk of channels and a group stand together.
struct HaloLists {
  const int* codes;   // (steps · 8,): channel of the chunk << 16 | row << 8 | column of the window
  const int* slots;   // (steps · 8, width): which value is the weight of each channel of the group, -1 for a zero
  const int* starts;  // (phases · chunks · groups + 1,): the first step of each
  int columns, chunk, groups, width, block;
};

// The same for the weights' gradient, sixteen columns to a piece; the pieces of a round are one block's work.
struct HaloRounds {
  const int* codes;   // (pieces · 16,)
  const int* slots;   // (pieces · 16, width)
  const int* pieces;  // (pieces,): the group within its slab
  const int* rounds;  // (4, rounds): slab of groups, chunk of channels, first piece, how many
  int columns, chunk, groups, slab, width, block, count, most;
};

// Numbers of each scratch array for E experiments: packed weights, where columns lie in the tile, and partial sums.
struct HaloScratch {
  long long packed;
  int places;
  long long parts;
};
HaloScratch halo_forward_scratch(const ConvShape&, const HaloLists&);
HaloScratch halo_backward_x_scratch(const ConvShape&, const HaloLists&);
HaloScratch halo_backward_values_scratch(const ConvShape&, const HaloRounds&);

struct HaloBuffers {
  float* packed;
  int* places;
  float* parts;
};

// out (E, out, out_h, out_w) of x (E, in, height, width), values (E, kept) and bias (E, out) or null; on tensor cores in
// TF32, or in float, where groups are of 8 or 16.
const char* block_sparse_conv2d_forward(const ConvShape&, const HaloLists&, const float* x, const float* values,
                                        const float* bias, const HaloBuffers&, bool tf32, float* out, void* stream);

// grad_x, every element of it.
const char* block_sparse_conv2d_backward_x(const ConvShape&, const HaloLists&, const float* grad_out, const float* values,
                                           const HaloBuffers&, bool tf32, float* grad_x, void* stream);

const char* block_sparse_conv2d_backward_values(const ConvShape&, const HaloRounds&, const float* grad_out, const float* x,
                                                const HaloBuffers&, bool tf32, float* grad_values, void* stream);

}  // namespace sparse_gen::cuda
