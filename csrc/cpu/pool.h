// What max_pool and average_pool share: windows side by side, and which of them are worked on together.
#pragma once

#include "planes.h"

namespace medkd {
namespace MEDKD_ISA {

constexpr int64_t pool_lanes = 256;     // pixels or windows along a line that are worked on side by side
constexpr int64_t pool_channels = 64;   // where channels lie side by side, of a tile
constexpr int64_t pool_pixels = 32;     // and its windows

// `count` elements at a distance of `stride`, side by side.
template <typename Value>
MEDKD_INLINE const Value* side_by_side(const Value* from, int64_t stride, int64_t count, Value* __restrict room) {
  if (stride == 1) return from;
  for (int64_t i = 0; i < count; ++i) room[i] = from[i * stride];
  return room;
}

// Some windows of one line of them, and the range of lines of pixels that they reach over.
struct PoolPart {
  int64_t first, count;          // windows along x
  int64_t z, y, depth, height;   // the first line, and how many along either axis
};

// Visits the lines of pixels in the order of a window's pixels: visit(number of the line's first pixel, its place).
template <typename Visit>
MEDKD_INLINE void over_lines(const Pool& pool, const PoolPart& part, const Visit& visit) {
  const int64_t length = pool.size[2], width = pool.window[2], height = part.height;
  for (int64_t z = 0; z < part.depth; ++z) {
    int64_t line = ((part.z + z) * pool.size[1] + part.y) * length, at = z * pool.window[1] * width;
    for (int64_t y = 0; y < height; ++y, line += length, at += width) visit(line, at);
  }
}

// Pixels of a window along x that are there.
MEDKD_INLINE int64_t window_width(const Pool& pool, int64_t window) {
  const int64_t left = pool.size[2] - window * pool.window[2];
  return left < pool.window[2] ? left : pool.window[2];
}

// Visits the pixels of a window in their order: visit(pixel, its place).
template <typename Visit>
MEDKD_INLINE void over_window(const Pool& pool, const PoolPart& part, int64_t window, const Visit& visit) {
  const int64_t x = window * pool.window[2], width = window_width(pool, window);
  over_lines(pool, part, [&](int64_t line, int64_t at) {
    for (int64_t j = 0; j < width; ++j) visit(line + x + j, at + j);
  });
}

// Parts [begin, end) of all, counted by image and plane, then by line of windows, then along the line: visit(part, image, plane,
// number of its first window in the plane).
template <typename Visit>
inline void over_parts(const Pool& pool, int64_t planes, int64_t begin, int64_t end, const Visit& visit) {
  const int64_t depth = pool.pooled_size[0], height = pool.pooled_size[1], width = pool.pooled_size[2];
  const int64_t parts = (width + pool.part - 1) / pool.part;
  int64_t turn = begin % parts, y = begin / parts % height, z = begin / parts / height % depth;
  int64_t plane = begin / parts / height / depth, image = plane / planes;
  plane %= planes;
  for (int64_t k = begin; k < end; ++k) {
    PoolPart part{turn * pool.part, pool.part, z * pool.window[0], y * pool.window[1], pool.window[0], pool.window[1]};
    if (width - part.first < part.count) part.count = width - part.first;
    if (pool.size[0] - part.z < part.depth) part.depth = pool.size[0] - part.z;
    if (pool.size[1] - part.y < part.height) part.height = pool.size[1] - part.y;
    visit(part, image, plane, (z * height + y) * width + part.first);
    if (++turn < parts) continue;
    turn = 0;
    if (++y < height) continue;
    y = 0;
    if (++z < depth) continue;
    z = 0;
    if (++plane < planes) continue;
    plane = 0;
    ++image;
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
