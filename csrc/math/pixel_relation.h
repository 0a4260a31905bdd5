// pixel_relation, per pixel and between its two passes over the pixels. Derivation:
// medkd_fast/reference/pixel_relation.py.
#pragma once

#include "elementary.h"
#include "team.h"

namespace medkd {
namespace MEDKD_ISA {

MEDKD_INLINE float square_root(float x) { return __builtin_sqrtf(x); }
MEDKD_INLINE double square_root(double x) { return __builtin_sqrt(x); }

template <typename A>
struct PixelNorm {
  A inverse;  // 1 / max(norm, 1e-12)
  A turns;    // 1: the gradient along the pixel's own direction vanishes; 0: the pixel is divided by 1e-12
};

template <typename A>
MEDKD_INLINE PixelNorm<A> pixel_norm(A squares) {
  const A norm = square_root(squares);
  const A smallest = A(1e-12);
  return {A(1) / (norm < smallest ? smallest : norm), norm < smallest ? A(0) : A(1)};
}

// KL(teacher's row, student's row) from the maxima of the logits, the sums of e^(logit - maximum), and the sum of the
// teacher's e^(logit - maximum) times the difference of the logits.
MEDKD_INLINE double row_divergence(double max_s, double sum_s, double max_t, double sum_t, double weighted) {
  return weighted / sum_t + log(sum_s / sum_t) + (max_s - max_t);
}

// a b - c d for a and c not negative: nothing is lost when a is near c and b near d, the result is 0 when they are
// equal, and no term is larger than twice the larger product. (Of two products one would go unrounded into a fused
// multiply-subtract.)
template <typename A>
MEDKD_INLINE A difference_of_products(A a, A b, A c, A d) {
  const bool less = absolute(b) < absolute(d);
  return (a - c) * (less ? b : d) + (less ? c : a) * (b - d);
}

// Relative to a row's maximum. The 0 of a column that does not count may lie far above it.
template <typename A>
MEDKD_INLINE A exp_below(A x, A maximum) {
  return exp_nonpositive(x < maximum ? x - maximum : A(0));
}

// Row i of the matrix for [A; B] from their products [2C, 2C], both triangles: the gradient for the normalised student
// is the matrix times [A; B], times `scale` for the sum over all entries of the squared differences, of which this
// row's share, or a lane's in it, is returned. row: nullptr for a channel that only the teacher has.
template <typename A, typename Team = Alone>
MEDKD_INLINE double pixel_row(const double* products, int64_t channels, int64_t i, double scale, A* row,
                              const Team& team = {}) {
  const int64_t ld = 2 * channels;
  const double* aa = products + i * ld;
  const double* ba = products + (channels + i) * ld;
  double value = 0;
  for (int64_t j = team.lane; j < channels; j += team.lanes) {
    const double ab_ij = aa[channels + j], bb_ij = ba[channels + j];
    value += aa[j] * bb_ij + ba[j] * ab_ij;
    if (row == nullptr) continue;
    row[j] = static_cast<A>(scale * (ab_ij + bb_ij));
    row[channels + j] = static_cast<A>(scale * (aa[j] + ba[j]));
  }
  return value / 2;
}

// Row i's share, or a lane's in it, in the sum of squared differences between the relations of image a's pixels to image
// b's, from the products [2C, 2C] of both.
template <typename Team = Alone>
MEDKD_INLINE double pixel_pair_row(const double* a, const double* b, int64_t channels, int64_t i, const Team& team = {}) {
  const int64_t ld = 2 * channels, difference = i * ld, sum = (channels + i) * ld;
  double value = 0;
  for (int64_t j = team.lane; j < channels; j += team.lanes) {
    const double squares = a[difference + j] * b[sum + channels + j] + a[sum + channels + j] * b[difference + j];
    value += squares / 2 + a[difference + channels + j] * b[sum + j];
  }
  return value / 2;
}

}  // namespace MEDKD_ISA
}  // namespace medkd
