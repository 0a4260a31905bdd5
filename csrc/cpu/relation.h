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
  load_tile(x, image, first, channels, length, padded, ld, A(1), out);
  const uint8_t* mask = relation.mask == nullptr ? nullptr : relation.mask + image * relation.pixels + first;
  if (mask != nullptr)
    for (int64_t c = 0; c < channels; ++c) {
      A* row = out + c * ld;
      for (int64_t p = 0; p < length; ++p) row[p] = mask[p] != 0 ? row[p] : A(0);
    }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
