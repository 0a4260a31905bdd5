// channel_relation and channel_gram between their passes over the pixels: from the channels' products to the relation
// and the divergence, and back to the matrix that the features are multiplied with. Everything is C×C and in double.
// Derivation: medkd_fast/reference/channel_relation.py.
#pragma once

#include <string>

#include "elementary.h"
#include "team.h"

namespace medkd {
namespace MEDKD_ISA {

enum class ChannelKind { cosine, pearson, gram, row, softmax };
enum class Divergence { mse, mse_of_pairs, kl };  // of pairs: without what a channel is to itself

inline ChannelKind kind_named(const std::string& name) {
  if (name == "cosine") return ChannelKind::cosine;
  if (name == "pearson") return ChannelKind::pearson;
  if (name == "gram") return ChannelKind::gram;
  return name == "row" ? ChannelKind::row : ChannelKind::softmax;
}

inline Divergence divergence_named(const std::string& name) {
  if (name == "mse_of_pairs") return Divergence::mse_of_pairs;
  return name == "kl" ? Divergence::kl : Divergence::mse;
}

constexpr double smallest_channel_norm = 1e-12;

// Pearson takes a channel minus nearly its mean, softmax the exponentials of a channel minus its maximum; both come
// with a row of ones at the pixels that count, the last of `rows`, whose products are the channels' sums.
MEDKD_INLINE bool is_shifted(ChannelKind kind) { return kind == ChannelKind::pearson || kind == ChannelKind::softmax; }

// 1 / max(norm, 1e-12). A centred square can round to just below 0.
MEDKD_INLINE double inverse_channel_norm(double square) {
  const double norm = sqrt(square < 0 ? 0.0 : square);
  return 1 / (norm < smallest_channel_norm ? smallest_channel_norm : norm);
}

// Whether a row has a direction: one that is divided by 1e-12 is divided by a constant.
MEDKD_INLINE bool turns(double inverse_norm) { return inverse_norm < 1 / smallest_channel_norm; }

// matrix, in: the products [rows, rows] of every two channels; out: their relation, at the same stride.
// left[c] is what row c was multiplied by, and mean[c] what was left of channel c's mean (pearson; else 0).
template <typename Team = Alone>
MEDKD_INLINE void relation_of_products(ChannelKind kind, double* matrix, int64_t rows, int64_t channels, double pixels,
                                       double* left, double* mean, const Team& team = {}) {
  for (int64_t c = team.first_row; c < channels; c += team.row_step) {
    const double* row = matrix + c * rows;
    const double rest = kind == ChannelKind::pearson ? row[channels] / pixels : 0.0;
    double square = row[c] - pixels * rest * rest;
    if (kind == ChannelKind::row) {
      square = 0;
      for (int64_t k = team.lane; k < channels; k += team.lanes) square += row[k] * row[k];
      square = team.sum(square);
    }
    if (team.lane != 0) continue;
    mean[c] = rest;
    left[c] = inverse_channel_norm(square);
    if (kind == ChannelKind::gram) left[c] = 1 / pixels;
    if (kind == ChannelKind::softmax) left[c] = row[channels] == 0 ? 0.0 : 1 / row[channels];  // 0: no pixel counts
  }
  team.wait();
  const bool by_rows = kind == ChannelKind::gram || kind == ChannelKind::row;
  for (int64_t c = team.first_row; c < channels; c += team.row_step) {
    double* row = matrix + c * rows;
    // every product of two factors alone, so that entries (c, k) and (k, c) are the same number
    for (int64_t k = team.lane; k < channels; k += team.lanes)
      row[k] = by_rows ? row[k] * left[c] : (row[k] - pixels * (mean[c] * mean[k])) * (left[c] * left[k]);
  }
  team.wait();
}

// The divergence of row c of the student's relation from the teacher's, to be multiplied by `scale`, or a lane's share
// in it; v_row is the gradient of the product for the student's row.
template <typename Team = Alone>
MEDKD_INLINE double divergence_of_rows(Divergence divergence, int64_t c, const double* student, const double* teacher,
                                       int64_t channels, double temperature, double scale, double* v_row,
                                       const Team& team = {}) {
  double value = 0;
  if (divergence != Divergence::kl) {
    const int64_t left_out = divergence == Divergence::mse ? channels : c;
    for (int64_t k = team.lane; k < channels; k += team.lanes) {
      const double difference = k == left_out ? 0.0 : student[k] - teacher[k];
      value += difference * difference;
      v_row[k] = 2 * scale * difference;
    }
    return value;
  }
  double most_s = student[0], most_t = teacher[0], sum_s = 0, sum_t = 0;
  for (int64_t k = team.lane; k < channels; k += team.lanes) {
    most_s = student[k] > most_s ? student[k] : most_s;
    most_t = teacher[k] > most_t ? teacher[k] : most_t;
  }
  most_s = team.most(most_s);
  most_t = team.most(most_t);
  for (int64_t k = team.lane; k < channels; k += team.lanes) {
    sum_s += exp((student[k] - most_s) / temperature);
    v_row[k] = exp((teacher[k] - most_t) / temperature);
    sum_t += v_row[k];
  }
  sum_s = team.sum(sum_s);
  sum_t = team.sum(sum_t);
  // d = log q - log p. The sum of p (e^d - 1 - d) over the row is KL, since p and q have the same sum; no term of it is
  // negative, and none is lost where q is close to p.
  const double shift = (most_s - most_t) / temperature + log(sum_s / sum_t);
  for (int64_t k = team.lane; k < channels; k += team.lanes) {
    const double p = v_row[k] / sum_t, d = (student[k] - teacher[k]) / temperature - shift;
    // e^d may overflow where p has underflown
    const double gained = d < 1 ? p * expm1(d) : exp((student[k] - most_s) / temperature) / sum_s - p;
    value += gained - p * d;
    v_row[k] = scale / temperature * gained;
  }
  return value;
}

// From v [channels, channels], the gradient for the relation (used up), to the matrix [rows, rows] of the gradient for
// the features as they were multiplied: matrix times them, the row of ones included. Its last row is left alone.
template <typename R, typename A, typename Team = Alone>
MEDKD_INLINE void gradient_of_relation(ChannelKind kind, const R* relation, int64_t relation_ld, int64_t rows,
                                       int64_t channels, double temperature, const double* left, const double* mean,
                                       double* v, A* matrix, const Team& team = {}) {
  if (kind == ChannelKind::row) {  // through the division by the row's norm
    for (int64_t c = team.first_row; c < channels; c += team.row_step) {
      const R* r = relation + c * relation_ld;
      double* v_row = v + c * channels;
      double along = 0;
      for (int64_t k = team.lane; k < channels; k += team.lanes) along += v_row[k] * r[k];
      along = turns(left[c]) ? team.sum(along) : 0.0;
      for (int64_t k = team.lane; k < channels; k += team.lanes) v_row[k] = (v_row[k] - along * r[k]) * left[c];
    }
  }
  team.wait();
  // entry (c, k) is the product of two channels, each of which gets its share
  for (int64_t c = team.first_row; c < channels; c += team.row_step)
    for (int64_t k = team.lane; k <= c; k += team.lanes)
      v[c * channels + k] = v[k * channels + c] += v[c * channels + k];
  team.wait();

  const bool normed = kind == ChannelKind::cosine || kind == ChannelKind::pearson;
  for (int64_t c = team.first_row; c < channels; c += team.row_step) {
    const R* r = relation + c * relation_ld;
    const double* v_row = v + c * channels;
    A* row = matrix + c * rows;
    const double own = kind == ChannelKind::row ? 1.0 : kind == ChannelKind::softmax ? left[c] / temperature : left[c];
    double along = 0, of_means = 0;
    if (kind == ChannelKind::softmax || (normed && turns(left[c]))) {
      for (int64_t k = team.lane; k < channels; k += team.lanes) along += v_row[k] * r[k];
      along = team.sum(along);
    }
    for (int64_t k = team.lane; k < channels; k += team.lanes) {
      const double share = normed && k == c ? v_row[k] - along : v_row[k];
      const double entry = share * own * (normed || kind == ChannelKind::softmax ? left[k] : 1.0);
      of_means += entry * mean[k];
      row[k] = static_cast<A>(entry);
    }
    if (kind == ChannelKind::pearson) of_means = team.sum(of_means);
    if (is_shifted(kind) && team.lane == 0)
      row[channels] = static_cast<A>(kind == ChannelKind::pearson ? -of_means : -along * own);
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
