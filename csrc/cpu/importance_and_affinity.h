// importance_and_affinity: what attention_map and class_means do, over tiles of pixels that are read once each way. Derivation:
// medkd_fast/reference/importance_and_affinity.py.
#pragma once

#include "../math/pixel_relation.h"
#include "attention_map.h"
#include "class_means.h"

namespace medkd {
namespace MEDKD_ISA {

// The energies of a range's pixels, the sum of their squares, and the sums by class (class_sums.h), whose pointer is not moved.
template <typename A>
inline void importance_and_class_sums(const ClassFeatures& features, double power, const PixelRange& range, A* energies,
                                     double* squares, double* sums, PixelSums& bad) {
  const int64_t length = range.end - range.begin;
  for (int64_t p = 0; p < length; ++p) energies[p] = A(0);
  sum_by_class<A>(features, range, sums, bad, [&](const ClassTile<A>& tile, int64_t first) {
    A* energy = energies + (first - range.begin);
    // pixels that do not count are 0 in a tile
    with_power<A>(power, [&](const auto& of) { add_energies(of, tile.x, tile.ld, tile.channels, tile.length, energy); });
  });
  attention_product(energies, energies, length, squares);
}

template <typename A>
inline void importance_compare(A* student, double of_student, const A* teacher, double of_teacher, int64_t count, double share,
                               A* of_map, double* squares) {
  double lane[16] = {};
  const auto of_pixel = [&](int64_t p, int64_t j) {
    const double energy_s = static_cast<double>(student[p]), energy_t = static_cast<double>(teacher[p]);
    const double difference = difference_of_products(of_student, energy_s, of_teacher, energy_t);
    student[p] = static_cast<A>(of_student * energy_s);
    of_map[p] = static_cast<A>(2 * share * difference);
    lane[j] += difference * difference;
  };
  int64_t p = 0;
  for (; p + 16 <= count; p += 16)
    for (int64_t j = 0; j < 16; ++j) of_pixel(p + j, j);
  for (; p < count; ++p) of_pixel(p, p % 16);
  *squares = sum_row(lane, 16);
}

// What a range's pixels get by their classes: table[label[p], c].
template <typename A>
struct AddedByClass {
  static constexpr bool adds = true;
  const A* table;
  int64_t ld, length;
  const int32_t* label;     // padded to `lanes`
  const int32_t* of_block;  // of `lanes` pixels: their class, or several_classes
  A* room;                  // of a channel

  const A* pixel(int64_t p) const { return table + label[p] * ld; }
  const A* channel(int64_t c) const {
    const A* column = table + c;
    for (int64_t p = 0; p < length; p += lanes) {
      const int32_t k = of_block[p / lanes];
      if (k != several_classes) {
        const A value = column[k * ld];
        for (int64_t j = 0; j < lanes; ++j) room[p + j] = value;
      } else {
        for (int64_t j = 0; j < lanes; ++j) room[p + j] = column[label[p + j] * ld];
      }
    }
    return room;
  }
};

// `map` and what arrives for it are the image's, [N]; table[label[p], c] is what arrives for channel c of pixel p by its class.
template <typename A>
inline void importance_and_affinity_gradient(const ClassFeatures& features, double power, const PixelRange& range,
                                             const A* map, const A* upstream, double weight, double norm, double product,
                                             const A* table) {
  const Attention attention{features.map.student, features.map.gradient, nullptr, features.channels, features.map.pixels, power};
  AttentionSlope slope = attention_slope(norm, power);
  slope.factor *= weight;
  alignas(64) A factor[attention_block], keep[attention_block], room[attention_block];
  alignas(64) int32_t label[attention_block], of_block[attention_block / lanes];
  PixelSums bad{};  // the forward has seen them
  Tile<A> tile;
  for (int64_t first = range.begin; first < range.end; first += attention_block) {
    const int64_t length = range.end - first < attention_block ? range.end - first : attention_block;
    for (int64_t p = 0; p < length; p += max_tile) {
      const int64_t some = length - p < max_tile ? length - p : max_tile;
      tile.padded = round_up(some, lanes);
      load_labels(features.map, range.image * features.map.pixels + first + p, some, true, tile, bad);
      for (int64_t k = 0; k < tile.padded; ++k) {
        label[p + k] = tile.label[k];
        keep[p + k] = tile.label[k] < 0 ? A(0) : A(1);
      }
    }
    for (int64_t p = 0; p < length; p += lanes) of_block[p / lanes] = class_of_block(label + p);
    attention_factors(slope, product, map + first, upstream + first, length, factor);
    attention_gradient_of<true>(attention, {range.image, first, first + length},
                                AttentionFactors<A>{static_cast<A>(slope.scale), factor, keep},
                                AddedByClass<A>{table, class_ld(features.channels), length, label, of_block, room});
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
