// Which instruction set's table is in use.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "../check.h"

namespace qk {
namespace {

struct Isa {
  const char* name;
  const Kernels* table;
  bool available;
};

// Best first. A set counts only when every extension that its files are compiled for is there.
const Isa* all(int* count) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(QK_EMULATE_AVX512)
  // This build has no other set: it is there to run one where the CPU lacks it.
  static const bool avx512 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                             __builtin_cpu_supports("f16c");
  static const Isa sets[] = {{"avx512", &avx512::table, avx512}};
#else
  static const bool avx512 =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512vnni");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                           __builtin_cpu_supports("f16c");
  static const Isa sets[] = {{"avx512", &avx512::table, avx512},
                             {"avx2", &avx2::table, avx2},
                             {"scalar", &scalar::table, true}};
#endif
#else
  static const Isa sets[] = {{"scalar", &scalar::table, true}};
#endif
  *count = int(sizeof sets / sizeof sets[0]);
  return sets;
}

std::string available() {
  int n;
  const Isa* sets = all(&n);
  std::string names;
  for (int i = 0; i < n; i++)
    if (sets[i].available) names += (names.empty() ? "" : ", ") + std::string(sets[i].name);
  return names;
}

const Kernels* named(const std::string& name, const char* who) {
  int n;
  const Isa* sets = all(&n);
  for (int i = 0; i < n; i++)
    if (sets[i].available && (name.empty() || name == "auto" || name == sets[i].name))
      return sets[i].table;
  fail(who, "\"", name,
       "\" is not an instruction set that this CPU and build have; it has: ", available());
}

std::atomic<const Kernels*> current{nullptr};

// set_cpu_isa(str name) -> str: name "" or "auto" picks the best. Returns the one now in use.
std::string set_cpu_isa(std::string name) {
  const Kernels* table = named(name, "set_cpu_isa");
  current.store(table);
  return table->name;
}
std::string cpu_isa() { return kernels().name; }
std::string cpu_isas() { return available(); }

STABLE_TORCH_LIBRARY_IMPL(QK_OPS, CompositeExplicitAutograd, m) {
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
}

}  // namespace

const Kernels& kernels() {
  const Kernels* table = current.load(std::memory_order_acquire);
  if (!table) {
    const char* forced = std::getenv("QKERNELS_CPU_ISA");
    table = named(forced ? forced : "", "QKERNELS_CPU_ISA");
    current.store(table, std::memory_order_release);
  }
  return *table;
}

}  // namespace qk
