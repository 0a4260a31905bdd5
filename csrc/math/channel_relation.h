// channel_relation between its two passes over the pixels: from the channels' products to the value and to the matrix
// that the student is multiplied with. Derivation: medkd_fast/reference/channel_relation.py.
#pragma once

#include "elementary.h"

namespace medkd {
namespace MEDKD_ISA {

constexpr double smallest_channel_norm = 1e-12;

// inverse[c] = 1 / max(norm of channel c, 1e-12), from the products [C, C] of every two channels.
MEDKD_INLINE void inverse_channel_norms(const double* products, int64_t channels, double* inverse) {
  for (int64_t c = 0; c < channels; ++c) {
    const double norm = sqrt(products[c * channels + c]);
    inverse[c] = 1 / (norm < smallest_channel_norm ? smallest_channel_norm : norm);
  }
}

// Row c of the matrix: gradient[c, p] = sum over k of row[k] student[k, p], times `scale` for the sum over all entries
// of (relation of the student - relation of the teacher)^2, of which this row's share is returned.
template <typename A>
MEDKD_INLINE double channel_row(const double* student, const double* teacher, const double* inverse_s,
                                const double* inverse_t, int64_t channels, int64_t c, double scale, A* row) {
  double value = 0, along = 0;
  for (int64_t k = 0; k < channels; ++k) {
    const double relation_s = student[c * channels + k] * inverse_s[c] * inverse_s[k];
    const double relation_t = teacher[c * channels + k] * inverse_t[c] * inverse_t[k];
    const double difference = relation_s - relation_t;
    value += difference * difference;
    along += difference * relation_s;
    row[k] = static_cast<A>(4 * scale * difference * inverse_s[c] * inverse_s[k]);
  }
  // what changes only a channel's length does not change its direction; a channel divided by 1e-12 has none
  if (student[c * channels + c] >= smallest_channel_norm * smallest_channel_norm) {
    const double difference = student[c * channels + c] * inverse_s[c] * inverse_s[c] -
                              teacher[c * channels + c] * inverse_t[c] * inverse_t[c];
    row[c] = static_cast<A>(4 * scale * (difference - along) * inverse_s[c] * inverse_s[c]);
  }
  return value;
}

}  // namespace MEDKD_ISA
}  // namespace medkd
