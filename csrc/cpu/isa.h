// The instruction sets a kernel is compiled for. A kernel is declared once, with SPARSE_GEN_DECLARE, and
// called through SPARSE_GEN_DISPATCH, which picks the best set that this machine has.
#pragma once

#if defined(SPARSE_GEN_X86)
#define SPARSE_GEN_DECLARE(...)      \
  namespace baseline { __VA_ARGS__ } \
  namespace avx2 { __VA_ARGS__ }     \
  namespace avx512 { __VA_ARGS__ }
#define SPARSE_GEN_DISPATCH(kernel, ...)           \
  switch (::sparse_gen::instruction_set()) {       \
    case ::sparse_gen::InstructionSet::amx:        \
    case ::sparse_gen::InstructionSet::avx512:     \
      ::sparse_gen::avx512::kernel(__VA_ARGS__);   \
      break;                                       \
    case ::sparse_gen::InstructionSet::avx2:       \
      ::sparse_gen::avx2::kernel(__VA_ARGS__);     \
      break;                                       \
    default:                                       \
      ::sparse_gen::baseline::kernel(__VA_ARGS__); \
  }
#else
#define SPARSE_GEN_DECLARE(...) \
  namespace baseline { __VA_ARGS__ }
#define SPARSE_GEN_DISPATCH(kernel, ...) ::sparse_gen::baseline::kernel(__VA_ARGS__)
#endif

namespace sparse_gen {

enum class InstructionSet { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };

// The best set this machine has, or the one named by the environment variable SPARSE_GEN_ISA if it has that.
InstructionSet instruction_set();

}  // namespace sparse_gen
