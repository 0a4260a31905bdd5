// spatial_kl: rows are channels over the pixels. One pass takes pieces of all rows of an image, another the gradient.
#pragma once

#include "../math/spatial_kl.h"
#include "planes.h"

namespace medkd {
namespace MEDKD_ISA {

// Channels [C, ld] over the temperature, -infinity at pixels that do not count.
template <typename A>
inline void load_rows(const Relation& relation, const Planes& x, int64_t image, int64_t first, int64_t length,
                      int64_t padded, int64_t ld, A* out) {
  const int64_t channels = relation.student_channels;
  load_tile(x, image, first, channels, length, padded, ld, static_cast<A>(relation.inverse_temperature), out);
  const uint8_t* mask = relation.mask == nullptr ? nullptr : relation.mask + image * relation.pixels + first;
  for (int64_t c = 0; c < channels; ++c) {
    A* row = out + c * ld;
    if (mask != nullptr)
      for (int64_t p = 0; p < length; ++p) row[p] = mask[p] != 0 ? row[p] : -infinity<A>();
    for (int64_t p = length; p < padded; ++p) row[p] = -infinity<A>();
  }
}

template <typename A>
inline A largest(const A* row, int64_t padded) {
  A lane[16];
  for (int64_t j = 0; j < 16; ++j) lane[j] = -infinity<A>();
  for (int64_t p = 0; p < padded; p += 16)
    for (int64_t j = 0; j < 16; ++j) lane[j] = row[p + j] > lane[j] ? row[p + j] : lane[j];
  for (int64_t j = 1; j < 16; ++j) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
  return lane[0];
}

template <typename A>
inline RowPiece piece_of(const A* s, const A* t, int64_t padded) {
  const A max_s = largest(s, padded), max_t = largest(t, padded);
  const A from_s = max_s == -infinity<A>() ? A(0) : max_s;
  const A from_t = max_t == -infinity<A>() ? A(0) : max_t;
  A sum_s[16] = {}, sum_t[16] = {}, weighted[16] = {};
  for (int64_t p = 0; p < padded; p += 16)
    for (int64_t j = 0; j < 16; ++j) {
      const A x_s = s[p + j] - from_s, x_t = t[p + j] - from_t;
      const A e_t = exp_nonpositive(x_t);
      sum_s[j] += exp_nonpositive(x_s);
      sum_t[j] += e_t;
      weighted[j] += weighted_difference(e_t, x_t, x_s);
    }
  return {static_cast<double>(max_s), sum_row(sum_s, 16), static_cast<double>(max_t), sum_row(sum_t, 16),
          sum_row(weighted, 16)};
}

// pieces: five numbers a row, as in RowPiece, of the part's pixels.
template <typename A>
inline void spatial_sums(const Relation& relation, const RelationPart& part, double* pieces) {
  const int64_t channels = relation.student_channels, ld = round_up(part.block, 64) + 16;
  RowPiece* rows = reinterpret_cast<RowPiece*>(pieces);
  const Scratch<A> scratch(2 * channels * ld);
  A* s = scratch.get();
  A* t = s + channels * ld;
  for (int64_t c = 0; c < channels; ++c) rows[c] = {-infinity<double>(), 0, -infinity<double>(), 0, 0};
  for (int64_t first = part.begin; first < part.end; first += part.block) {
    const int64_t length = part.end - first < part.block ? part.end - first : part.block;
    const int64_t padded = round_up(length, 16);
    load_rows(relation, relation.student, part.image, first, length, padded, ld, s);
    load_rows(relation, relation.teacher, part.image, first, length, padded, ld, t);
    for (int64_t c = 0; c < channels; ++c) join(rows[c], piece_of(s + c * ld, t + c * ld, padded));
  }
}

// gradient = upstream scale (ratio e^(u_s - max_s) - e^(u_t - max_t)), exactly 0 for equal rows. A row's max_s, ratio, max_t
// and scale lie side by side; `upstream` has one number for every row or, where the step is 0, one for all.
template <typename A>
inline void spatial_gradient(const Relation& relation, const RelationPart& part, const A* rows, const A* upstream,
                             int64_t upstream_step) {
  const int64_t channels = relation.student_channels, ld = round_up(part.block, 64) + 16;
  const Scratch<A> scratch(2 * channels * ld);
  A* s = scratch.get();
  A* t = s + channels * ld;
  for (int64_t first = part.begin; first < part.end; first += part.block) {
    const int64_t length = part.end - first < part.block ? part.end - first : part.block;
    const int64_t padded = round_up(length, 16);
    load_rows(relation, relation.student, part.image, first, length, padded, ld, s);
    load_rows(relation, relation.teacher, part.image, first, length, padded, ld, t);
    for (int64_t c = 0; c < channels; ++c) {
      const A* of = rows + (part.image * channels + c) * 4;
      const A factor = upstream[(part.image * channels + c) * upstream_step];
      const A max_s = of[0], ratio = of[1], max_t = of[2], scale = factor * of[3];
      A* __restrict row_s = s + c * ld;
      const A* __restrict row_t = t + c * ld;
      for (int64_t p = 0; p < padded; ++p)
        row_s[p] = scale * (ratio * exp_nonpositive(row_s[p] - max_s) - exp_nonpositive(row_t[p] - max_t));
    }
    store_tile(relation.gradient, part.image, first, channels, length, ld, s);
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
