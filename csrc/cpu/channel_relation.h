// channel_relation and channel_gram: the products of every two channels, summed over pixels, and a small matrix times
// the features. What happens between the two is in math/channel_relation.h; the derivation in
// medkd_fast/reference/channel_relation.py.
#pragma once

#include "relation.h"

namespace medkd {
namespace MEDKD_ISA {

// Rows of a block: the channels, and one of ones where they are shifted.
inline int64_t channel_rows(const Relation& relation) {
  return relation.student_channels + (relation.features == Features::plain ? 0 : 1);
}

// The features as they are multiplied; zero at pixels that do not count.
template <typename A>
inline void load_channels(const Relation& relation, const Planes& x, const A* shift, int64_t image, int64_t first,
                          int64_t length, int64_t padded, int64_t ld, A* out) {
  const int64_t channels = relation.student_channels;
  load_block(relation, x, image, first, channels, length, padded, ld, out);
  if (relation.features == Features::plain) return;
  A* __restrict ones = out + channels * ld;
  const uint8_t* mask = relation.mask == nullptr ? nullptr : relation.mask + image * relation.pixels + first;
  for (int64_t p = 0; p < length; ++p) ones[p] = mask == nullptr || mask[p] != 0 ? A(1) : A(0);
  for (int64_t p = length; p < padded; ++p) ones[p] = A(0);
  const A inverse_temperature = static_cast<A>(relation.inverse_temperature);
  for (int64_t c = 0; c < channels; ++c) {
    A* __restrict row = out + c * ld;
    const A from = shift[c];
    if (relation.features == Features::centred) {
      for (int64_t p = 0; p < padded; ++p) row[p] = (row[p] - from) * ones[p];
    } else {
      for (int64_t p = 0; p < padded; ++p) {
        const A e = exp_nonpositive((row[p] - from) * inverse_temperature);
        row[p] = ones[p] != A(0) ? e : A(0);
      }
    }
  }
}

// The first `channel_rows` rows are the student's and the next the teacher's; sums is [2, rows, rows], its upper
// triangles.
template <typename A>
inline void channel_sums(const Relation& relation, const RelationPart& part, double* sums) {
  const int64_t rows = channel_rows(relation), ld = block_ld(part.block);
  const Scratch<A> scratch(rows * ld);
  for (int64_t first = part.begin; first < part.end; first += part.block) {
    const int64_t length = part.end - first < part.block ? part.end - first : part.block;
    const int64_t padded = round_up(length, pixel_multiple);
    for (int64_t which = 0; which < 2; ++which) {
      const int64_t origin = which * rows;
      const int64_t begin = part.first_row < origin ? 0 : part.first_row - origin;
      const int64_t end = part.last_row > origin + rows ? rows : part.last_row - origin;
      if (begin >= end) continue;
      const Planes& x = which == 0 ? relation.student : relation.teacher;
      const A* shift = static_cast<const A*>(which == 0 ? relation.student_shift : relation.teacher_shift);
      if (shift != nullptr) shift += part.image * relation.student_channels;
      load_channels(relation, x, shift, part.image, first, length, padded, ld, scratch.get());
      dot_products(scratch.get(), rows, ld, padded, begin, end, sums + which * rows * rows);
    }
  }
}

// gradient[c, p] = factor * sum over k of matrix[c, k] features[k, p]; for softmax times features[c, p]. Where the
// features are shifted, the matrix's last row is what they are shifted by.
template <typename A>
inline void channel_gradient(const Relation& relation, const RelationPart& part, const A* matrix, A factor) {
  const int64_t channels = relation.student_channels, rows = channel_rows(relation), ld = block_ld(part.block);
  const Scratch<A> scratch((rows + channels) * ld);
  A* x = scratch.get();
  A* out = x + rows * ld;
  for (int64_t first = part.begin; first < part.end; first += part.block) {
    const int64_t length = part.end - first < part.block ? part.end - first : part.block;
    const int64_t padded = round_up(length, pixel_multiple);
    load_channels(relation, relation.student, matrix + channels * rows, part.image, first, length, padded, ld, x);
    product(matrix, channels, rows, x, ld, padded, factor, out);
    if (relation.features == Features::exponential)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t p = 0; p < padded; ++p) out[c * ld + p] *= x[c * ld + p];
    store_tile(relation.gradient, part.image, first, channels, length, ld, out);
  }
}

// shift[c] = the mean of 64 of the `valid` pixels that count, evenly spread. It need only be near the mean: what is
// left of it comes with the sums.
template <typename A>
inline void channel_sample_mean(const Relation& relation, const Planes& x, int64_t image, int64_t valid, A* shift) {
  const int64_t channels = relation.student_channels, samples = valid < 64 ? valid : 64;
  const uint8_t* mask = relation.mask == nullptr ? nullptr : relation.mask + image * relation.pixels;
  const Scratch<A> value(channels);
  const Scratch<double> sum(channels);
  for (int64_t c = 0; c < channels; ++c) sum.get()[c] = 0;
  int64_t pixel = -1, passed = 0;  // pixels that count, up to this one
  for (int64_t k = 0; k < samples; ++k) {
    const int64_t wanted = k * valid / samples + 1;
    if (mask == nullptr) pixel = wanted - 1;
    for (; mask != nullptr && passed < wanted; passed += mask[pixel] != 0) ++pixel;
    load_tile(x, image, pixel, channels, 1, 1, 1, A(1), value.get());
    for (int64_t c = 0; c < channels; ++c) sum.get()[c] += static_cast<double>(value.get()[c]);
  }
  for (int64_t c = 0; c < channels; ++c)
    shift[c] = static_cast<A>(samples == 0 ? 0.0 : sum.get()[c] / static_cast<double>(samples));
}

// highest[c] = the largest value of channel c among the part's pixels that count, -infinity where none does.
template <typename A>
inline void channel_highest(const Relation& relation, const Planes& x, const RelationPart& part, A* highest) {
  const int64_t channels = relation.student_channels, ld = block_ld(part.block);
  const uint8_t* mask = relation.mask == nullptr ? nullptr : relation.mask + part.image * relation.pixels;
  const Scratch<A> scratch(channels * ld);
  for (int64_t c = 0; c < channels; ++c) highest[c] = -infinity<A>();
  for (int64_t first = part.begin; first < part.end; first += part.block) {
    const int64_t length = part.end - first < part.block ? part.end - first : part.block;
    const int64_t padded = round_up(length, pixel_multiple);
    load_tile(x, part.image, first, channels, length, padded, ld, A(1), scratch.get());
    for (int64_t c = 0; c < channels; ++c) {
      A* row = scratch.get() + c * ld;
      if (mask != nullptr)
        for (int64_t p = 0; p < length; ++p) row[p] = mask[first + p] != 0 ? row[p] : -infinity<A>();
      for (int64_t p = length; p < padded; ++p) row[p] = -infinity<A>();
      A lane[16];
      for (int64_t j = 0; j < 16; ++j) lane[j] = highest[c];
      for (int64_t p = 0; p < padded; p += 16)
        for (int64_t j = 0; j < 16; ++j) lane[j] = row[p + j] > lane[j] ? row[p + j] : lane[j];
      for (int64_t j = 0; j < 16; ++j) highest[c] = lane[j] > highest[c] ? lane[j] : highest[c];
    }
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
