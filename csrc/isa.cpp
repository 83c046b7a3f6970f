#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>

#include "binding.h"

#if defined(SPARSE_GEN_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparse_gen {

namespace {

#if defined(SPARSE_GEN_AMX) && defined(__linux__)
// AMX beside AVX-512: what the processor has and the system lets this process use.
bool may_use_amx() {
  unsigned a, b, c, d;
  constexpr unsigned kBfloat16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBfloat16 | kTile)) != (kBfloat16 | kTile)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl: Linux asks before it saves 8 KiB more
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#else
bool may_use_amx() { return false; }
#endif

InstructionSet best_instruction_set() {
#if defined(SPARSE_GEN_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return may_use_amx() ? InstructionSet::amx : InstructionSet::avx512;
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
  if (!std::strcmp(wanted, "avx512")) chosen = InstructionSet::avx512;
  return chosen < best ? chosen : best;
}

int64_t instruction_set_in_use() { return (int64_t)instruction_set(); }

}  // namespace sparse_gen

STABLE_TORCH_LIBRARY_IMPL(sparse_gen, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&sparse_gen::instruction_set_in_use));
}
