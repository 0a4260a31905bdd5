// Elementary functions that the per-pixel mathematics is written with, for host and device.
//
// The host versions for float are branch-free polynomials, so that a loop over pixels vectorises without
// -ffast-math; infinities and NaN keep their meaning. On the device and for double they are the library's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MEDKD_INLINE __host__ __device__ __forceinline__
#else
#define MEDKD_INLINE inline __attribute__((always_inline))
#endif

#if defined(__CUDA_ARCH__)
#define MEDKD_DEVICE_CODE 1
#else
#define MEDKD_DEVICE_CODE 0
#endif

// The CPU loops are compiled once for every instruction set, each in a namespace of its own: an inline function
// shared between them could be linked in a version that the machine does not have.
#if !defined(MEDKD_ISA)
#define MEDKD_ISA portable
#endif

namespace medkd {
namespace MEDKD_ISA {

template <typename T>
MEDKD_INLINE T infinity() {
  return static_cast<T>(__builtin_huge_val());
}

MEDKD_INLINE float absolute(float x) { return __builtin_fabsf(x); }
MEDKD_INLINE double absolute(double x) { return __builtin_fabs(x); }

// The larger of x and `least`; `least` where x is no number.
template <typename A>
MEDKD_INLINE A at_least(A x, A least) {
#if MEDKD_DEVICE_CODE
  return fmax(x, least);
#else
  return x > least ? x : least;
#endif
}

MEDKD_INLINE float float_from_bits(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

MEDKD_INLINE int32_t bits_from_float(float x) {
  int32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

// e^x for x <= 0 (shifted logits). Values below 2^-126 are 0. Error below 1.5 ulp.
MEDKD_INLINE float exp_nonpositive(float x) {
#if MEDKD_DEVICE_CODE
  return expf(x);
#else
  // x = k ln 2 + r with |r| <= ln 2 / 2; adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const float shifter = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + shifter;
  const float k = shifted - shifter;
  float r = x - k * 0.693145751953125f;
  r = r - k * 1.42860682030941723e-6f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const uint32_t exponent = static_cast<uint32_t>(bits_from_float(shifted)) + 127u;
  const float scaled = p * float_from_bits(static_cast<int32_t>(exponent << 23));
  return x < -87.3f ? 0.0f : scaled;
#endif
}
MEDKD_INLINE double exp_nonpositive(double x) { return exp(x); }

// 2^x for x <= 0: one instruction on the device, with an error of 2 ulp. To multiply logits by log2(e), where they are
// divided by the temperature anyway, costs nothing more.
MEDKD_INLINE float exp2_nonpositive(float x) {
#if MEDKD_DEVICE_CODE
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}
MEDKD_INLINE double exp2_nonpositive(double x) { return exp2(x); }

// log x for x >= 0: log 0 is -infinity, log infinity is infinity. Subnormal x counts as the smallest normal number.
MEDKD_INLINE float log_nonnegative(float x) {
#if MEDKD_DEVICE_CODE
  return logf(x);
#else
  // x = 2^k m with m in [sqrt 1/2, sqrt 2), f = m - 1. No division: beside the polynomial's products it would be the
  // slowest part.
  const float normal = x < 1.17549435e-38f ? 1.17549435e-38f : x;
  const int32_t bits = bits_from_float(normal);
  const int32_t offset = bits - 0x3f3504f3;
  const float k = static_cast<float>(offset >> 23);
  const float f = float_from_bits((offset & 0x007fffff) + 0x3f3504f3) - 1.0f;
  const float ff = f * f;
  // log m = f - f^2 / 2 + f^3 p(f), so that a small f loses nothing. Coefficients: minimax, as in Cephes' logf.
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float log_m = f + (p * f - 0.5f) * ff;
  float result = k * 0.693145751953125f + (k * 1.42860682030941723e-6f + log_m);
  result = x == 0.0f ? -infinity<float>() : result;
  return x < infinity<float>() ? result : x;  // infinity and NaN are their own logarithms
#endif
}
MEDKD_INLINE double log_nonnegative(double x) { return log(x); }

// 1 / x and log2 x for x that are no smaller than 1, or 0, whose logarithm is -infinity: one instruction each on the device,
// with errors of 1 ulp, and of 2^-22 near 1. A quotient that must be 1 for equal numbers is not made of the first.
MEDKD_INLINE float near_reciprocal(float x) {
#if MEDKD_DEVICE_CODE
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return 1.0f / x;
#endif
}
MEDKD_INLINE double near_reciprocal(double x) { return 1 / x; }

// a / b, on the device with an error of 2 ulp.
MEDKD_INLINE float quotient(float a, float b) {
#if MEDKD_DEVICE_CODE
  return a * near_reciprocal(b);
#else
  return a / b;
#endif
}

MEDKD_INLINE float near_log2(float x) {
#if MEDKD_DEVICE_CODE
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return log2f(x);
#endif
}
MEDKD_INLINE double near_log2(double x) { return log2(x); }

// log(a / b) for normal a and b: exactly 0 where they are equal, and relatively as good where they nearly are. For 0 and
// subnormal numbers it is any number.
MEDKD_INLINE float log_of_quotient(float a, float b) {
  // a = 2^k m with |log2(m / b)| <= 0.59, from the bits, which are the logarithm to within 0.09; log(m / b) = 2 atanh z
  const uint32_t bits = static_cast<uint32_t>(bits_from_float(a));
  const uint32_t k = (bits - static_cast<uint32_t>(bits_from_float(b)) + 0x00400000u) & 0xff800000u;
  const float m = float_from_bits(static_cast<int32_t>(bits - k));
  const float z = quotient(m - b, m + b), zz = z * z;
  const float p = (3.0454018712e-1f * zz + 3.9953392744e-1f) * zz + 6.6666990519e-1f;  // minimax: 4e-9
  const float ln_2_k = static_cast<float>(static_cast<int32_t>(k)) * 8.2629582959e-8f;  // ln 2 / 2^23
  return ln_2_k + z * (p * zz + 2.0f) + 0.0f * a;  // the last for NaN
}
MEDKD_INLINE double log_of_quotient(double a, double b) { return log(a / b); }

// log((1 + a) / (1 + b)) for a and b in [0, 1], with the same virtues.
MEDKD_INLINE float log_of_shares(float a, float b) {
  const float z = quotient(a - b, 2.0f + (a + b)), zz = z * z;  // at most 1 / 3
  const float p = ((2.8012666106e-1f * zz + 2.8001677990e-1f) * zz + 4.0021532774e-1f) * zz + 6.6666418314e-1f;  // minimax: 5e-9
  return z * (p * zz + 2.0f);
}
MEDKD_INLINE double log_of_shares(double a, double b) { return log1p((a - b) / (1 + b)); }

}  // namespace MEDKD_ISA
}  // namespace medkd
