// The kernel that adds up partial sums; included by .cu files alone.
#pragma once

#include "chunks.h"
#include "launch.h"

namespace sparse_gen::cuda {

constexpr int kSlices = 16;  // of the chunks, one a warp: a large image has hundreds, and the reads of one are in a row

template <class T>
__global__ void __launch_bounds__(kSlices* kWarp) add_chunks(const T* partial, int chunks, int kept, long long count, T* to) {
  __shared__ double sums[kSlices][kWarp];
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const long long i = (long long)blockIdx.x * kWarp + lane;
  if (i < count)
    sums[slice][lane] = sum_of_chunks(partial + i / kept * chunks * kept + i % kept, slice * chunks / kSlices,
                                      (slice + 1) * chunks / kSlices, kept);
  __syncthreads();
  if (slice || i >= count) return;
  double sum = 0;
  for (int n = 0; n < kSlices; ++n) sum += sums[n][lane];
  to[i] = (T)sum;
}

template <class T>
const char* launch_add_chunks(const T* partial, int chunks, int kept, int experiments, T* to, void* stream) {
  const long long count = (long long)experiments * kept;
  return launch(add_chunks<T>, round_up_quotient(count, (long long)kWarp), kSlices * kWarp, stream, partial, chunks, kept,
                count, to);
}

}  // namespace sparse_gen::cuda
