// Blocks of pixels for the relation losses, channel_relation and pixel_relation: features go into scratch memory in the
// arithmetic's type, are multiplied there (gemm.h), and gradients come back. A block is [channels, ld]; its rows are
// padded with zeros, and so are the pixels that the mask leaves out, whatever the features hold there.
#pragma once

#include "gemm.h"

namespace medkd {
namespace MEDKD_ISA {

// Elements from row to row: one cache line more than the block's pixels, or rows would compete for the same cache sets.
inline int64_t block_ld(int64_t pixels) { return round_up(pixels, pixel_multiple) + 16; }

template <typename A>
inline void load_block(const Relation& relation, const Planes& x, int64_t image, int64_t first, int64_t channels,
                       int64_t length, int64_t padded, int64_t ld, A* out) {
  // Of channels_last features a few pixels at a time, so that the lines last in the cache from channel to channel.
  const int64_t step = x.stride_n == 1 ? length : 32;
  for (int64_t p = 0; p < length; p += step) {
    const int64_t some = length - p < step ? length - p : step;
    load_tile(x, image, first + p, channels, some, some, ld, A(1), out + p);
  }
  const uint8_t* mask = relation.mask == nullptr ? nullptr : relation.mask + image * relation.pixels + first;
  for (int64_t c = 0; c < channels; ++c) {
    A* row = out + c * ld;
    if (mask != nullptr)
      for (int64_t p = 0; p < length; ++p) row[p] = mask[p] != 0 ? row[p] : A(0);
    for (int64_t p = length; p < padded; ++p) row[p] = A(0);
  }
}

template <typename A>
inline void store_block(const Planes& x, int64_t image, int64_t first, int64_t channels, int64_t length, int64_t ld,
                        const A* in) {
  const int64_t step = x.stride_n == 1 ? length : 32;
  for (int64_t p = 0; p < length; p += step)
    store_tile(x, image, first + p, channels, length - p < step ? length - p : step, ld, in + p);
}

}  // namespace MEDKD_ISA
}  // namespace medkd
