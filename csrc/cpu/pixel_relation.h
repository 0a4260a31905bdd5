// pixel_relation with divergence "mse": with S and T the normalised features, A = S - T and B = S + T, the products of
// every two rows of [A; B] summed over pixels, and a small matrix times [A; B]. What happens between the two is in
// pixel_relation.cpp; the derivation in medkd_fast/reference/pixel_relation.py.
#pragma once

#include "pixel_rows.h"

namespace medkd {
namespace MEDKD_ISA {

// A block of [A; B] in scratch memory. Each has as many channels as the wider of student and teacher; in the narrower
// one the others are 0.
template <typename A>
struct PixelBlock {
  int64_t channels, ld, padded;
  A* rows;       // [2 channels, ld]
  A* inverse_s;  // [ld] and so on: see PixelNorm
  A* turns_s;
  A* inverse_t;
  A* turns_t;
};

inline int64_t wider(const Relation& relation) {
  return relation.student_channels > relation.teacher_channels ? relation.student_channels : relation.teacher_channels;
}

inline int64_t pixel_block_size(const Relation& relation, int64_t block) {
  return (2 * wider(relation) + 4) * block_ld(block);
}

template <typename A>
inline PixelBlock<A> pixel_block(const Relation& relation, int64_t block, A* scratch) {
  const int64_t channels = wider(relation), ld = block_ld(block);
  A* rest = scratch + 2 * channels * ld;
  return {channels, ld, 0, scratch, rest, rest + ld, rest + 2 * ld, rest + 3 * ld};
}

template <typename A>
inline void load_normalised(const Relation& relation, const Planes& x, int64_t image, int64_t first, int64_t channels,
                            int64_t length, int64_t padded, const PixelBlock<A>& block, A* rows, A* inverse, A* turns) {
  load_rows(relation, x, image, first, channels, length, padded, block.ld, rows, inverse, turns);
  for (int64_t c = channels; c < block.channels; ++c)
    for (int64_t p = 0; p < padded; ++p) rows[c * block.ld + p] = A(0);
}

template <typename A>
inline void load_pixels(const Relation& relation, int64_t image, int64_t first, int64_t length, PixelBlock<A>& block) {
  block.padded = round_up(length, pixel_multiple);
  A* student = block.rows;
  A* teacher = block.rows + block.channels * block.ld;
  // as many pixels at a time as stay in the first-level cache
  const int64_t fitting = 8192 / (2 * block.channels) / pixel_multiple * pixel_multiple;
  const int64_t step = fitting < pixel_multiple ? pixel_multiple : fitting;
  for (int64_t q = 0; q < length; q += step) {
    const int64_t some = length - q < step ? length - q : step, padded = round_up(some, pixel_multiple);
    load_normalised(relation, relation.student, image, first + q, relation.student_channels, some, padded, block,
                    student + q, block.inverse_s + q, block.turns_s + q);
    load_normalised(relation, relation.teacher, image, first + q, relation.teacher_channels, some, padded, block,
                    teacher + q, block.inverse_t + q, block.turns_t + q);
    // S and T were rounded to memory alike. Were they products in this loop, one of them would go into a fused
    // multiply-subtract unrounded, and equal features would differ.
    for (int64_t c = 0; c < block.channels; ++c) {
      A* __restrict a = student + c * block.ld + q;
      A* __restrict b = teacher + c * block.ld + q;
      for (int64_t p = 0; p < padded; ++p) {
        const A s = a[p], t = b[p];
        a[p] = s - t;
        b[p] = s + t;
      }
    }
  }
}

// sums is [2 channels, 2 channels], its upper triangle.
template <typename A>
inline void pixel_sums(const Relation& relation, const RelationPart& part, double* sums) {
  const Scratch<A> scratch(pixel_block_size(relation, part.block));
  PixelBlock<A> block = pixel_block(relation, part.block, scratch.get());
  for (int64_t first = part.begin; first < part.end; first += part.block) {
    const int64_t length = part.end - first < part.block ? part.end - first : part.block;
    load_pixels(relation, part.image, first, length, block);
    dot_products(block.rows, 2 * block.channels, block.ld, block.padded, part.first_row, part.last_row, sums);
  }
}

// The gradient for the normalised student is factor * matrix [A; B]; then through the division by the norm.
template <typename A>
inline void pixel_gradient(const Relation& relation, const RelationPart& part, const A* matrix, A factor) {
  const int64_t channels = relation.student_channels, ld = block_ld(part.block);
  const Scratch<A> scratch(pixel_block_size(relation, part.block) + (channels + 1) * ld);
  PixelBlock<A> block = pixel_block(relation, part.block, scratch.get());
  A* out = scratch.get() + pixel_block_size(relation, part.block);
  A* __restrict along = out + channels * ld;  // half of the gradient's share along S = (A + B) / 2
  for (int64_t first = part.begin; first < part.end; first += part.block) {
    const int64_t length = part.end - first < part.block ? part.end - first : part.block;
    load_pixels(relation, part.image, first, length, block);
    product(matrix, channels, 2 * block.channels, block.rows, ld, block.padded, factor, out);
    const A* __restrict inverse = block.inverse_s;
    const A* __restrict turns = block.turns_s;
    for (int64_t p = 0; p < block.padded; ++p) along[p] = A(0);
    for (int64_t c = 0; c < channels; ++c) {
      const A* __restrict a = block.rows + c * ld;
      const A* __restrict b = block.rows + (block.channels + c) * ld;
      const A* __restrict g = out + c * ld;
      for (int64_t p = 0; p < block.padded; ++p) along[p] += (a[p] + b[p]) * g[p];
    }
    for (int64_t p = 0; p < block.padded; ++p) along[p] *= A(0.25) * turns[p];
    for (int64_t c = 0; c < channels; ++c) {
      const A* __restrict a = block.rows + c * ld;
      const A* __restrict b = block.rows + (block.channels + c) * ld;
      A* __restrict g = out + c * ld;
      for (int64_t p = 0; p < block.padded; ++p) g[p] = (g[p] - (a[p] + b[p]) * along[p]) * inverse[p];
    }
    if (relation.rows == PixelRows::pearson) centre(out, channels, block.padded, ld, along);
    store_tile(relation.gradient, part.image, first, channels, length, ld, out);
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
