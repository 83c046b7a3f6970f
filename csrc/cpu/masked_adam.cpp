#include "masked_adam.h"

#include "vector.h"

namespace sparse_gen::SPARSE_GEN_ISA {

namespace {

inline f32v root(f32v x) { return square_root(x); }

inline Vector<double>::type root(Vector<double>::type x) {
#if defined(__AVX512F__)
  return (Vector<double>::type)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (Vector<double>::type)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
  return (Vector<double>::type)_mm_sqrt_pd((__m128d)x);
#else
  for (int i = 0; i < kWidth<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

// The constants in the element's type, so that every vector sees the same rounded ones.
template <class T>
struct Constants {
  T decay1, decay2, beta2, eps, step_size, inverse_root2;

  explicit Constants(const MaskedAdam<T>& a)
      : decay1((T)(1 - a.beta1)),
        decay2((T)(1 - a.beta2)),
        beta2((T)a.beta2),
        eps((T)a.eps),
        step_size((T)a.step_size),
        inverse_root2((T)(1 / a.root_correction2)) {}
};

template <class T>
inline void step_vector(const Constants<T>& c, T* value, T* average, T* average_sq, const T* grad) {
  using V = typename Vector<T>::type;
  const V g = load_from(grad), m = load_from(average), v = load_from(average_sq);
  const V exp_avg = m + (g - m) * c.decay1;
  const V exp_avg_sq = v * c.beta2 + g * g * c.decay2;
  store_to(value, load_from(value) - c.step_size * exp_avg / (root(exp_avg_sq) * c.inverse_root2 + c.eps));
  store_to(average, exp_avg);
  store_to(average_sq, exp_avg_sq);
}

template <class T>
void step(const MaskedAdam<T>& a, long long begin, long long end) {
  const Constants<T> constants(a);
  // The incomplete last vector goes through a buffer and the same instructions: what a tail loop would round
  // otherwise, an experiment would round otherwise alone than beside others.
  T staged[4][kWidth<T>] = {};
  for (long long i = begin; i < end; i += kWidth<T>) {
    T* at[4] = {a.values + i, a.exp_avg + i, a.exp_avg_sq + i, const_cast<T*>(a.grad) + i};
    const bool whole = end - i >= kWidth<T>;
    if (!whole)
      for (int k = 0; k < 4; ++k) __builtin_memcpy(staged[k], at[k], (end - i) * sizeof(T));
    step_vector(constants, whole ? at[0] : staged[0], whole ? at[1] : staged[1], whole ? at[2] : staged[2],
                whole ? at[3] : staged[3]);
    if (!whole)
      for (int k = 0; k < 3; ++k) __builtin_memcpy(at[k], staged[k], (end - i) * sizeof(T));
  }
}

}  // namespace

void masked_adam(const MaskedAdam<float>& a, long long begin, long long end) { step(a, begin, end); }
void masked_adam(const MaskedAdam<double>& a, long long begin, long long end) { step(a, begin, end); }

}  // namespace sparse_gen::SPARSE_GEN_ISA
