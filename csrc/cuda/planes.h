// Elements of planes of any type and layout, in the type of the arithmetic.
#pragma once

#include "../types.h"
#include "launch.h"

namespace medkd {

// f(T()) with the type that x has: one branch around a whole batch of loads, so that they are all on their way before the
// first is waited for. Float64 is there only when the arithmetic is double.
template <typename A, typename F>
__device__ __forceinline__ void with_type(Type type, const F& f) {
  switch (type) {
    case Type::bfloat16: f(BFloat16()); break;
    case Type::float16: f(Float16()); break;
    case Type::float64:
      if (sizeof(A) == sizeof(double)) f(double());
      break;
    default: f(float());
  }
}

template <typename A>
__device__ __forceinline__ void store_element(const Planes& x, int64_t offset, A value) {
  with_type<A>(x.type, [&](auto zero) { narrow(value, static_cast<decltype(zero)*>(x.data)[offset]); });
}

__device__ __forceinline__ int64_t offset_of(const Planes& x, int64_t image, int64_t pixel) {
  return image * x.stride_b + pixel * x.stride_n;
}

}  // namespace medkd
