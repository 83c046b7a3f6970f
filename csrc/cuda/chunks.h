// Adding up partial sums (E, chunks, kept) in a fixed order.
#pragma once

#include "host_device.h"

namespace sparse_gen::cuda {

// Of one weight, chunks first .. last - 1; in double, which costs nothing beside the reads.
template <class T>
SPARSE_GEN_HD double sum_of_chunks(const T* partial, int first, int last, int kept) {
  double sum = 0;
  for (int chunk = first; chunk < last; ++chunk) sum += read(partial + (long long)chunk * kept);
  return sum;
}

}  // namespace sparse_gen::cuda
