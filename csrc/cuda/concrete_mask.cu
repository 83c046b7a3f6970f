#include "concrete_mask.h"

#include <cstdint>

#include "concrete_mask_body.h"
#include "launch.h"

namespace sparse_gen::cuda {

namespace {

constexpr int kMaskThreads = 256;

template <bool kWhole, class Body>
__global__ void __launch_bounds__(kMaskThreads) elementwise(const Body body) {
  const long long i = (long long)blockIdx.x * kMaskThreads + threadIdx.x;
  if (i < body.rows.groups()) body.template run<kWhole>(i);
}

// A block works out the bias corrections once.
template <bool kWhole, class T>
__global__ void __launch_bounds__(kMaskThreads) update(const UpdateBody<T> body) {
  __shared__ AdamStep<T> step;
  if (threadIdx.x == 0) step = AdamStep<T>(body.adam, *body.draw.step);
  __syncthreads();
  const long long i = (long long)blockIdx.x * kMaskThreads + threadIdx.x;
  if (i < body.rows.groups()) body.template run<kWhole>(i, step);
}

// Vectors of four need rows that begin at one; tensors may be views of others.
template <class T, class... Pointers>
bool aligned(const Rows& rows, const Pointers*... pointers) {
  return rows.whole() && (... && (reinterpret_cast<std::uintptr_t>(pointers) % alignof(Four<T>) == 0));
}

template <class Body>
const char* launch_elementwise(const Body& body, bool whole, void* stream) {
  const long long blocks = round_up_quotient(body.rows.groups(), (long long)kMaskThreads);
  return whole ? launch(elementwise<true, Body>, blocks, kMaskThreads, stream, body)
               : launch(elementwise<false, Body>, blocks, kMaskThreads, stream, body);
}

template <class T>
const char* launch_sample(const Sample<T>& a, void* stream) {
  const bool whole = aligned<T>(a.rows, a.logits, a.weight, a.soft_mask, a.masked_weight);
  return launch_elementwise(SampleBody<T>{a}, whole, stream);
}

template <class T>
const char* launch_gradient(const Gradient<T>& a, void* stream) {
  const bool whole = aligned<T>(a.rows, a.grad_soft_mask, a.grad_masked_weight, a.weight, a.soft_mask, a.grad_logits,
                                a.grad_weight);
  return launch_elementwise(GradientBody<T>{a}, whole, stream);
}

template <class T>
const char* launch_update(const Update<T>& a, void* stream) {
  const bool whole = aligned<T>(a.rows, a.logits, a.exp_avg, a.exp_avg_sq, a.masked_weight, a.weight,
                                a.grad_masked_weight);
  const long long blocks = round_up_quotient(a.rows.groups(), (long long)kMaskThreads);
  return whole ? launch(update<true, T>, blocks, kMaskThreads, stream, UpdateBody<T>{a})
               : launch(update<false, T>, blocks, kMaskThreads, stream, UpdateBody<T>{a});
}

}  // namespace

const char* concrete_mask_sample(const Sample<float>& a, void* stream) { return launch_sample(a, stream); }
const char* concrete_mask_sample(const Sample<double>& a, void* stream) { return launch_sample(a, stream); }
const char* concrete_mask_gradient(const Gradient<float>& a, void* stream) { return launch_gradient(a, stream); }
const char* concrete_mask_gradient(const Gradient<double>& a, void* stream) { return launch_gradient(a, stream); }
const char* concrete_mask_update(const Update<float>& a, void* stream) { return launch_update(a, stream); }
const char* concrete_mask_update(const Update<double>& a, void* stream) { return launch_update(a, stream); }

}  // namespace sparse_gen::cuda
