// How a warp multiplies small matrices: on tensor cores in TF32, or thread by thread in float.
#pragma once

#include <cstring>

#include "host_device.h"

namespace sparse_gen::cuda {

// The product of 16 × 8 and 8 × 8 numbers that 32 lanes hold together, as mma.sync.m16n8k8 lays them out: with
// g = lane / 4 and t = lane % 4, a lane has a[g][t], a[g + 8][t], a[g][t + 4], a[g + 8][t + 4], then b[t][g], b[t + 4][g],
// and of the sum [g][2t], [g][2t + 1], [g + 8][2t], [g + 8][2t + 1].
struct TensorCores {
  static constexpr bool kByWarp = true;

  // To the nearest number with 10 bits behind the point; the tensor cores would cut the others off.
  SPARSE_GEN_HD static float rounded(float value) {
    unsigned bits;
#ifdef __CUDA_ARCH__
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else
    std::memcpy(&bits, &value, sizeof bits);
    if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & ~0x1fffu;
#endif
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

#ifdef __CUDACC__
  __device__ static void multiply(const float (&a)[4], const float (&b)[2], float* sum) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
          "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
  }
#endif
};

struct ThreadByThread {
  static constexpr bool kByWarp = false;
  SPARSE_GEN_HD static float rounded(float value) { return value; }
};

}  // namespace sparse_gen::cuda
