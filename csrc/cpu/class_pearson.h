// class_pearson over tiles of pixels: sums of probabilities and of their products in one pass, the gradient in another.
// Derivation: medkd_fast/reference/class_pearson.py.
#pragma once

#include "../math/class_pearson.h"
#include "pixel_loss.h"

namespace medkd {
namespace MEDKD_ISA {

// Both networks' logits of a tile become q = probability - 1 / C, 0 at pixels that do not count.
template <typename A>
inline void centred_probabilities(const A* valid, int64_t classes, int64_t padded, int64_t ld, A* x) {
  const A mean = A(1) / static_cast<A>(classes);
  A top[max_tile], sum[max_tile];
  for (int64_t p = 0; p < padded; ++p) {
    top[p] = -infinity<A>();
    sum[p] = A(0);
  }
  for (int64_t c = 0; c < classes; ++c) {
    const A* __restrict row = x + c * ld;
    for (int64_t p = 0; p < padded; ++p) top[p] = row[p] > top[p] ? row[p] : top[p];
  }
  for (int64_t c = 0; c < classes; ++c) {
    A* __restrict row = x + c * ld;
    for (int64_t p = 0; p < padded; ++p) {
      row[p] = exp_nonpositive(row[p] - top[p]);
      sum[p] += row[p];
    }
  }
  for (int64_t p = 0; p < padded; ++p) sum[p] = A(1) / sum[p];
  for (int64_t c = 0; c < classes; ++c) {
    A* __restrict row = x + c * ld;
    for (int64_t p = 0; p < padded; ++p) row[p] = valid[p] != A(0) ? row[p] * sum[p] - mean : A(0);
  }
}

// What both passes begin a tile with.
template <typename A>
struct PearsonTile {
  int64_t padded;
  A* q_s;  // [C, ld]
  A* q_t;
  A product[max_tile], square_s[max_tile], square_t[max_tile];  // of a pixel, over its classes
  Tile<A> labels;                                               // weight: 1 where the pixel counts
};

template <typename A>
inline void load_pearson(const PixelLoss& loss, int64_t image, int64_t first, int64_t length, int64_t ld,
                         PearsonTile<A>& tile) {
  const int64_t classes = loss.classes, padded = tile.padded = tile.labels.padded = round_up(length, lanes);
  const A inverse_temperature = static_cast<A>(1.0 / loss.temperature);
  PixelSums labels{};  // bad labels are no matter here
  load_labels(loss, image * loss.pixels + first, length, false, tile.labels, labels);
  load_tile(loss.student, image, first, classes, length, padded, ld, inverse_temperature, tile.q_s);
  load_tile(loss.teacher, image, first, classes, length, padded, ld, inverse_temperature, tile.q_t);
  centred_probabilities(tile.labels.weight, classes, padded, ld, tile.q_s);
  centred_probabilities(tile.labels.weight, classes, padded, ld, tile.q_t);
  for (int64_t p = 0; p < padded; ++p) tile.product[p] = tile.square_s[p] = tile.square_t[p] = A(0);
  for (int64_t c = 0; c < classes; ++c) {
    const A* __restrict s = tile.q_s + c * ld;
    const A* __restrict t = tile.q_t + c * ld;
    for (int64_t p = 0; p < padded; ++p) {
      tile.product[p] += s[p] * t[p];
      tile.square_s[p] += s[p] * s[p];
      tile.square_t[p] += t[p] * t[p];
    }
  }
}

// sums [2 + 5C]: pixels that count, their correlations, and by class the sums of q_s, q_t, q_s², q_t², q_s q_t.
template <typename A>
inline void pearson_sums(const PixelLoss& loss, const PixelRange& range, double* sums) {
  const int64_t classes = loss.classes, size = tile_pixels(classes, sizeof(A));
  const Scratch<A> scratch(2 * classes * size);
  PearsonTile<A> tile;
  tile.q_s = scratch.get();
  tile.q_t = tile.q_s + classes * size;
  double* moments = sums + 2;
  for (int64_t k = 0; k < 2 + 5 * classes; ++k) sums[k] = 0;
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    load_pearson(loss, range.image, first, length, size, tile);
    A within[max_tile];
    for (int64_t p = 0; p < tile.padded; ++p)
      within[p] = correlation(tile.product[p], tile.square_s[p], tile.square_t[p]).value;
    sums[0] += sum_row(tile.labels.weight, tile.padded);
    sums[1] += sum_row(within, tile.padded);
    for (int64_t c = 0; c < classes; ++c) {
      const A* s = tile.q_s + c * size;
      const A* t = tile.q_t + c * size;
      double lane[5][16] = {};
      for (int64_t p = 0; p < tile.padded; p += 16)
        for (int64_t j = 0; j < 16; ++j) {
          const double a = static_cast<double>(s[p + j]), b = static_cast<double>(t[p + j]);
          lane[0][j] += a;
          lane[1][j] += b;
          lane[2][j] += a * a;
          lane[3][j] += b * b;
          lane[4][j] += a * b;
        }
      for (int64_t k = 0; k < 5; ++k) moments[k * classes + c] += sum_row(lane[k], 16);
    }
  }
}

// coefficients [1 + 4C]: that of a pixel's correlation, and by class of_t, of_s and the means.
template <typename A>
inline void pearson_gradient(const PixelLoss& loss, const PixelRange& range, const double* coefficients, A factor) {
  const int64_t classes = loss.classes, size = tile_pixels(classes, sizeof(A));
  const A inverse_temperature = static_cast<A>(1.0 / loss.temperature), mean = A(1) / static_cast<A>(classes);
  const Scratch<A> scratch(2 * classes * size);
  PearsonTile<A> tile;
  tile.q_s = scratch.get();
  tile.q_t = tile.q_s + classes * size;
  const A first_coefficient = static_cast<A>(coefficients[0]);
  const double* of_class = coefficients + 1;
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    load_pearson(loss, range.image, first, length, size, tile);
    A along_t[max_tile], along_s[max_tile], common[max_tile];
    for (int64_t p = 0; p < tile.padded; ++p) {
      const Correlation<A> k = correlation(tile.product[p], tile.square_s[p], tile.square_t[p]);
      along_t[p] = first_coefficient * k.along_t;
      along_s[p] = first_coefficient * k.along_s;
      common[p] = A(0);
    }
    for (int64_t c = 0; c < classes; ++c) {
      A* __restrict s = tile.q_s + c * size;
      A* __restrict t = tile.q_t + c * size;
      const A a = static_cast<A>(of_class[c]), b = static_cast<A>(of_class[classes + c]);
      const A mean_s = static_cast<A>(of_class[2 * classes + c]), mean_t = static_cast<A>(of_class[3 * classes + c]);
      for (int64_t p = 0; p < tile.padded; ++p) {
        const A g = along_t[p] * t[p] + along_s[p] * s[p] + (a * (t[p] - mean_t) + b * (s[p] - mean_s));
        const A probability = s[p] + mean;
        common[p] += probability * g;
        t[p] = g;
        s[p] = probability;
      }
    }
    for (int64_t c = 0; c < classes; ++c) {
      A* __restrict s = tile.q_s + c * size;
      const A* __restrict t = tile.q_t + c * size;
      for (int64_t p = 0; p < tile.padded; ++p)
        s[p] = tile.labels.weight[p] == A(0) ? A(0) : factor * inverse_temperature * (s[p] * (t[p] - common[p]));
    }
    store_tile(loss.gradient, range.image, first, classes, length, size, tile.q_s);
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
