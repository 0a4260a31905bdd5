// Where the pixels of an axis lie among the fewer ones that it is upsampled from (linear, align_corners=False).
#pragma once

#include "elementary.h"

namespace medkd {
namespace MEDKD_ISA {

// Pixel i of `full` lies between lower(i) and lower(i) + 1 of `low`, with a weight for the latter. In whole numbers: a place
// that was rounded to the other side of a pixel would have another neighbour.
template <typename Integer>
struct Interpolated {
  Integer full, low;

  // How far pixel i lies behind the first of the fewer, in steps of 1 / (2 full).
  MEDKD_INLINE uint64_t place(Integer i) const {
    const int64_t at = (2 * int64_t{i} + 1) * low - full;
    return at > 0 ? static_cast<uint64_t>(at) : 0;
  }
  MEDKD_INLINE Integer lower(Integer i) const {
    const Integer below = static_cast<Integer>(place(i) / (2 * static_cast<uint64_t>(full)));
    return below < low - 1 ? below : low - 1;
  }
  template <typename A>
  MEDKD_INLINE A upper_weight(Integer i) const {
    return upper_weight<A>(i, lower(i));
  }
  // The same where lower(i) is known: a division of whole numbers less.
  template <typename A>
  MEDKD_INLINE A upper_weight(Integer i, Integer below) const {
    const uint64_t whole = 2 * static_cast<uint64_t>(full);
    return below == low - 1 ? A(0) : static_cast<A>(place(i) - static_cast<uint64_t>(below) * whole) / static_cast<A>(whole);
  }
};

}  // namespace MEDKD_ISA
}  // namespace medkd
