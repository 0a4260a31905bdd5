// |x|^p and its slope, for attention_map. Derivation: medkd_fast/reference/attention_map.py.
#pragma once

#include "elementary.h"

namespace medkd {
namespace MEDKD_ISA {

template <typename A>
struct FirstPower {
  MEDKD_INLINE A value(A x) const { return absolute(x); }
  MEDKD_INLINE A slope(A x) const { return x > A(0) ? A(1) : x < A(0) ? A(-1) : x; }
};

template <typename A>
struct SecondPower {
  MEDKD_INLINE A value(A x) const { return x * x; }
  MEDKD_INLINE A slope(A x) const { return A(2) * x; }
};

template <typename A>
struct FourthPower {
  MEDKD_INLINE A value(A x) const { return (x * x) * (x * x); }
  MEDKD_INLINE A slope(A x) const { return A(4) * x * x * x; }
};

template <typename A>
struct AnyPower {
  A power;
  MEDKD_INLINE A value(A x) const { return raised(absolute(x), power); }
  MEDKD_INLINE A slope(A x) const {
    const A magnitude = power * raised(absolute(x), power - A(1));
    return x > A(0) ? magnitude : x < A(0) ? -magnitude : x;
  }

 private:
  MEDKD_INLINE static float raised(float x, float p) { return powf(x, p); }
#if MEDKD_DEVICE_CODE  // pow is a function there, whose calls would spill registers
  MEDKD_INLINE static double raised(double x, double p) { return x == 0 ? 0.0 : exp2(p * log2(x)); }
#else
  MEDKD_INLINE static double raised(double x, double p) { return pow(x, p); }
#endif
};

// f(the power): so that a loop over pixels has no branch.
template <typename A, typename F>
MEDKD_INLINE void with_power(double power, const F& f) {
  if (power == 1) f(FirstPower<A>{});
  else if (power == 2) f(SecondPower<A>{});
  else if (power == 4) f(FourthPower<A>{});
  else f(AnyPower<A>{static_cast<A>(power)});
}

// The gradient of an image's features is factor (v - q <v, q>) slope(scale x). The scale, a power of two near the root of
// 1 / norm, keeps slope and factor in float's range where x is far from 1. Below the square, slopes change less than x does.
struct AttentionSlope {
  double scale, factor;
};

MEDKD_INLINE AttentionSlope attention_slope(double norm, double power) {
  if (norm == 0) return {1, 0};
  double exponent = power < 2 ? 0.0 : rint(-log2(norm) / power);
  exponent = exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
  // multiplied from the left, lest something overflow on the way
  return {exp2(exponent), exp2(-exponent * (power - 1)) / norm};
}

}  // namespace MEDKD_ISA
}  // namespace medkd
