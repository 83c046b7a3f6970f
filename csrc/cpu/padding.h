// Where padded positions come from, and kinds of up-sampling. Plain integers, the same in every instruction set.
#pragma once

namespace sparse_gen {

enum PaddingMode : long long { kPadZeros = 0, kPadReflect = 1, kPadReplicate = 2 };
// Places in ops/convolution.py's UPSAMPLE.
enum Upsampling : long long { kNearest = 1, kBilinear = 2, kBilinearCorners = 3 };

namespace {

// The position inside an axis of `length` that position i, from -padding to length + padding - 1, repeats; -1 for a
// zero (and for positions beyond the padding, which no convolution uses).
inline long long padded_origin(long long i, long long length, long long padding, long long mode) {
  if (i >= 0 && i < length) return i;
  if (i < -padding || i >= length + padding) return -1;
  if (mode == kPadReplicate) return i < 0 ? 0 : length - 1;
  if (mode == kPadReflect) return i < 0 ? -i : 2 * (length - 1) - i;
  return -1;
}

}  // namespace

}  // namespace sparse_gen
