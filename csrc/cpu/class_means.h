// class_means: sums by class in one pass, and the classes' gradients at their pixels in another. Derivation:
// medkd_fast/reference/class_means.py.
#pragma once

#include "class_sums.h"

namespace medkd {
namespace MEDKD_ISA {

// sums: a table without its pointer moved; behind the channels the number of pixels. visit(tile, its first pixel) sees every
// tile that is added up.
template <typename A, typename Visit>
inline void sum_by_class(const ClassFeatures& features, const PixelRange& range, double* sums, PixelSums& bad,
                         const Visit& visit) {
  const int64_t channels = features.channels, size = class_tile_pixels(channels), ld = class_ld(channels);
  const Scratch<A> scratch(class_tile_size(channels));
  ClassTile<A> tile;
  begin_tiles(channels, scratch.get(), tile);
  for (int64_t k = 0; k < (1 + features.map.classes) * ld; ++k) sums[k] = 0;
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    load_class_tile(features, range.image, first, length, tile, bad);
    visit(tile, first);
    add_tile<false>(tile, static_cast<const A*>(nullptr), sums + ld);
  }
}

template <typename A>
inline void class_feature_sums(const ClassFeatures& features, const PixelRange& range, double* sums, PixelSums& bad) {
  sum_by_class<A>(features, range, sums, bad, [](const ClassTile<A>&, int64_t) {});
}

// x[c, p] = table[label[p], c]
template <typename A>
inline void spread_table(const A* table, ClassTile<A>& tile) {
  constexpr int64_t width = vector_lanes<A>;
  const int64_t channels = tile.channels, ld = class_ld(channels);
  for (int r = 0; r < tile.count; ++r) {
    const Run& run = tile.runs[r];
    if (run.label != several_classes) {
      for (int64_t c = 0; c < channels; ++c) {
        const A value = table[run.label * ld + c];
        A* row = tile.x + c * tile.ld;
        for (int64_t p = run.first; p < run.end; ++p) row[p] = value;
      }
      continue;
    }
    for (int64_t p = run.first; p < run.end; p += width)
      for (int64_t c = 0; c < channels; c += width) {
        Vector<A> square[width];
        spread_classes<A>([&](int64_t i) { return load_loose(table + tile.pixel.label[p + i] * ld + c); }, square);
#pragma GCC unroll 16
        for (int64_t j = 0; j < width; ++j) store_loose<A>(square[j], tile.x + (c + j) * tile.ld + p);
      }
  }
}

// visit(tile, its first pixel) for every tile of a range, whose labels are there and whose features are room.
template <typename A, typename Visit>
inline void over_labels(const ClassFeatures& features, const PixelRange& range, const Visit& visit) {
  const int64_t size = class_tile_pixels(features.channels);
  const Scratch<A> scratch(class_tile_size(features.channels));
  ClassTile<A> tile;
  begin_tiles(features.channels, scratch.get(), tile);
  PixelSums bad{};  // the forward has seen them
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    load_class_labels(features, range.image, first, length, tile, bad);
    visit(tile, first);
  }
}

template <typename A>
inline void class_means_gradient(const ClassFeatures& features, const PixelRange& range, const A* table) {
  over_labels<A>(features, range, [&](ClassTile<A>& tile, int64_t first) {
    spread_table(table, tile);
    store_tile(features.map.gradient, range.image, first, tile.channels, tile.length, tile.ld, tile.x);
  });
}

}  // namespace MEDKD_ISA
}  // namespace medkd
