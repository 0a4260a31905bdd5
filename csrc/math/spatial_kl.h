// spatial_kl between its passes over the pixels: joining what pieces of a row leave behind, and the row's divergence.
// Derivation: medkd_fast/reference/spatial_kl.py.
#pragma once

#include "decoupled_kl.h"

namespace medkd {
namespace MEDKD_ISA {

// A piece of one row, and the same of the teacher's: the largest u = z / τ, the sum of e^(u - max), and the sum of the
// teacher's e^(u - max) times the difference of both networks' u - max. Nothing in the piece: maxima -infinity, sums 0.
struct RowPiece {
  double max_s, sum_s, max_t, sum_t, weighted;
};

// How far a maximum moves; no distance from -infinity to itself.
MEDKD_INLINE double moved(double from, double to) { return from == to ? 0.0 : from - to; }

// The piece with its sums relative to the maxima `max_s` and `max_t`, which are not smaller than its own.
MEDKD_INLINE void raise_maxima(RowPiece& piece, double max_s, double max_t) {
  const double by_s = moved(piece.max_s, max_s), by_t = moved(piece.max_t, max_t);
  // without the teacher there is nothing to weigh; what is infinitely far stays so
  if (piece.sum_t > 0 && piece.weighted != infinity<double>()) piece.weighted = exp(by_t) * (piece.weighted + piece.sum_t * (by_t - by_s));
  piece.sum_s *= exp(by_s);
  piece.sum_t *= exp(by_t);
  piece.max_s = max_s;
  piece.max_t = max_t;
}

MEDKD_INLINE void join(RowPiece& row, RowPiece piece) {
  const double max_s = row.max_s > piece.max_s ? row.max_s : piece.max_s;
  const double max_t = row.max_t > piece.max_t ? row.max_t : piece.max_t;
  raise_maxima(row, max_s, max_t);
  raise_maxima(piece, max_s, max_t);
  row.sum_s += piece.sum_s;
  row.sum_t += piece.sum_t;
  row.weighted += piece.weighted;
}

MEDKD_INLINE double divergence_of_row(const RowPiece& row) {
  return divergence(row.sum_s, row.sum_t, inverse_of_sum(row.sum_t), row.weighted);
}

}  // namespace MEDKD_ISA
}  // namespace medkd
