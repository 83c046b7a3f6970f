// Philox-4x32-10, as sparse_gen/ops/philox.py defines the random numbers.
#pragma once

#include "host_device.h"

namespace sparse_gen::cuda {

struct Words {
  unsigned word[4];
};

// The words of indices 4 · group .. 4 · group + 3.
SPARSE_GEN_HD Words philox(long long seed, long long step, long long stream, long long group) {
  unsigned c0 = (unsigned)group, c1 = (unsigned)step, c2 = (unsigned)stream, c3 = 0;
  unsigned k0 = (unsigned)seed, k1 = (unsigned)((unsigned long long)seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const unsigned long long product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
    c0 = (unsigned)(product1 >> 32) ^ c1 ^ k0;
    c1 = (unsigned)product1;
    c2 = (unsigned)(product0 >> 32) ^ c3 ^ k1;
    c3 = (unsigned)product0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// A word as a number strictly between 0 and 1; it and 1 minus it are exact.
SPARSE_GEN_HD float uniform(unsigned word) { return ((float)(word >> 9) + 0.5f) * 0x1p-23f; }

}  // namespace sparse_gen::cuda
