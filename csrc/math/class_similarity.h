// A pixel's cosine with its class's prototype, and what its gradient is made of. Derivation:
// medkd_fast/reference/class_similarity.py.
#pragma once

#include "pixel_relation.h"

namespace medkd {
namespace MEDKD_ISA {

constexpr double prototype_epsilon = 1e-6;   // added to the number of a class's pixels
constexpr double shortest_square = 1e-16;    // of a norm that is divided by

// 1 / max(norm, 1e-8)
template <typename A>
MEDKD_INLINE A inverse_norm(A square) {
  return A(1) / square_root(square > A(shortest_square) ? square : A(shortest_square));
}

// Whether a vector's norm is its own, and not the constant that stands for a shorter one.
template <typename A>
MEDKD_INLINE bool has_norm(A inverse) {
  return inverse < A(1e8);
}

// The gradient for a pixel's feature is of_prototype times its class's prototype plus of_feature times itself (plus what comes
// through the prototype).
template <typename A>
struct SimilarityGradient {
  A of_prototype, of_feature;
};

template <typename A>
MEDKD_INLINE SimilarityGradient<A> similarity_gradient(A upstream, A similarity, A inverse_feature, A inverse_prototype) {
  const A along = upstream * inverse_feature;
  return {along * inverse_prototype, has_norm(inverse_feature) ? -along * similarity * inverse_feature : A(0)};
}

}  // namespace MEDKD_ISA
}  // namespace medkd
