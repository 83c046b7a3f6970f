// Index arithmetic and per-thread bodies are written once for both sides: without a GPU the tests run them on the host,
// block by block and thread by thread.
#pragma once

#ifdef __CUDACC__
#define SPARSE_GEN_HD __host__ __device__ inline
#else
#define SPARSE_GEN_HD inline
#endif

#ifdef __CUDA_ARCH__
#define SPARSE_GEN_UNROLL _Pragma("unroll")
#define SPARSE_GEN_ROLLED _Pragma("unroll 1")
#else
#define SPARSE_GEN_UNROLL
#define SPARSE_GEN_ROLLED
#endif

namespace sparse_gen::cuda {

// A read through the cache for data that nobody writes while the kernel runs.
template <class T>
SPARSE_GEN_HD T read(const T* from) {
#ifdef __CUDA_ARCH__
  return __ldg(from);
#else
  return *from;
#endif
}

// Four in a row that begin at a multiple of four, in one load.
SPARSE_GEN_HD void read_four(const float* from, float (&to)[4]) {
#ifdef __CUDA_ARCH__
  const float4 four = __ldg(reinterpret_cast<const float4*>(from));
  to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
#else
  for (int n = 0; n < 4; ++n) to[n] = from[n];
#endif
}

// What fixes the layout of a block: consecutive lanes are consecutive pixels.
constexpr int kWarp = 32;

template <class T>
SPARSE_GEN_HD T round_up_quotient(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace sparse_gen::cuda
