// Launching a kernel on a stream; included by .cu files alone.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

namespace sparse_gen::cuda {

constexpr const char* kTooManyBlocks = "expected at most 2147483647 blocks, got more: use fewer experiments at once";

// Returns the error in words, or null. Nothing is waited for: the launch can be part of a captured graph.
template <class Kernel, class... Arguments>
const char* launch(Kernel kernel, long long blocks, int threads, void* stream, const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffffLL) return kTooManyBlocks;
  kernel<<<(unsigned)blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// With shared memory whose size only the launch says, since more than 48 KiB must be asked for.
template <class Kernel, class... Arguments>
const char* launch_with(int shared_bytes, Kernel kernel, long long blocks, int threads, void* stream,
                        const Arguments&... arguments) {
  if (blocks == 0) return nullptr;
  if (blocks > 0x7fffffffLL) return kTooManyBlocks;
  const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (refused != cudaSuccess) return cudaGetErrorString(refused);
  kernel<<<(unsigned)blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace sparse_gen::cuda
