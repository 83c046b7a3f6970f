// Memory that a thread keeps between calls: fresh pages for every call cost as much as a small convolution.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "binding.h"

namespace sparse_gen {

// At least `count` elements, 64-byte aligned, uninitialised; what `slot` held before is gone.
template <class T>
T* scratch(int slot, int64_t count) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  constexpr int kSlots = 8;
  static thread_local std::unique_ptr<void, Free> memory[kSlots];
  static thread_local size_t capacity[kSlots] = {};
  const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
  if (bytes > capacity[slot]) {
    memory[slot].reset(std::aligned_alloc(64, bytes));
    STD_TORCH_CHECK(memory[slot], "expected ", bytes, " bytes of memory for a sparse convolution, got none");
    capacity[slot] = bytes;
  }
  return static_cast<T*>(memory[slot].get());
}

}  // namespace sparse_gen
