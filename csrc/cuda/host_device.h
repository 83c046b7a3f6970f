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

// What fixes the layout of a block: consecutive lanes are consecutive pixels.
constexpr int kWarp = 32;

template <class T>
SPARSE_GEN_HD T round_up_quotient(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace sparse_gen::cuda
