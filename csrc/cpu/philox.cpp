#include "philox.h"

#include "philox_bits.h"

namespace sparse_gen::SPARSE_GEN_ISA {

void philox(int* words, long long seed, long long step, long long stream, long long begin, long long end) {
  const Philox random(seed, step, stream);
  for (long long i = begin; i < end; i += kPhiloxGroup) {
    const PhiloxGroup group = random.group(i);
    const long long count = end - i < kPhiloxGroup ? end - i : kPhiloxGroup;
    __builtin_memcpy(words + (i - begin), &group, count * sizeof(int));
  }
}

}  // namespace sparse_gen::SPARSE_GEN_ISA
