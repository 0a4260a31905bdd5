// attention_and_means: what attention_map and class_means do, over tiles of pixels that are read once each way. Derivations:
// medkd_fast/reference/attention_map.py, class_means.py.
#pragma once

#include "attention_map.h"
#include "class_means.h"

namespace medkd {
namespace MEDKD_ISA {

// The energies of a range's pixels, the sum of their squares, and the sums by class (class_sums.h), whose pointer is not moved.
template <typename A>
inline void attention_and_class_sums(const ClassFeatures& features, double power, const PixelRange& range, A* energies,
                                     double* squares, double* sums, PixelSums& bad) {
  *squares = 0;
  sum_by_class<A>(features, range, sums, bad, [&](const ClassTile<A>& tile, int64_t first) {
    A* energy = energies + (first - range.begin);
    for (int64_t p = 0; p < tile.length; ++p) energy[p] = A(0);
    // pixels that do not count are 0 in a tile
    with_power<A>(power, [&](const auto& of) { add_energies(of, tile.x, tile.ld, tile.channels, tile.length, energy); });
    double square;
    attention_product(energy, energy, tile.length, &square);
    *squares += square;
  });
}

// `map` and what arrives for it are the image's, [N]; table[label[p], c] is what arrives for channel c of pixel p by its class.
template <typename A>
inline void attention_and_means_gradient(const ClassFeatures& features, double power, const PixelRange& range, const A* map,
                                         const A* upstream, double norm, double product, const A* table) {
  const Attention attention{features.map.student, features.map.gradient, nullptr, features.channels, features.map.pixels, power};
  const AttentionSlope slope = attention_slope(norm, power);
  over_labels<A>(features, range, [&](ClassTile<A>& tile, int64_t first) {
    alignas(64) A factor[max_tile], keep[max_tile];
    attention_factors(slope, product, map + first, upstream + first, tile.length, factor);
    for (int64_t p = 0; p < tile.length; ++p) keep[p] = tile.pixel.label[p] < 0 ? A(0) : A(1);
    spread_table(table, tile);
    attention_gradient_of<Pixels::masked_and_added>(
        attention, {range.image, first, first + tile.length},
        AttentionFactors<A>{static_cast<A>(slope.scale), factor, keep, tile.x, tile.ld});
  });
}

}  // namespace MEDKD_ISA
}  // namespace medkd
