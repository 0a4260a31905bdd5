// Tensors of the CPU, whose memory the host reads and writes.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../tensor.h"
#include "isa.h"

namespace medkd {

// Memory that a kernel writes and no one else sees.
template <typename T>
std::vector<T> slots(int64_t count) {
  return std::vector<T>(static_cast<std::size_t>(count));
}

template <typename A>
Tensor scalar(const Tensor& like, double value, ScalarType type) {
  Tensor out = new_like(like, {}, type);
  *static_cast<A*>(out.data_ptr()) = static_cast<A>(value);
  return out;
}

// Asks for large pages behind memory that is about to be written for the first time: one fault in place of 512. A system that has
// none to give does as before.
inline void ask_for_large_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const uintptr_t from = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (from + page - 1) & ~(page - 1), end = (from + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

inline Tensor in_large_pages(Tensor x) {
  ask_for_large_pages(x.data_ptr(), x.numel() * static_cast<int64_t>(x.element_size()));
  return x;
}

struct HostGradient : Gradient {
  explicit HostGradient(const Tensor& x) : Gradient(x) { in_large_pages(written); }
};

}  // namespace medkd
