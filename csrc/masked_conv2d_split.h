#pragma once

#include "masked_conv2d.h"
#include "split_weight.h"

namespace sparse_gen {

// The gradient by x on AMX tiles.
void split_backward_x(const TileConvolution&, const float* grad_out, const float* weight, float* grad_x);

}  // namespace sparse_gen
