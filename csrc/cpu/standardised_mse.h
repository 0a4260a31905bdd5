// standardised_mse: rows are channels over the pixels of the batch. One pass adds up five sums a row, in double; the gradient
// is another. Derivation: medkd_fast/reference/standardised_mse.py.
#pragma once

#include "../math/standardised_mse.h"
#include "relation.h"

namespace medkd {
namespace MEDKD_ISA {

// Pixels of a block are a multiple of this, those behind the last one 0.
constexpr int64_t moment_pixels = 16;

template <typename A>
constexpr Type type_in_memory = sizeof(A) == sizeof(double) ? Type::float64 : Type::float32;

// Rows, or a pixel's channels, that are read or written as they lie.
template <typename A>
inline bool lies_in_rows(const Planes& x) {
  return x.stride_n == 1 && x.type == type_in_memory<A>;
}
template <typename A>
inline bool lies_in_columns(const Planes& x) {
  return x.stride_c == 1 && x.stride_n != 1 && x.type == type_in_memory<A>;
}
template <typename A>
inline const A* column(const Planes& x, int64_t image, int64_t pixel, int64_t channel) {
  return static_cast<const A*>(x.data) + image * x.stride_b + pixel * x.stride_n + channel;
}

// A block of a few channels' pixels: in the tensor itself, if it may be taken as it lies, or, converted and without what the mask
// leaves out, in scratch memory.
template <typename A>
struct Rows {
  const A* data;
  int64_t ld;

  const A* row(int64_t c) const { return data + c * ld; }
};

template <typename A>
inline Rows<A> rows_of(const Relation& relation, const Planes& x, bool as_it_lies, int64_t image, int64_t channel,
                       int64_t channels, int64_t first, int64_t length, int64_t padded, int64_t ld, A* scratch) {
  if (as_it_lies && lies_in_rows<A>(x))
    return {static_cast<const A*>(x.data) + image * x.stride_b + channel * x.stride_c + first, x.stride_c};
  load_block(relation, from_channel(x, channel), image, first, channels, length, padded, ld, scratch);
  return {scratch, ld};
}

// Neighbours in memory, as many as a vector has doubles. (Written out, this becomes one instruction; __builtin_convertvector of
// gcc 12 goes by way of memory.)
template <typename A, int... lane>
MEDKD_INLINE Vector<double> load_lanes(const A* from, std::integer_sequence<int, lane...>) {
  return Vector<double>{static_cast<double>(from[lane])...};
}
template <typename A>
MEDKD_INLINE Vector<double> load_wide(const A* from) {
  return load_lanes(from, std::make_integer_sequence<int, vector_lanes<double>>());
}

struct Moments {
  Vector<double> s{}, t{}, ss{}, tt{}, st{};

  template <typename A>
  MEDKD_INLINE void add(const A* from_s, const A* from_t) {
    const Vector<double> x = load_wide(from_s), y = load_wide(from_t);
    s += x;
    t += y;
    ss += x * x;
    tt += y * y;
    st += x * y;
  }

  // Adds every lane to a channel's sums, of which the five lie `step` apart.
  MEDKD_INLINE void store(int64_t step, double* sums) const {
    const Vector<double> all[5] = {s, t, ss, tt, st};
    for (int k = 0; k < 5; ++k) store_loose<double>(load_loose(sums + k * step) + all[k], sums + k * step);
  }
};

// Of two vectors' lanes, in pairs.
MEDKD_INLINE double sum_lanes(Vector<double> x, Vector<double> y) {
  constexpr int lanes = vector_lanes<double>;
  Vector<double> both = x + y;
  double lane[lanes];
  store_loose<double>(both, lane);
  for (int half = lanes / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  return lane[0];
}

// sums [5], `step` apart, += those of a block of a row. A lane adds up few enough products that what is rounded off a constant
// row stays far below what tells it from others.
template <typename A>
inline void add_moments(const A* s, const A* t, int64_t padded, int64_t step, double* sums) {
  constexpr int64_t lanes = vector_lanes<double>;
  Moments one, two;  // two chains of additions, or each would wait for the one before
  for (int64_t p = 0; p < padded; p += moment_pixels)
#pragma GCC unroll 4
    for (int64_t k = 0; k < moment_pixels; k += 2 * lanes) {
      one.add(s + p + k, t + p + k);
      two.add(s + p + k + lanes, t + p + k + lanes);
    }
  sums[0] += sum_lanes(one.s, two.s);
  sums[step] += sum_lanes(one.t, two.t);
  sums[2 * step] += sum_lanes(one.ss, two.ss);
  sums[3 * step] += sum_lanes(one.tt, two.tt);
  sums[4 * step] += sum_lanes(one.st, two.st);
}

// Where channels lie side by side: the sums of as many as fill vectors, which this returns.
template <typename A>
inline int64_t add_moments_of_columns(const Relation& relation, const RelationPart& part, double* sums) {
  constexpr int64_t lanes = vector_lanes<double>, pixels = 64;  // of both networks in the first-level cache
  const Planes &student = relation.student, &teacher = relation.teacher;
  const int64_t count = (part.last_row - part.first_row) / (2 * lanes) * (2 * lanes), step = relation.student_channels;
  for (int64_t first = part.begin; first < part.end; first += pixels) {
    const int64_t length = part.end - first < pixels ? part.end - first : pixels;
    for (int64_t c = part.first_row; c < part.first_row + count; c += 2 * lanes) {
      const A* s = column<A>(student, part.image, first, c);
      const A* t = column<A>(teacher, part.image, first, c);
      Moments one, two;
      for (int64_t p = 0; p < length; ++p, s += student.stride_n, t += teacher.stride_n) {
        one.add(s, t);
        two.add(s + lanes, t + lanes);
      }
      one.store(step, sums + c);
      two.store(step, sums + c + lanes);
    }
  }
  return count;
}

// Channels that are in scratch memory together: where their pixels lie apart, all of a part's.
inline int64_t channels_at_once(const Relation& relation, int64_t channels) {
  return relation.student.stride_n == 1 && relation.teacher.stride_n == 1 ? 1 : channels;
}

// sums [5, C] of channels [first_row, last_row).
template <typename A>
inline void standardised_sums(const Relation& relation, const RelationPart& part, double* sums) {
  int64_t begin = part.first_row;
  if (relation.mask == nullptr && lies_in_columns<A>(relation.student) && lies_in_columns<A>(relation.teacher))
    begin += add_moments_of_columns<A>(relation, part, sums);
  const int64_t group = channels_at_once(relation, part.last_row - begin), ld = part.block + 16;
  if (group == 0) return;
  const Scratch<A> scratch(2 * group * ld);
  for (int64_t c = begin; c < part.last_row; c += group)
    for (int64_t first = part.begin; first < part.end; first += part.block) {
      const int64_t length = part.end - first < part.block ? part.end - first : part.block;
      const int64_t padded = round_up(length, moment_pixels);
      const bool as_they_lie = relation.mask == nullptr && length == padded;
      const Rows<A> s = rows_of(relation, relation.student, as_they_lie, part.image, c, group, first, length, padded, ld,
                                scratch.get());
      const Rows<A> t = rows_of(relation, relation.teacher, as_they_lie, part.image, c, group, first, length, padded, ld,
                                scratch.get() + group * ld);
      for (int64_t k = 0; k < group; ++k)
        add_moments(s.row(k), t.row(k), padded, relation.student_channels, sums + c + k);
    }
}

template <typename A>
inline void gradient_of_row(const A* __restrict s, const A* __restrict t, const uint8_t* mask, int64_t length,
                            const StandardisedGradient& of, A* __restrict out) {
  for (int64_t p = 0; p < length; ++p)
    out[p] = static_cast<A>(of.at(static_cast<double>(s[p]), static_cast<double>(t[p])));
  if (mask != nullptr)
    for (int64_t p = 0; p < length; ++p) out[p] = mask[p] != 0 ? out[p] : A(0);
}

template <typename A>
inline void gradient_of_columns(const Relation& relation, const RelationPart& part, const double* of_channels) {
  const int64_t channels = relation.student_channels, c = part.first_row, count = part.last_row - c;
  const uint8_t* mask = relation.mask == nullptr ? nullptr : relation.mask + part.image * relation.pixels;
  const double* __restrict of_both = of_channels + c;
  const double* __restrict of_t = of_both + channels;
  const double* __restrict constant = of_t + channels;
  for (int64_t p = part.begin; p < part.end; ++p) {
    const A* __restrict s = column<A>(relation.student, part.image, p, c);
    const A* __restrict t = column<A>(relation.teacher, part.image, p, c);
    A* __restrict out = const_cast<A*>(column<A>(relation.gradient, part.image, p, c));
    if (mask != nullptr && mask[p] == 0) {
      for (int64_t k = 0; k < count; ++k) out[k] = A(0);
      continue;
    }
    for (int64_t k = 0; k < count; ++k)
      out[k] = static_cast<A>(StandardisedGradient{of_both[k], of_t[k], constant[k]}.at(static_cast<double>(s[k]),
                                                                                       static_cast<double>(t[k])));
  }
}

// of_channels: three numbers each, as in StandardisedGradient, [3, C]
template <typename A>
inline void standardised_gradient(const Relation& relation, const RelationPart& part,
                                  const double* of_channels) {
  const int64_t channels = relation.student_channels;
  const Planes& gradient = relation.gradient;
  if (part.last_row - part.first_row >= vector_lanes<A> && lies_in_columns<A>(relation.student) &&
      lies_in_columns<A>(relation.teacher) && lies_in_columns<A>(gradient))
    return gradient_of_columns<A>(relation, part, of_channels);
  const int64_t group = gradient.stride_n == 1 ? channels_at_once(relation, part.last_row - part.first_row)
                                               : part.last_row - part.first_row;
  const int64_t ld = part.block + 16;
  const bool in_rows = lies_in_rows<A>(gradient);
  const Scratch<A> scratch(3 * group * ld);
  A* const written = scratch.get() + 2 * group * ld;
  for (int64_t c = part.first_row; c < part.last_row; c += group)
    for (int64_t first = part.begin; first < part.end; first += part.block) {
      const int64_t length = part.end - first < part.block ? part.end - first : part.block;
      const int64_t padded = round_up(length, moment_pixels);
      const Rows<A> s = rows_of(relation, relation.student, true, part.image, c, group, first, length, padded, ld,
                                scratch.get());
      const Rows<A> t = rows_of(relation, relation.teacher, true, part.image, c, group, first, length, padded, ld,
                                scratch.get() + group * ld);
      const uint8_t* mask = relation.mask == nullptr ? nullptr : relation.mask + part.image * relation.pixels + first;
      for (int64_t k = 0; k < group; ++k) {
        A* const out = in_rows ? static_cast<A*>(gradient.data) + part.image * gradient.stride_b +
                                     (c + k) * gradient.stride_c + first
                               : written + k * ld;
        const double* of = of_channels + c + k;
        gradient_of_row(s.row(k), t.row(k), mask, length, {of[0], of[channels], of[2 * channels]}, out);
      }
      if (!in_rows) store_tile(from_channel(gradient, c), part.image, first, group, length, ld, written);
    }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
