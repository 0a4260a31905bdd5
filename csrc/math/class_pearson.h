// The correlation of two centred vectors from their products, and its gradient. Derivation:
// medkd_fast/reference/class_pearson.py.
#pragma once

#include "pixel_relation.h"

namespace medkd {
namespace MEDKD_ISA {

template <typename A>
struct Correlation {
  A value;
  A along_t, along_s;  // the gradient for the student's vector is along_t times the teacher's plus along_s times its own
};

template <typename A>
MEDKD_INLINE Correlation<A> correlation(A product, A square_s, A square_t) {
  const A norm_s = square_root(square_s), norm_t = square_root(square_t);
  const A along_t = A(1) / (norm_s * norm_t + A(1e-8));
  const A value = product * along_t;
  return {value, along_t, norm_s > A(0) ? -value * along_t * norm_t / norm_s : A(0)};
}

// A class from its sums over `number` pixels: its correlation, and its gradient for q_s, which is
// of_t (q_t - mean_t) + of_s (q_s - mean_s).
struct ClassTerms {
  double correlation, of_t, of_s, mean_s, mean_t;
};

MEDKD_INLINE ClassTerms class_terms(double number, double sum_s, double sum_t, double sum_ss, double sum_tt,
                                    double sum_st) {
  const double mean_s = sum_s / number, mean_t = sum_t / number;
  const double square_s = sum_ss - number * mean_s * mean_s, square_t = sum_tt - number * mean_t * mean_t;
  // a square can be rounded to just below 0
  const Correlation<double> k = correlation(sum_st - number * mean_s * mean_t, square_s > 0 ? square_s : 0.0,
                                            square_t > 0 ? square_t : 0.0);
  return {k.value, k.along_t, k.along_s, mean_s, mean_t};
}

}  // namespace MEDKD_ISA
}  // namespace medkd
