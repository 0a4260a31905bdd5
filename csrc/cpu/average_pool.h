// average_pool: every column of pixels is added up over a window's lines, then the columns of each window; where channels lie side
// by side, a lane is a channel. Derivation: medkd_fast/reference/average_pool.py.
#pragma once

#include <type_traits>

#include "pool.h"
#include "vector.h"

namespace medkd {
namespace MEDKD_ISA {

constexpr int64_t small_window = 64;  // pixels; larger ones are added up in double

template <typename T>
using PoolArithmetic = std::conditional_t<sizeof(T) == 8, double, float>;

// The pixels that count in each window of images [B, N]; all of them without a mask.
inline void average_pool_number(const Pool& pool, int64_t begin, int64_t end) {
  over_parts(pool, 1, begin, end, [&](const PoolPart& part, int64_t image, int64_t, int64_t window) {
    int32_t* number = pool.number + image * pool.windows + window;
    for (int64_t o = 0; o < part.count; ++o) {
      if (pool.mask == nullptr) {
        number[o] = static_cast<int32_t>(part.depth * part.height * window_width(pool, part.first + o));
        continue;
      }
      number[o] = 0;
      const uint8_t* mask = pool.mask + image * pool.pixels;
      over_window(pool, part, part.first + o, [&](int64_t pixel, int64_t) { number[o] += mask[pixel] != 0 ? 1 : 0; });
    }
  });
}

// sum[i] += x[i], where it counts.
template <bool masked, typename T, typename Sum>
inline void add_line(const T* __restrict x, const uint8_t* __restrict counts, int64_t count, Sum* __restrict sum) {
  for (int64_t i = 0; i < count; ++i) {
    const Sum value = static_cast<Sum>(widen(x[i]));
    sum[i] += !masked || counts[i] != 0 ? value : Sum(0);
  }
}

// Sums of windows of two pixels along x that lie side by side and all count, at least as many as there are lanes: in registers.
template <typename A>
inline void add_pairs(const Pool& pool, const PoolPart& part, int64_t whole, const A* plane, A* sum) {
  constexpr int64_t lanes = vector_lanes<A>;
  for (int64_t next = 0; next < whole; next += lanes) {
    const int64_t o = next < whole - lanes ? next : whole - lanes;  // some of the last ones once more
    const A* begin = plane + 2 * (part.first + o);
    Vector<A> low{}, high{};
    over_lines(pool, part, [&](int64_t line, int64_t) {
      low += load_loose(begin + line);
      high += load_loose(begin + line + lanes);
    });
    A column[2 * lanes];
    store_loose<A>(low, column);
    store_loose<A>(high, column + lanes);
    const Pairs<A> pairs = load_pairs(column);
    store_loose<A>(pairs.first + pairs.second, sum + o);
  }
}

// Sums of a part's windows, from those of their columns.
template <bool masked, typename T, typename Sum>
inline void add_windows(const Pool& pool, const PoolPart& part, const T* plane, const uint8_t* mask, Sum* __restrict sum) {
  const int64_t stride = pool.x.stride_n, width = pool.window[2], begin = part.first * width;
  const int64_t end = pool.size[2] - begin < part.count * width ? pool.size[2] : begin + part.count * width;
  if constexpr (std::is_same_v<T, Sum> && !masked) {
    const int64_t whole = (end - begin) / 2;
    if (width == 2 && stride == 1 && whole >= vector_lanes<T>) {
      add_pairs(pool, part, whole, plane, sum);
      if (whole == part.count) return;
      sum[whole] = Sum(0);
      over_lines(pool, part, [&](int64_t line, int64_t) { sum[whole] += plane[line + end - 1]; });
      return;
    }
  }
  for (int64_t o = 0; o < part.count; ++o) sum[o] = Sum(0);
  T room[pool_lanes];
  alignas(64) Sum column[pool_lanes];
  int64_t o = 0, within = 0;
  for (int64_t x = begin; x < end; x += pool_lanes) {
    const int64_t columns = end - x < pool_lanes ? end - x : pool_lanes;
    for (int64_t i = 0; i < columns; ++i) column[i] = Sum(0);
    over_lines(pool, part, [&](int64_t line, int64_t) {
      const T* from = side_by_side(plane + (line + x) * stride, stride, columns, room);
      add_line<masked>(from, masked ? mask + line + x : nullptr, columns, column);
    });
    if (width == 2) {  // whole windows but for the last
      for (int64_t k = 0; k < columns / 2; ++k) sum[k] = column[2 * k] + column[2 * k + 1];
      if (columns % 2 != 0) sum[columns / 2] = column[columns - 1];
      continue;
    }
    for (int64_t i = 0; i < columns; ++i) {
      sum[o] += column[i];
      if (++within < width) continue;
      within = 0;
      ++o;
    }
  }
}

template <typename Sum, typename A>
MEDKD_INLINE A average_of(Sum sum, int32_t number) {
  return number > 0 ? static_cast<A>(sum / static_cast<Sum>(number)) : A(0);
}

template <typename Sum, typename T>
inline void average_plane(const Pool& pool, const PoolPart& part, int64_t image, int64_t channel, int64_t window) {
  using A = PoolArithmetic<T>;
  const T* plane = static_cast<const T*>(pool.x.data) + image * pool.x.stride_b + channel * pool.x.stride_c;
  const int32_t* number = pool.number + image * pool.windows + window;
  A* __restrict out = static_cast<A*>(pool.pooled) + (image * pool.channels + channel) * pool.windows + window;
  Sum sum[pool_lanes];
  if (pool.mask == nullptr)
    add_windows<false>(pool, part, plane, nullptr, sum);
  else
    add_windows<true>(pool, part, plane, pool.mask + image * pool.pixels, sum);
  for (int64_t o = 0; o < part.count; ++o) out[o] = average_of<Sum, A>(sum[o], number[o]);
}

// A tile of windows by channels, which is turned on its way out.
template <typename Sum, typename T>
inline void average_channels(const Pool& pool, const PoolPart& part, int64_t image, int64_t window) {
  using A = PoolArithmetic<T>;
  const T* from = static_cast<const T*>(pool.x.data) + image * pool.x.stride_b;
  const uint8_t* mask = pool.mask == nullptr ? nullptr : pool.mask + image * pool.pixels;
  const int32_t* number = pool.number + image * pool.windows + window;
  A average[pool_pixels * pool_channels];
  for (int64_t channel = 0; channel < pool.channels; channel += pool_channels) {
    const int64_t some = pool.channels - channel < pool_channels ? pool.channels - channel : pool_channels;
    for (int64_t o = 0; o < part.count; ++o) {
      alignas(64) Sum sum[pool_channels] = {};
      over_window(pool, part, part.first + o, [&](int64_t pixel, int64_t) {
        if (mask != nullptr && mask[pixel] == 0) return;
        add_line<false>(from + pixel * pool.x.stride_n + channel, nullptr, some, sum);
      });
      for (int64_t c = 0; c < some; ++c) average[o * pool_channels + c] = average_of<Sum, A>(sum[c], number[o]);
    }
    for (int64_t c = 0; c < some; ++c) {
      A* to = static_cast<A*>(pool.pooled) + (image * pool.channels + channel + c) * pool.windows + window;
      for (int64_t o = 0; o < part.count; ++o) to[o] = average[o * pool_channels + c];
    }
  }
}

// x[i] = the share of a pixel, where it counts, in elements that lie `stride` apart.
template <bool masked, typename T, typename A>
inline void store_shares(const A* __restrict share, const uint8_t* __restrict counts, int64_t count, int64_t stride,
                         T* __restrict x) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) narrow(!masked || counts[i] != 0 ? share[i] : A(0), x[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) narrow(!masked || counts[i] != 0 ? share[i] : A(0), x[i * stride]);
  }
}

template <typename T>
inline void share_plane(const Pool& pool, const PoolPart& part, int64_t image, int64_t channel, int64_t window) {
  using A = PoolArithmetic<T>;
  T* plane = static_cast<T*>(pool.x.data) + image * pool.x.stride_b + channel * pool.x.stride_c;
  const uint8_t* mask = pool.mask == nullptr ? nullptr : pool.mask + image * pool.pixels;
  const int32_t* number = pool.number + image * pool.windows + window;
  const A* upstream = static_cast<const A*>(pool.pooled) + (image * pool.channels + channel) * pool.windows + window;
  const int64_t stride = pool.x.stride_n, width = pool.window[2], begin = part.first * width;
  const int64_t end = pool.size[2] - begin < part.count * width ? pool.size[2] : begin + part.count * width;
  A of_window[pool_lanes];
  for (int64_t o = 0; o < part.count; ++o) of_window[o] = average_of<A, A>(upstream[o], number[o]);
  alignas(64) A share[pool_lanes];
  int64_t o = 0, within = 0;
  for (int64_t x = begin; x < end; x += pool_lanes) {
    const int64_t columns = end - x < pool_lanes ? end - x : pool_lanes;
    if (width == 2) {
      for (int64_t k = 0; k < part.count; ++k) share[2 * k] = share[2 * k + 1] = of_window[k];
    } else {
      for (int64_t i = 0; i < columns; ++i) {
        share[i] = of_window[o];
        if (++within < width) continue;
        within = 0;
        ++o;
      }
    }
    over_lines(pool, part, [&](int64_t line, int64_t) {
      T* to = plane + (line + x) * stride;
      if (mask == nullptr)
        store_shares<false>(share, nullptr, columns, stride, to);
      else
        store_shares<true>(share, mask + line + x, columns, stride, to);
    });
  }
}

template <typename T>
inline void share_channels(const Pool& pool, const PoolPart& part, int64_t image, int64_t window) {
  using A = PoolArithmetic<T>;
  T* to = static_cast<T*>(pool.x.data) + image * pool.x.stride_b;
  const uint8_t* mask = pool.mask == nullptr ? nullptr : pool.mask + image * pool.pixels;
  const int32_t* number = pool.number + image * pool.windows + window;
  A share[pool_pixels * pool_channels], nothing[pool_channels] = {};
  for (int64_t channel = 0; channel < pool.channels; channel += pool_channels) {
    const int64_t some = pool.channels - channel < pool_channels ? pool.channels - channel : pool_channels;
    for (int64_t c = 0; c < some; ++c) {
      const A* upstream = static_cast<const A*>(pool.pooled) + (image * pool.channels + channel + c) * pool.windows + window;
      for (int64_t o = 0; o < part.count; ++o) share[o * pool_channels + c] = average_of<A, A>(upstream[o], number[o]);
    }
    for (int64_t o = 0; o < part.count; ++o)
      over_window(pool, part, part.first + o, [&](int64_t pixel, int64_t) {
        const A* row = mask == nullptr || mask[pixel] != 0 ? share + o * pool_channels : nothing;
        store_shares<false>(row, nullptr, some, 1, to + pixel * pool.x.stride_n + channel);
      });
  }
}

template <typename T, bool backward>
inline void average_pool_parts(const Pool& pool, int64_t begin, int64_t end) {
  using A = PoolArithmetic<T>;
  const bool small = pool.window[0] * pool.window[1] * pool.window[2] <= small_window;
  const int64_t planes = pool.channels_inside ? 1 : pool.channels;
  over_parts(pool, planes, begin, end, [&](const PoolPart& part, int64_t image, int64_t channel, int64_t window) {
    if (backward)
      pool.channels_inside ? share_channels<T>(pool, part, image, window) : share_plane<T>(pool, part, image, channel, window);
    else if (pool.channels_inside)
      small ? average_channels<A, T>(pool, part, image, window) : average_channels<double, T>(pool, part, image, window);
    else
      small ? average_plane<A, T>(pool, part, image, channel, window)
            : average_plane<double, T>(pool, part, image, channel, window);
  });
}

template <bool backward>
inline void average_pool(const Pool& pool, int64_t begin, int64_t end) {
  switch (pool.x.type) {
    case Type::float64: average_pool_parts<double, backward>(pool, begin, end); break;
    case Type::bfloat16: average_pool_parts<BFloat16, backward>(pool, begin, end); break;
    case Type::float16: average_pool_parts<Float16, backward>(pool, begin, end); break;
    default: average_pool_parts<float, backward>(pool, begin, end);
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
