// Padding by index along one axis, in both directions; in int, which a GPU handles in one instruction.
#pragma once

#include "host_device.h"

namespace sparse_gen::cuda {

enum PaddingMode : int { kZeros = 0, kReflect = 1, kReplicate = 2 };

// The image position that position i, from -padding to length + padding - 1, repeats; -1 for a zero.
SPARSE_GEN_HD int padded_origin(int i, int length, int padding, int mode) {
  if (i >= 0 && i < length) return i;
  if (i < -padding || i >= length + padding || mode == kZeros) return -1;
  if (mode == kReplicate) return i < 0 ? 0 : length - 1;
  return i < 0 ? -i : 2 * (length - 1) - i;
}

// How many padded positions repeat image position i, its own included: reflection repeats what lies within `padding` of
// an end, but not the end itself.
SPARSE_GEN_HD int padded_count(int i, int length, int padding, int mode) {
  if (mode == kZeros) return 1;
  if (mode == kReplicate) return 1 + (i == 0 ? padding : 0) + (i == length - 1 ? padding : 0);
  return 1 + (i > 0 && i <= padding) + (i < length - 1 && i >= length - 1 - padding);
}

// The n-th of them: its own, then those before the image, then those behind it.
SPARSE_GEN_HD int padded_position(int n, int i, int length, int padding, int mode) {
  if (n == 0) return i;
  if (mode == kReplicate) {
    const int before = i == 0 ? padding : 0;
    return n <= before ? -n : length - 1 + n - before;
  }
  return n == 1 && i > 0 && i <= padding ? -i : 2 * (length - 1) - i;
}

}  // namespace sparse_gen::cuda
