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

}  // namespace MEDKD_ISA
}  // namespace medkd
