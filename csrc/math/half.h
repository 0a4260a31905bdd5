// Half precision as bits in memory: widened when loaded, rounded to nearest even when stored.
//
// On the host by integer arithmetic that vectorises; on the device by the instructions that there are.
#pragma once

#include "elementary.h"

namespace medkd {
namespace MEDKD_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

MEDKD_INLINE float widen(float x) { return x; }
MEDKD_INLINE double widen(double x) { return x; }
MEDKD_INLINE float widen(BFloat16 x) {
  return float_from_bits(static_cast<int32_t>(static_cast<uint32_t>(x.bits) << 16));
}
MEDKD_INLINE float widen(Float16 x) {
#if MEDKD_DEVICE_CODE
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  const int32_t magnitude = (x.bits & 0x7fff) << 13;
  const int32_t sign = (x.bits & 0x8000) << 16;
  const float finite = float_from_bits(magnitude) * 5.192296858534828e33f;  // 2^112 moves the exponent's bias
  const int32_t special = magnitude | 0x7f800000;                           // infinity and NaN
  const int32_t bits = (x.bits & 0x7c00) == 0x7c00 ? special : bits_from_float(finite);
  return float_from_bits(bits | sign);
#endif
}

MEDKD_INLINE void narrow(float x, float& out) { out = x; }
MEDKD_INLINE void narrow(float x, double& out) { out = x; }
MEDKD_INLINE void narrow(double x, double& out) { out = x; }
MEDKD_INLINE void narrow(double x, float& out) { out = static_cast<float>(x); }
MEDKD_INLINE void narrow(float x, BFloat16& out) {  // to nearest, ties to even
#if MEDKD_DEVICE_CODE
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t bits = static_cast<uint32_t>(bits_from_float(x));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
#endif
}
MEDKD_INLINE void narrow(float x, Float16& out) {  // to nearest, ties to even
#if MEDKD_DEVICE_CODE
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
  const uint32_t bits = static_cast<uint32_t>(bits_from_float(x));
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: rebias and round on the dropped 13 bits. Subnormal ones: adding 0.5 aligns the last bit with 2^-24.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const float aligned = float_from_bits(static_cast<int32_t>(magnitude)) + 0.5f;
  const uint32_t subnormal = static_cast<uint32_t>(bits_from_float(aligned)) - 0x3f000000u;
  uint32_t result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? 0x7c00u : result;
  result = magnitude > 0x7f800000u ? 0x7e00u : result;
  out.bits = static_cast<uint16_t>(result | ((bits >> 16) & 0x8000u));
#endif
}
MEDKD_INLINE void narrow(double x, BFloat16& out) { narrow(static_cast<float>(x), out); }
MEDKD_INLINE void narrow(double x, Float16& out) { narrow(static_cast<float>(x), out); }

}  // namespace MEDKD_ISA
}  // namespace medkd
