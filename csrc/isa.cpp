#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "binding.h"

namespace sparse_gen {

namespace {

InstructionSet best_instruction_set() {
#if defined(SPARSE_GEN_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

}  // namespace

InstructionSet instruction_set() {
  static const InstructionSet best = best_instruction_set();
  // Read at every call, so that a test can compare the sets within one process.
  const char* wanted = std::getenv("SPARSE_GEN_ISA");
  if (!wanted) return best;
  InstructionSet chosen = best;
  if (!std::strcmp(wanted, "baseline")) chosen = InstructionSet::baseline;
  if (!std::strcmp(wanted, "avx2")) chosen = InstructionSet::avx2;
  return chosen < best ? chosen : best;
}

int64_t instruction_set_in_use() { return (int64_t)instruction_set(); }

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&sparse_gen::instruction_set_in_use));
}
