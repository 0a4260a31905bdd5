// Moves tiles of pixels between tensors of any type and layout and scratch memory of the arithmetic's type.
// A tile is [C, ld]: one row a class, pixels side by side.
#pragma once

#include "../math/half.h"
#include "isa.h"
#include "vector.h"

namespace medkd {
namespace MEDKD_ISA {

// Pixels whose channels lie side by side are transposed in registers, a square of lanes × lanes at a time. Squares of fewer
// channels than lanes reach into the next pixels, so the last pixels of a tile are left to the caller: returns how many
// were done.
template <typename A>
inline int64_t load_transposed(const A* from, int64_t stride, int64_t channels, int64_t length, int64_t ld, A scale,
                               A* out) {
  constexpr int64_t lanes = vector_lanes<A>;
  const int64_t some = channels < lanes ? channels : lanes;
  int64_t p = 0;
  for (; p + lanes <= length && (p + lanes - 1) * stride + lanes <= (length - 1) * stride + channels; p += lanes)
    for (int64_t c = 0; c < channels; c += lanes) {
      const int64_t first = c + lanes <= channels || c == 0 ? c : channels - lanes;
      Vector<A> square[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) square[i] = scale * load_loose(from + (p + i) * stride + first);
      transpose<A>(square);
#pragma GCC unroll 16
      for (int64_t j = 0; j < lanes; ++j)
        if (j < some) store_loose<A>(square[j], out + (first + j) * ld + p);
    }
  return p;
}

// The same back. What a square of few channels writes into the next pixel is overwritten when its turn comes.
template <typename A>
inline int64_t store_transposed(const A* in, int64_t ld, int64_t channels, int64_t length, int64_t stride, A* to) {
  constexpr int64_t lanes = vector_lanes<A>;
  const int64_t some = channels < lanes ? channels : lanes;
  int64_t p = 0;
  for (; p + lanes <= length && (p + lanes - 1) * stride + lanes <= (length - 1) * stride + channels; p += lanes)
    for (int64_t c = 0; c < channels; c += lanes) {
      const int64_t first = c + lanes <= channels || c == 0 ? c : channels - lanes;
      Vector<A> square[lanes];
#pragma GCC unroll 16
      for (int64_t j = 0; j < lanes; ++j)
        square[j] = j < some ? load_loose(in + (first + j) * ld + p) : Vector<A>{};
      transpose<A>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) store_loose<A>(square[i], to + (p + i) * stride + first);
    }
  return p;
}

template <typename T, typename A>
inline void load_tile_as(const Planes& x, int64_t image, int64_t first, int64_t channels, int64_t length, int64_t ld,
                         A scale, A* out) {
  const T* base = static_cast<const T*>(x.data) + image * x.stride_b + first * x.stride_n;
  if (x.stride_n == 1) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < length; ++p) out[c * ld + p] = static_cast<A>(widen(base[c * x.stride_c + p])) * scale;
    return;
  }
  int64_t done = 0;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (x.stride_c == 1) done = load_transposed(base, x.stride_n, channels, length, ld, scale, out);
  }
  for (int64_t p = done; p < length; ++p)
    for (int64_t c = 0; c < channels; ++c)
      out[c * ld + p] = static_cast<A>(widen(base[p * x.stride_n + c * x.stride_c])) * scale;
}

// x without the channels before `channel`.
inline Planes from_channel(Planes x, int64_t channel) {
  const int64_t size = x.type == Type::float64 ? 8 : x.type == Type::float32 ? 4 : 2;
  x.data = static_cast<char*>(x.data) + channel * x.stride_c * size;
  return x;
}

// out[c, p] = scale * x[image, c, first + p]; pixels in [length, padded) become 0.
template <typename A>
inline void load_tile(const Planes& x, int64_t image, int64_t first, int64_t channels, int64_t length, int64_t padded,
                      int64_t ld, A scale, A* out) {
  switch (x.type) {
    case Type::float64: load_tile_as<double>(x, image, first, channels, length, ld, scale, out); break;
    case Type::bfloat16: load_tile_as<BFloat16>(x, image, first, channels, length, ld, scale, out); break;
    case Type::float16: load_tile_as<Float16>(x, image, first, channels, length, ld, scale, out); break;
    default: load_tile_as<float>(x, image, first, channels, length, ld, scale, out);
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t p = length; p < padded; ++p) out[c * ld + p] = A(0);
}

template <typename T, typename A>
inline void store_tile_as(const Planes& x, int64_t image, int64_t first, int64_t channels, int64_t length, int64_t ld,
                          const A* in) {
  T* base = static_cast<T*>(x.data) + image * x.stride_b + first * x.stride_n;
  if (x.stride_n == 1) {
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t p = 0; p < length; ++p) narrow(in[c * ld + p], base[c * x.stride_c + p]);
    return;
  }
  int64_t done = 0;
  if constexpr (sizeof(T) == sizeof(A)) {
    if (x.stride_c == 1 && x.stride_n == channels) done = store_transposed(in, ld, channels, length, x.stride_n, base);
  }
  for (int64_t p = done; p < length; ++p)
    for (int64_t c = 0; c < channels; ++c) narrow(in[c * ld + p], base[p * x.stride_n + c * x.stride_c]);
}

// x[image, c, first + p] = in[c, p]
template <typename A>
inline void store_tile(const Planes& x, int64_t image, int64_t first, int64_t channels, int64_t length, int64_t ld,
                       const A* in) {
  switch (x.type) {
    case Type::float64: store_tile_as<double>(x, image, first, channels, length, ld, in); break;
    case Type::bfloat16: store_tile_as<BFloat16>(x, image, first, channels, length, ld, in); break;
    case Type::float16: store_tile_as<Float16>(x, image, first, channels, length, ld, in); break;
    default: store_tile_as<float>(x, image, first, channels, length, ld, in);
  }
}

template <typename A>
inline void store_line(const Planes& x, int64_t image, int64_t first, int64_t channels, int64_t length, const A* in) {
  store_tile(x, image, first, channels, length, length, in);
}

template <typename T, typename A>
inline void scale_as(void* x, int64_t count, A factor) {
  T* values = static_cast<T*>(x);
  for (int64_t k = 0; k < count; ++k) narrow(static_cast<A>(widen(values[k])) * factor, values[k]);
}

// x[k] *= factor
template <typename A>
inline void scale(void* x, Type type, int64_t count, A factor) {
  switch (type) {
    case Type::float64: scale_as<double>(x, count, factor); break;
    case Type::bfloat16: scale_as<BFloat16>(x, count, factor); break;
    case Type::float16: scale_as<Float16>(x, count, factor); break;
    default: scale_as<float>(x, count, factor);
  }
}

// Scratch memory for one call, aligned to a cache line. (No C++ library container: see isa.h.)
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(__builtin_malloc(static_cast<std::size_t>(count) * sizeof(T) + 64))) {
    if (data_ == nullptr) __builtin_abort();
  }
  ~Scratch() { __builtin_free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data_) + 63) & ~uintptr_t{63}); }

 private:
  T* data_;
};

MEDKD_INLINE int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Sum of a padded row in a fixed order: 16 interleaved partial sums in double.
template <typename A>
MEDKD_INLINE double sum_row(const A* row, int64_t padded) {
  double lane[16] = {};
  for (int64_t p = 0; p < padded; p += 16)
    for (int64_t j = 0; j < 16; ++j) lane[j] += static_cast<double>(row[p + j]);
  double sum = 0;
  for (int64_t j = 0; j < 16; ++j) sum += lane[j];
  return sum;
}

}  // namespace MEDKD_ISA
}  // namespace medkd
