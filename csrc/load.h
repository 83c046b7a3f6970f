// How the bindings of convolutions read their input: as it is, or through a load a channel (csrc/cpu/norm_load.h).
#pragma once

#include <cstring>
#include <optional>

#include "binding.h"
#include "cpu/norm_load.h"

namespace sparse_gen {

// One experiment's loads from (E, C, 5), or null.
template <class T>
const Load<T>* loads_of(const std::optional<Tensor>& load, int64_t experiment) {
  if (!load) return nullptr;
  return reinterpret_cast<const Load<T>*>(load->const_data_ptr<T>()) + experiment * load->size(1);
}

// `count` pixels of a channel, through its load where there is one.
template <class T>
void read_pixels(const T* from, T* to, int64_t count, const Load<T>* load) {
  if (load)
    SPARSE_GEN_DISPATCH(apply_load, from, to, count, *load)
  else
    std::memcpy(to, from, count * sizeof(T));
}

}  // namespace sparse_gen
