// Tensors of the CPU, whose memory the host reads and writes.
#pragma once

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

}  // namespace medkd
