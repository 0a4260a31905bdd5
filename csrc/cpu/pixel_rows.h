// Loads pixels for pixel_relation and normalises each over its channels, in scratch memory [channels, ld].
#pragma once

#include "../math/pixel_relation.h"
#include "relation.h"

namespace medkd {
namespace MEDKD_ISA {

// Squares of eight channels are added at a time: fewer passes over `squares`, less rounding.
template <typename A>
inline void pixel_norms(const A* x, int64_t channels, int64_t padded, int64_t ld, A* __restrict inverse,
                        A* __restrict turns) {
  A* squares = inverse;  // until they are all there
  for (int64_t p = 0; p < padded; ++p) squares[p] = A(0);
  int64_t c = 0;
  for (; c + 8 <= channels; c += 8) {
    const A* row = x + c * ld;
    for (int64_t p = 0; p < padded; ++p) {
      A sum = A(0);
#pragma GCC unroll 8
      for (int64_t k = 0; k < 8; ++k) sum += row[k * ld + p] * row[k * ld + p];
      squares[p] += sum;
    }
  }
  for (; c < channels; ++c) {
    const A* row = x + c * ld;
    for (int64_t p = 0; p < padded; ++p) squares[p] += row[p] * row[p];
  }
  for (int64_t p = 0; p < padded; ++p) {
    const PixelNorm<A> norm = pixel_norm(squares[p]);
    squares[p] = norm.inverse;
    turns[p] = norm.turns;
  }
}

// Takes every pixel's mean over the channels away.
template <typename A>
inline void centre(A* x, int64_t channels, int64_t padded, int64_t ld, A* __restrict mean) {
  for (int64_t p = 0; p < padded; ++p) mean[p] = A(0);
  for (int64_t c = 0; c < channels; ++c) {
    const A* __restrict row = x + c * ld;
    for (int64_t p = 0; p < padded; ++p) mean[p] += row[p];
  }
  for (int64_t p = 0; p < padded; ++p) mean[p] /= static_cast<A>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    A* __restrict row = x + c * ld;
    for (int64_t p = 0; p < padded; ++p) row[p] -= mean[p];
  }
}

template <typename A>
inline void load_rows(const Relation& relation, const Planes& x, int64_t image, int64_t first, int64_t channels,
                      int64_t length, int64_t padded, int64_t ld, A* rows, A* inverse, A* turns) {
  load_block(relation, x, image, first, channels, length, padded, ld, rows);
  if (relation.rows == PixelRows::pearson) {
    // less the first channel before: a large mean takes no digits, and equal channels become exact zeros
    for (int64_t c = channels - 1; c >= 0; --c) {
      A* row = rows + c * ld;
      for (int64_t p = 0; p < padded; ++p) row[p] -= rows[p];
    }
    centre(rows, channels, padded, ld, turns);
  }
  if (relation.rows == PixelRows::gram) {
    const A root = A(1) / square_root(static_cast<A>(channels));
    for (int64_t p = 0; p < padded; ++p) {
      inverse[p] = root;
      turns[p] = A(0);
    }
  } else {
    pixel_norms(rows, channels, padded, ld, inverse, turns);
  }
  const A* __restrict factor = inverse;
  for (int64_t c = 0; c < channels; ++c) {
    A* __restrict row = rows + c * ld;
    for (int64_t p = 0; p < padded; ++p) row[p] *= factor[p];
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
