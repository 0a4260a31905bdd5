// Picks the build of the loops that the machine can run. MEDKD_FAST_ISA names another one, for tests and comparisons.
#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace medkd {

namespace portable {
const LoopTable& table();
}
#if defined(MEDKD_X86)
namespace avx2 {
const LoopTable& table();
}
namespace avx512 {
const LoopTable& table();
}
#endif

static const LoopTable& choose() {
#if defined(MEDKD_X86)
  const char* forced = std::getenv("MEDKD_FAST_ISA");
  const bool any = forced == nullptr || *forced == '\0';
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (any || std::strcmp(forced, "avx512") == 0)) return avx512::table();
  if (has_avx2 && (any || std::strcmp(forced, "avx512") == 0 || std::strcmp(forced, "avx2") == 0)) return avx2::table();
#endif
  return portable::table();
}

const LoopTable& loop_table() {
  static const LoopTable& chosen = choose();
  return chosen;
}

}  // namespace medkd
