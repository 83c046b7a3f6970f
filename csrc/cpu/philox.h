#pragma once

#include "isa.h"

namespace sparse_gen {

// clang-format off
SPARSE_GEN_DECLARE(
  // words[i - begin] = the random word of index i, for begin <= i < end; begin is a multiple of 4.
  void philox(int* words, long long seed, long long step, long long stream, long long begin, long long end);
)
// clang-format on

}  // namespace sparse_gen
