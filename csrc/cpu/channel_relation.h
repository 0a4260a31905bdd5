// channel_relation: the products of every two channels, summed over pixels, and a small matrix times the student.
// What happens between the two is in channel_relation.cpp; the derivation in medkd_fast/reference/channel_relation.py.
#pragma once

#include "relation.h"

namespace medkd {
namespace MEDKD_ISA {

// Rows 0 to C are the student's channels and rows C to 2C the teacher's; sums is [2, C, C], its upper triangles.
template <typename A>
inline void channel_sums(const Relation& relation, const RelationPart& part, double* sums) {
  const int64_t channels = relation.student_channels, ld = block_ld(part.block);
  const Scratch<A> scratch(channels * ld);
  for (int64_t first = part.begin; first < part.end; first += part.block) {
    const int64_t length = part.end - first < part.block ? part.end - first : part.block;
    const int64_t padded = round_up(length, pixel_multiple);
    for (int64_t which = 0; which < 2; ++which) {
      const int64_t origin = which * channels;
      const int64_t begin = part.first_row < origin ? 0 : part.first_row - origin;
      const int64_t end = part.last_row > origin + channels ? channels : part.last_row - origin;
      if (begin >= end) continue;
      const Planes& x = which == 0 ? relation.student : relation.teacher;
      load_block(relation, x, part.image, first, channels, length, padded, ld, scratch.get());
      dot_products(scratch.get(), channels, ld, padded, begin, end, sums + which * channels * channels);
    }
  }
}

// gradient[c, p] = factor * sum over k of matrix[c, k] student[k, p]
template <typename A>
inline void channel_gradient(const Relation& relation, const RelationPart& part, const A* matrix, A factor) {
  const int64_t channels = relation.student_channels, ld = block_ld(part.block);
  const Scratch<A> scratch(2 * channels * ld);
  A* x = scratch.get();
  A* out = x + channels * ld;
  for (int64_t first = part.begin; first < part.end; first += part.block) {
    const int64_t length = part.end - first < part.block ? part.end - first : part.block;
    const int64_t padded = round_up(length, pixel_multiple);
    load_block(relation, relation.student, part.image, first, channels, length, padded, ld, x);
    product(matrix, channels, channels, x, ld, padded, factor, out);
    store_tile(relation.gradient, part.image, first, channels, length, ld, out);
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
