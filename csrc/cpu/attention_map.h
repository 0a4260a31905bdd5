// attention_map: a pixel's energy is added up over the channels while a range of pixels stays in the first-level cache; the
// gradient is one more pass. Derivation: medkd_fast/reference/attention_map.py.
#pragma once

#include "../math/attention_map.h"
#include "planes.h"

namespace medkd {
namespace MEDKD_ISA {

// f(T()) with the type that x has; the arithmetic is double only when x is.
template <typename A, typename F>
inline void with_type(Type type, const F& f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(double());
  } else {
    switch (type) {
      case Type::bfloat16: f(BFloat16()); break;
      case Type::float16: f(Float16()); break;
      default: f(float());
    }
  }
}

// energy[p] += the power of x[c, p], over the channels: four at a time, so that the energies are seldom loaded.
template <typename T, typename A, typename Power>
inline void add_energies(const Power& power, const T* x, int64_t stride_c, int64_t channels, int64_t length,
                         A* __restrict energy) {
  int64_t c = 0;
  for (; c + 4 <= channels; c += 4) {
    const T* __restrict x_0 = x + c * stride_c;
    const T* __restrict x_1 = x_0 + stride_c;
    const T* __restrict x_2 = x_1 + stride_c;
    const T* __restrict x_3 = x_2 + stride_c;
    for (int64_t p = 0; p < length; ++p) {
      const A first = power.value(static_cast<A>(widen(x_0[p]))) + power.value(static_cast<A>(widen(x_1[p])));
      const A second = power.value(static_cast<A>(widen(x_2[p]))) + power.value(static_cast<A>(widen(x_3[p])));
      energy[p] += first + second;
    }
  }
  for (; c < channels; ++c) {
    const T* __restrict row = x + c * stride_c;
    for (int64_t p = 0; p < length; ++p) energy[p] += power.value(static_cast<A>(widen(row[p])));
  }
}

// Pixels of a channel that do not lie side by side: a tile at a time goes through scratch memory.
template <typename A, typename Power>
inline void add_tiles(const Power& power, const Planes& x, const PixelRange& range, int64_t channels, A* energy) {
  constexpr int64_t some = 64, ld = some + 16;
  const Scratch<A> scratch(some * ld);
  for (int64_t first = range.begin; first < range.end; first += some) {
    const int64_t length = range.end - first < some ? range.end - first : some;
    for (int64_t c = 0; c < channels; c += some) {
      const int64_t rows = channels - c < some ? channels - c : some;
      load_tile(from_channel(x, c), range.image, first, rows, length, length, ld, A(1), scratch.get());
      add_energies(power, scratch.get(), ld, rows, length, energy + (first - range.begin));
    }
  }
}

template <typename A>
inline void attention_product(const A* a, const A* b, int64_t count, double* sum) {
  double lane[16] = {};
  int64_t p = 0;
  for (; p + 16 <= count; p += 16)
    for (int64_t j = 0; j < 16; ++j) lane[j] += static_cast<double>(a[p + j]) * static_cast<double>(b[p + j]);
  for (; p < count; ++p) lane[p % 16] += static_cast<double>(a[p]) * static_cast<double>(b[p]);
  *sum = sum_row(lane, 16);
}

template <typename A>
inline void attention_energies(const Attention& attention, const PixelRange& range, A* energies, double* squares) {
  const Planes& x = attention.x;
  const int64_t length = range.end - range.begin;
  alignas(64) A energy[attention_block];
  for (int64_t p = 0; p < length; ++p) energy[p] = A(0);
  with_power<A>(attention.power, [&](const auto& power) {
    if (x.stride_n != 1) return add_tiles(power, x, range, attention.channels, energy);
    with_type<A>(x.type, [&](auto zero) {
      const auto* from = static_cast<const decltype(zero)*>(x.data) + range.image * x.stride_b + range.begin;
      add_energies(power, from, x.stride_c, attention.channels, length, energy);
    });
  });
  if (attention.mask != nullptr) {
    const uint8_t* mask = attention.mask + range.image * attention.pixels + range.begin;
    for (int64_t p = 0; p < length; ++p) energy[p] = mask[p] != 0 ? energy[p] : A(0);
  }
  attention_product(energy, energy, length, squares);
  for (int64_t p = 0; p < length; ++p) energies[p] = energy[p];
}

template <typename A>
inline void attention_normalise(A* x, int64_t count, double factor) {
  for (int64_t p = 0; p < count; ++p) x[p] = static_cast<A>(factor * static_cast<double>(x[p]));
}

// What the pixels of a range multiply the slopes of their features by; keep is 0 where a pixel does not count.
template <typename A>
struct AttentionFactors {
  A scale;
  const A* factor;
  const A* keep;

  AttentionFactors from(int64_t pixel) const { return {scale, factor + pixel, keep + pixel}; }
};

// What a range's gradients get besides: nothing. Else channel(c) is what the range's pixels get in a channel, and pixel(p) what a
// pixel gets in all of them.
struct NothingAdded {
  static constexpr bool adds = false;
  const void* channel(int64_t) const { return nullptr; }
  const void* pixel(int64_t) const { return nullptr; }
};

// out[k] = the gradient of x[k], for neighbouring pixels of a channel or, with step 0, neighbouring channels of a pixel. Strides
// of 1 are written out, or the loops over halves would not vectorise.
template <bool masked, bool adds, int step, bool dense, typename T, typename O, typename A, typename Power>
MEDKD_INLINE void attention_slopes(const Power& power, const AttentionFactors<A>& of, const A* __restrict added,
                                   int64_t length, const T* __restrict x, int64_t x_stride, O* __restrict out,
                                   int64_t out_stride) {
  const A scale = of.scale;
  const A* __restrict factor = of.factor;
  const A* __restrict keep = of.keep;
  for (int64_t k = 0; k < length; ++k) {
    const A slope = power.slope(scale * static_cast<A>(widen(x[dense ? k : k * x_stride])));
    A value = factor[k * step] * slope;
    if (masked) value = keep[k * step] != A(0) ? value : A(0);
    if (adds) value += added[k];
    narrow(value, out[dense ? k : k * out_stride]);
  }
}

template <bool masked, bool adds, int step, bool dense, typename T, typename A, typename Power>
inline void attention_line(const Power& power, const AttentionFactors<A>& of, const void* added_values, int64_t length,
                           const T* x, int64_t x_stride, T* gradient, int64_t gradient_stride) {
  const A* added = static_cast<const A*>(added_values);
  if constexpr (sizeof(T) == sizeof(A) || !dense) {
    attention_slopes<masked, adds, step, dense>(power, of, added, length, x, x_stride, gradient, gradient_stride);
  } else {  // rounded in a loop of its own, which vectorises
    constexpr int64_t some = 256;
    alignas(64) A slopes[some];
    for (int64_t first = 0; first < length; first += some) {
      const int64_t count = length - first < some ? length - first : some;
      attention_slopes<masked, adds, step, true>(power, of.from(step * first), adds ? added + first : nullptr, count,
                                                 x + first, 1, slopes, 1);
      T* __restrict to = gradient + first;
      for (int64_t k = 0; k < count; ++k) narrow(slopes[k], to[k]);
    }
  }
}

template <bool masked, typename T, typename A, typename Power, typename Added>
inline void attention_lines(const Power& power, const Attention& attention, const PixelRange& range,
                            const AttentionFactors<A>& of, const Added& added) {
  const Planes &x = attention.x, &gradient = attention.gradient;
  const T* from = static_cast<const T*>(x.data) + range.image * x.stride_b + range.begin * x.stride_n;
  T* to = static_cast<T*>(gradient.data) + range.image * gradient.stride_b + range.begin * gradient.stride_n;
  const int64_t channels = attention.channels, length = range.end - range.begin;
  constexpr bool adds = Added::adds;
  if (x.stride_n == 1 && gradient.stride_n == 1) {
    for (int64_t c = 0; c < channels; ++c)
      attention_line<masked, adds, 1, true>(power, of, added.channel(c), length, from + c * x.stride_c, 1,
                                            to + c * gradient.stride_c, 1);
  } else if (x.stride_c == 1 && gradient.stride_c == 1) {
    for (int64_t p = 0; p < length; ++p)
      attention_line<masked, adds, 0, true>(power, of.from(p), added.pixel(p), channels, from + p * x.stride_n, 1,
                                            to + p * gradient.stride_n, 1);
  } else {
    for (int64_t c = 0; c < channels; ++c)
      attention_line<masked, adds, 1, false>(power, of, added.channel(c), length, from + c * x.stride_c, x.stride_n,
                                             to + c * gradient.stride_c, gradient.stride_n);
  }
}

// factor[p] = what the slopes at a range's pixels are multiplied by, from the image's map and the gradient that arrives for it.
template <typename A>
inline void attention_factors(const AttentionSlope& slope, double product, const A* map, const A* upstream, int64_t length,
                              A* factor) {
  for (int64_t p = 0; p < length; ++p) {
    const double q = static_cast<double>(map[p]), v = static_cast<double>(upstream[p]);
    factor[p] = static_cast<A>(slope.factor * (v - q * product));
  }
}

template <bool masked, typename A, typename Added>
inline void attention_gradient_of(const Attention& attention, const PixelRange& range, const AttentionFactors<A>& of,
                                  const Added& added) {
  with_power<A>(attention.power, [&](const auto& power) {
    with_type<A>(attention.x.type,
                 [&](auto zero) { attention_lines<masked, decltype(zero)>(power, attention, range, of, added); });
  });
}

template <typename A>
inline void attention_gradient(const Attention& attention, const PixelRange& range, const A* map, const A* upstream,
                               double norm, double product) {
  const AttentionSlope slope = attention_slope(norm, attention.power);
  const int64_t length = range.end - range.begin;
  alignas(64) A factor[attention_block], keep[attention_block];
  attention_factors(slope, product, map + range.begin, upstream + range.begin, length, factor);
  const AttentionFactors<A> of{static_cast<A>(slope.scale), factor, keep};
  if (attention.mask == nullptr) return attention_gradient_of<false>(attention, range, of, NothingAdded{});
  const uint8_t* mask = attention.mask + range.image * attention.pixels + range.begin;
  for (int64_t p = 0; p < length; ++p) keep[p] = mask[p] != 0 ? A(1) : A(0);
  attention_gradient_of<true>(attention, range, of, NothingAdded{});
}

}  // namespace MEDKD_ISA
}  // namespace medkd
