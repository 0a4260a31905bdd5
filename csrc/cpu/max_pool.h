// max_pool: the rows of a window are gone over one after another, for many windows side by side: neighbours along x, or, where
// channels lie side by side, neighbouring channels. A largest value and its place so far lie in two rows of lanes.
#pragma once

#include <type_traits>

#include "pool.h"

namespace medkd {
namespace MEDKD_ISA {

constexpr int64_t pool_gathered = 512;  // pixels that are laid side by side for pool_lanes windows of two

// What a type is taken as, an integer of its width, and an order: whether x, which comes later, is taken instead of y. Half
// precision is compared as integers, in which -0 is 0 and a value that is no number the largest.
template <typename T>
struct PoolType {
  using Value = T;
  using Lane = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static MEDKD_INLINE bool above(T x, T y) { return (x > y) | (x != x); }
};
template <int infinite>
struct PoolHalf {
  using Value = int16_t;
  using Lane = int16_t;
  static MEDKD_INLINE int16_t rank(int16_t x, int16_t of_no_number) {
    const int16_t magnitude = static_cast<int16_t>(x & 0x7fff);
    const int16_t turned = static_cast<int16_t>(x < 0 ? -magnitude : magnitude);
    return magnitude > infinite ? of_no_number : turned;
  }
  static MEDKD_INLINE bool above(int16_t x, int16_t y) { return rank(x, 0x7fff) > rank(y, 0x7ffe); }
};
template <>
struct PoolType<BFloat16> : PoolHalf<0x7f80> {};
template <>
struct PoolType<Float16> : PoolHalf<0x7c00> {};

template <typename T>
using PoolValue = typename PoolType<T>::Value;
template <typename T>
using PoolLane = typename PoolType<T>::Lane;

// One pixel after the others of its window: the first of equal ones stays, the last that is no number.
template <typename T, bool masked>
MEDKD_INLINE void take_pixel(PoolValue<T> x, PoolLane<T> counts, int64_t number, PoolValue<T>& value, PoolLane<T>& place) {
  using Lane = PoolLane<T>;
  Lane taken = PoolType<T>::above(x, value) ? Lane(-1) : Lane(0);
  if (masked) taken = static_cast<Lane>((taken | place >> (8 * sizeof(Lane) - 1)) & counts);
  value = taken != 0 ? x : value;
  place = taken != 0 ? static_cast<Lane>(number) : place;
}

// The largest values and their places of `length` windows, after `step` more pixels of each: those of window o lie from
// from[o * step] on, and the first has place `first`. `fresh`: these are the windows' first pixels. `counts` lies as they do, -1
// where a pixel counts and else 0.
template <typename T, int step, bool fresh, bool masked>
inline void take_pixels(const PoolValue<T>* __restrict from, const PoolLane<T>* __restrict counts, int64_t length,
                        int64_t first, PoolValue<T>* __restrict value, PoolLane<T>* __restrict place) {
  using Value = PoolValue<T>;
  using Lane = PoolLane<T>;
  for (int64_t o = 0; o < length; ++o) {
    Value best = value[o];
    Lane at = place[o];
    if (fresh) {
      best = masked ? Value(0) : from[o * step];
      at = static_cast<Lane>(masked ? -1 : first);
    }
    if (!fresh || masked) take_pixel<T, masked>(from[o * step], masked ? counts[o * step] : Lane(-1), first, best, at);
    if (step == 2) take_pixel<T, masked>(from[o * step + 1], masked ? counts[o * step + 1] : Lane(-1), first + 1, best, at);
    value[o] = best;
    place[o] = at;
  }
}

// One more pixel, or what is already the largest of several, for a window; in any order.
template <typename T>
MEDKD_INLINE void merge_pixel(PoolValue<T> x, PoolLane<T> from, PoolValue<T>& value, PoolLane<T>& place) {
  if (from < 0) return;
  const bool larger = from > place ? PoolType<T>::above(x, value) : !PoolType<T>::above(value, x);
  if (larger || place < 0) {
    value = x;
    place = from;
  }
}

// A mask's line with numbers of the lanes' size.
template <typename Lane>
MEDKD_INLINE void widen_mask(const uint8_t* mask, int64_t count, Lane* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = mask[i] != 0 ? Lane(-1) : Lane(0);
}

// Windows of one pixel or two along x.
template <typename T, int step, bool masked>
inline void pool_narrow(const Pool& pool, const PoolPart& part, const PoolValue<T>* plane, const uint8_t* mask,
                        PoolValue<T>* value, PoolLane<T>* place) {
  const int64_t stride = pool.x.stride_n, begin = part.first * step;
  const int64_t columns = pool.size[2] - begin < part.count * step ? pool.size[2] - begin : part.count * step;
  const int64_t whole = columns / step, rest = columns - whole * step;
  PoolValue<T> room[pool_gathered];
  PoolLane<T> counts[pool_gathered];
  over_lines(pool, part, [&](int64_t line, int64_t at) {
    const PoolValue<T>* from = side_by_side(plane + (line + begin) * stride, stride, columns, room);
    if (masked) widen_mask(mask + line + begin, columns, counts);
    if (at == 0) {
      take_pixels<T, step, true, masked>(from, counts, whole, 0, value, place);
      take_pixels<T, 1, true, masked>(from + whole * step, counts + whole * step, rest, 0, value + whole, place + whole);
    } else {
      take_pixels<T, step, false, masked>(from, counts, whole, at, value, place);
      take_pixels<T, 1, false, masked>(from + whole * step, counts + whole * step, rest, at, value + whole, place + whole);
    }
  });
}

// Any windows: first every column of pixels for itself, then the columns of each window.
template <typename T, bool masked>
inline void pool_columns(const Pool& pool, const PoolPart& part, const PoolValue<T>* plane, const uint8_t* mask,
                         PoolValue<T>* value, PoolLane<T>* place) {
  using Value = PoolValue<T>;
  using Lane = PoolLane<T>;
  const int64_t stride = pool.x.stride_n, width = pool.window[2], begin = part.first * width;
  const int64_t end = pool.size[2] - begin < part.count * width ? pool.size[2] : begin + part.count * width;
  for (int64_t o = 0; o < part.count; ++o) {
    value[o] = Value(0);
    place[o] = Lane(-1);
  }
  Value room[pool_lanes], column[pool_lanes];
  Lane counts[pool_lanes], column_place[pool_lanes];
  int64_t o = 0, within = 0;
  for (int64_t x = begin; x < end; x += pool_lanes) {
    const int64_t columns = end - x < pool_lanes ? end - x : pool_lanes;
    over_lines(pool, part, [&](int64_t line, int64_t at) {
      const Value* from = side_by_side(plane + (line + x) * stride, stride, columns, room);
      if (masked) widen_mask(mask + line + x, columns, counts);
      if (at == 0)
        take_pixels<T, 1, true, masked>(from, counts, columns, 0, column, column_place);
      else
        take_pixels<T, 1, false, masked>(from, counts, columns, at, column, column_place);
    });
    for (int64_t i = 0; i < columns; ++i) {
      const Lane from = column_place[i];
      merge_pixel<T>(column[i], from < 0 ? from : static_cast<Lane>(from + within), value[o], place[o]);
      if (++within == width) {
        within = 0;
        ++o;
      }
    }
  }
}

// Where x > y or x is no number, x and its place are taken.
template <typename A, typename Places>
MEDKD_INLINE void take_vector(Vector<A> x, PoolLane<A> number, Vector<A>& value, Places& place) {
  const auto larger = (x > value) | (x != x);
  value = larger ? x : value;
  place = larger ? Places{} + number : place;
}

// As many windows of two pixels along x as there are lanes. visit_lines(visit) calls visit(pixels of a line, the first one's place).
template <typename A, typename Lines>
MEDKD_INLINE void pool_vector(const Lines& visit_lines, A* value, int16_t* place) {
  constexpr int64_t lanes = vector_lanes<A>;
  typedef PoolLane<A> Places __attribute__((vector_size(vector_bytes)));
  typedef int16_t Narrow __attribute__((vector_size(2 * lanes)));
  Vector<A> best{};
  Places at{};
  visit_lines([&](const A* from, int64_t number) {
    const Pairs<A> x = load_pairs(from);
    if (number == 0)
      best = x.first;
    else
      take_vector<A>(x.first, static_cast<PoolLane<A>>(number), best, at);
    take_vector<A>(x.second, static_cast<PoolLane<A>>(number + 1), best, at);
  });
  store_loose<A>(best, value);
  const Narrow narrow = __builtin_convertvector(at, Narrow);
  __builtin_memcpy(place, &narrow, sizeof narrow);
}

// Windows of two pixels along x that lie side by side and all count, at least as many as there are lanes: in registers.
template <typename A>
inline void pool_pairs(const Pool& pool, const PoolPart& part, int64_t whole, const A* plane, A* value, int16_t* place) {
  constexpr int64_t lanes = vector_lanes<A>;
  const int64_t begin = 2 * part.first, length = pool.size[2];
  const A* first = plane + (part.z * pool.size[1] + part.y) * length + begin;
  for (int64_t next = 0; next < whole; next += lanes) {
    const int64_t o = next < whole - lanes ? next : whole - lanes;  // some of the last ones once more
    if (part.height == 2)  // the two lines are written out
      pool_vector<A>(
          [&](const auto& visit) {
            const A* from = first + 2 * o;
            visit(from, 0);
            visit(from + length, 2);
            for (int64_t z = 1; z < part.depth; ++z) {
              from += pool.size[1] * length;
              visit(from, 2 * z * pool.window[1]);
              visit(from + length, 2 * z * pool.window[1] + 2);
            }
          },
          value + o, place + o);
    else
      pool_vector<A>(
          [&](const auto& visit) {
            over_lines(pool, part, [&](int64_t line, int64_t number) { visit(plane + line + begin + 2 * o, number); });
          },
          value + o, place + o);
  }
  if (whole < part.count) {  // the last one is cut off
    PoolLane<A> at = 0;
    over_lines(pool, part, [&](int64_t line, int64_t number) {
      const A x = plane[line + begin + 2 * whole];
      if (number == 0) value[whole] = x;
      take_pixel<A, false>(x, 0, number, value[whole], at);
    });
    place[whole] = static_cast<int16_t>(at);
  }
}

template <typename T>
inline void pool_part(const Pool& pool, const PoolPart& part, int64_t image, int64_t channel, int64_t at) {
  using Value = PoolValue<T>;
  const Value* plane = static_cast<const Value*>(pool.x.data) + image * pool.x.stride_b + channel * pool.x.stride_c;
  const uint8_t* mask = pool.mask == nullptr ? nullptr : pool.mask + image * pool.pixels;
  Value* value = static_cast<Value*>(pool.pooled) + at;
  if constexpr (std::is_floating_point_v<T>) {
    const int64_t there = pool.size[2] / 2 - part.first, whole = part.count < there ? part.count : there;
    if (pool.window[2] == 2 && pool.x.stride_n == 1 && mask == nullptr && whole >= vector_lanes<T>)
      return pool_pairs<T>(pool, part, whole, plane, value, pool.place + at);
  }
  PoolLane<T> place[pool_lanes];
  if (pool.window[2] == 2)
    mask == nullptr ? pool_narrow<T, 2, false>(pool, part, plane, mask, value, place)
                    : pool_narrow<T, 2, true>(pool, part, plane, mask, value, place);
  else if (pool.window[2] == 1)
    mask == nullptr ? pool_narrow<T, 1, false>(pool, part, plane, mask, value, place)
                    : pool_narrow<T, 1, true>(pool, part, plane, mask, value, place);
  else
    mask == nullptr ? pool_columns<T, false>(pool, part, plane, mask, value, place)
                    : pool_columns<T, true>(pool, part, plane, mask, value, place);
  int16_t* __restrict to = pool.place + at;
  for (int64_t o = 0; o < part.count; ++o) to[o] = static_cast<int16_t>(place[o]);
}

// Where channels lie side by side: a tile of windows by channels, which is transposed on its way out.
template <typename T>
inline void pool_channels_inside(const Pool& pool, const PoolPart& part, int64_t image, int64_t at) {
  using Value = PoolValue<T>;
  const Value* from = static_cast<const Value*>(pool.x.data) + image * pool.x.stride_b;
  const uint8_t* mask = pool.mask == nullptr ? nullptr : pool.mask + image * pool.pixels;
  Value value[pool_pixels * pool_channels];
  PoolLane<T> place[pool_pixels * pool_channels];
  for (int64_t channel = 0; channel < pool.channels; channel += pool_channels) {
    const int64_t some = pool.channels - channel < pool_channels ? pool.channels - channel : pool_channels;
    for (int64_t o = 0; o < part.count; ++o) {
      Value* row = value + o * pool_channels;
      PoolLane<T>* row_place = place + o * pool_channels;
      bool fresh = true;
      over_window(pool, part, part.first + o, [&](int64_t pixel, int64_t number) {
        if (mask != nullptr && mask[pixel] == 0) return;
        const Value* x = from + pixel * pool.x.stride_n + channel;
        if (fresh)
          take_pixels<T, 1, true, false>(x, nullptr, some, number, row, row_place);
        else
          take_pixels<T, 1, false, false>(x, nullptr, some, number, row, row_place);
        fresh = false;
      });
      for (int64_t c = 0; fresh && c < some; ++c) {
        row[c] = Value(0);
        row_place[c] = PoolLane<T>(-1);
      }
    }
    for (int64_t c = 0; c < some; ++c) {
      const int64_t to = (channel + c) * pool.windows + at;
      for (int64_t o = 0; o < part.count; ++o) {
        static_cast<Value*>(pool.pooled)[to + o] = value[o * pool_channels + c];
        pool.place[to + o] = static_cast<int16_t>(place[o * pool_channels + c]);
      }
    }
  }
}

// As many windows of two pixels as there are lanes; the first pixel of each has place `first`.
template <typename A>
MEDKD_INLINE void spread_vector(const A* upstream, const int16_t* place, int16_t first, A* to) {
  typedef PoolLane<A> Places __attribute__((vector_size(vector_bytes)));
  typedef int16_t Narrow __attribute__((vector_size(2 * vector_lanes<A>)));
  Narrow narrow;
  __builtin_memcpy(&narrow, place, sizeof narrow);
  const Places number = __builtin_convertvector(narrow, Places) - PoolLane<A>(first);
  const Vector<A> v = load_loose(upstream), zero{};
  store_pairs<A>({number == PoolLane<A>(0) ? v : zero, number == PoolLane<A>(1) ? v : zero}, to);
}

// The gradient of one line of `length` windows of `step` pixels along x; the first of each has place `first`.
template <typename T, int step>
inline void spread_line(const PoolValue<T>* __restrict upstream, const int16_t* __restrict place, int64_t length,
                        int16_t first, PoolValue<T>* __restrict to) {
  using Value = PoolValue<T>;
  using Lane = PoolLane<T>;
  if constexpr (step == 2 && std::is_floating_point_v<T>) {
    constexpr int64_t lanes = vector_lanes<T>;
    if (length >= lanes) {
      for (int64_t next = 0; next < length; next += lanes) {
        const int64_t o = next < length - lanes ? next : length - lanes;  // some of the last ones once more
        spread_vector<T>(upstream + o, place + o, first, to + 2 * o);
      }
      return;
    }
  }
  for (int64_t o = 0; o < length; ++o) {
    const Lane number = static_cast<Lane>(static_cast<Lane>(place[o]) - static_cast<Lane>(first));
    const Value v = upstream[o];
    to[o * step] = number == 0 ? v : Value(0);
    if (step == 2) to[o * step + 1] = number == 1 ? v : Value(0);
  }
}

// The gradient of windows of `step` pixels along x, whose pixels lie side by side.
template <typename T, int step>
inline void spread_narrow(const Pool& pool, const PoolPart& part, const PoolValue<T>* upstream, const int16_t* place,
                          PoolValue<T>* plane) {
  const int64_t begin = part.first * step;
  const int64_t columns = pool.size[2] - begin < part.count * step ? pool.size[2] - begin : part.count * step;
  const int64_t whole = columns / step;
  over_lines(pool, part, [&](int64_t line, int64_t at) {
    const int16_t first = static_cast<int16_t>(at);
    PoolValue<T>* to = plane + line + begin;
    spread_line<T, step>(upstream, place, whole, first, to);
    spread_line<T, 1>(upstream + whole, place + whole, columns - whole * step, first, to + whole * step);
  });
}

// Of any windows: zeros in the lines of pixels, which stay in the cache, then a value in each window.
template <typename T>
inline void spread_windows(const Pool& pool, const PoolPart& part, const PoolValue<T>* upstream, const int16_t* place,
                           PoolValue<T>* plane) {
  using Value = PoolValue<T>;
  const int64_t stride = pool.x.stride_n, width = pool.window[2], begin = part.first * width;
  const int64_t columns = pool.size[2] - begin < part.count * width ? pool.size[2] - begin : part.count * width;
  over_lines(pool, part, [&](int64_t line, int64_t) {
    Value* to = plane + (line + begin) * stride;
    if (stride == 1)
      __builtin_memset(to, 0, static_cast<std::size_t>(columns) * sizeof(Value));
    else
      for (int64_t i = 0; i < columns; ++i) to[i * stride] = Value(0);
  });
  Value* const first = plane + ((part.z * pool.size[1] + part.y) * pool.size[2] + begin) * stride;
  for (int64_t o = 0; o < part.count; ++o)
    if (place[o] >= 0) first[(pool.offset[place[o]] + o * width) * stride] = upstream[o];
}

template <typename T>
inline void spread_part(const Pool& pool, const PoolPart& part, int64_t image, int64_t channel, int64_t at) {
  using Value = PoolValue<T>;
  Value* plane = static_cast<Value*>(pool.x.data) + image * pool.x.stride_b + channel * pool.x.stride_c;
  const Value* upstream = static_cast<const Value*>(pool.pooled) + at;
  const int16_t* place = pool.place + at;
  if (pool.x.stride_n == 1 && pool.window[2] == 2)
    spread_narrow<T, 2>(pool, part, upstream, place, plane);
  else if (pool.x.stride_n == 1 && pool.window[2] == 1)
    spread_narrow<T, 1>(pool, part, upstream, place, plane);
  else
    spread_windows<T>(pool, part, upstream, place, plane);
}

template <typename T>
inline void spread_channels_inside(const Pool& pool, const PoolPart& part, int64_t image, int64_t at) {
  using Value = PoolValue<T>;
  Value* to = static_cast<Value*>(pool.x.data) + image * pool.x.stride_b;
  Value upstream[pool_pixels * pool_channels];
  PoolLane<T> place[pool_pixels * pool_channels];
  for (int64_t channel = 0; channel < pool.channels; channel += pool_channels) {
    const int64_t some = pool.channels - channel < pool_channels ? pool.channels - channel : pool_channels;
    for (int64_t c = 0; c < some; ++c) {
      const int64_t from = (channel + c) * pool.windows + at;
      for (int64_t o = 0; o < part.count; ++o) {
        upstream[o * pool_channels + c] = static_cast<const Value*>(pool.pooled)[from + o];
        place[o * pool_channels + c] = pool.place[from + o];
      }
    }
    for (int64_t o = 0; o < part.count; ++o)
      over_window(pool, part, part.first + o, [&](int64_t pixel, int64_t number) {
        Value* __restrict out = to + pixel * pool.x.stride_n + channel;
        const Value* __restrict row = upstream + o * pool_channels;
        const PoolLane<T>* __restrict row_place = place + o * pool_channels;
        const PoolLane<T> wanted = static_cast<PoolLane<T>>(number);
        for (int64_t c = 0; c < some; ++c) out[c] = row_place[c] == wanted ? row[c] : Value(0);
      });
  }
}

template <typename T, bool backward>
inline void max_pool_parts(const Pool& pool, int64_t begin, int64_t end) {
  const int64_t planes = pool.channels_inside ? 1 : pool.channels;
  over_parts(pool, planes, begin, end, [&](const PoolPart& part, int64_t image, int64_t channel, int64_t window) {
    const int64_t at = (image * pool.channels + channel) * pool.windows + window;
    if (pool.channels_inside)
      backward ? spread_channels_inside<T>(pool, part, image, at) : pool_channels_inside<T>(pool, part, image, at);
    else
      backward ? spread_part<T>(pool, part, image, channel, at) : pool_part<T>(pool, part, image, channel, at);
  });
}

template <bool backward>
inline void max_pool(const Pool& pool, int64_t begin, int64_t end) {
  switch (pool.x.type) {
    case Type::float64: max_pool_parts<double, backward>(pool, begin, end); break;
    case Type::bfloat16: max_pool_parts<BFloat16, backward>(pool, begin, end); break;
    case Type::float16: max_pool_parts<Float16, backward>(pool, begin, end); break;
    default: max_pool_parts<float, backward>(pool, begin, end);
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
