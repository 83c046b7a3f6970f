// What the bindings in this folder share: the tensors' device and its current stream, through torch's C shim.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "binding.h"

namespace sparse_gen {

// Makes a tensor's device the current one for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_));
  }

  void* stream() const { return stream_; }

  // Kernels read these on the device: an address of the host would end the process's use of the GPU.
  template <class... Tensors>
  void expect_here(const char* what, const Tensors&... tensors) const {
    const bool here = (... && (tensors.is_cuda() && tensors.get_device_index() == index_));
    STD_TORCH_CHECK(here, "expected ", what, " on the images' CUDA device, got another device: move them there");
  }

  static void check(const char* error) { STD_TORCH_CHECK(!error, "a CUDA kernel could not be launched: ", error); }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

// int64_t is long on Linux, and kernels say long long.
inline const long long* integers(const Tensor& tensor) {
  static_assert(sizeof(long long) == sizeof(int64_t));
  return reinterpret_cast<const long long*>(tensor.const_data_ptr<int64_t>());
}

}  // namespace sparse_gen
