// class_means: sums by class in one pass, and the classes' gradients at their pixels in another. Derivation:
// medkd_fast/reference/class_means.py.
#pragma once

#include "class_sums.h"

namespace medkd {
namespace MEDKD_ISA {

// sums: a table without its pointer moved; behind the channels the number of pixels. visit(tile, its first pixel) sees every
// tile that is added up: few channels of many pixels, so that memory is read in long rows.
template <typename A, typename Visit>
inline void sum_by_class(const ClassFeatures& features, const PixelRange& range, double* sums, PixelSums& bad,
                         const Visit& visit) {
  constexpr int64_t width = vector_lanes<A>, most = 32;
  const int64_t channels = features.channels, rows = channels < most ? channels : most, ld = class_ld(channels);
  const int64_t size = class_tile_pixels(rows);
  const Scratch<A> scratch(class_tile_size(rows));
  const A* none = nullptr;
  ClassTile<A> tile;
  begin_tiles(rows, scratch.get(), tile);
  for (int64_t k = 0; k < (1 + features.map.classes) * ld; ++k) sums[k] = 0;
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    load_class_labels(features, range.image, first, length, tile, bad);
    for (int64_t c = 0; c < channels; c += rows) {
      tile.channels = channels - c < rows ? channels - c : rows;
      load_class_rows(features, range.image, first, c, tile);
      visit(tile, first);
      for (int64_t r = 0; r < tile.channels; r += width)
        add_rows<false>(tile, tile.x + r * tile.ld, none, sums + ld + c + r, ld);
    }
    add_rows<false>(tile, tile.x + class_columns(rows) * tile.ld, none, sums + ld + class_columns(channels), ld);
  }
}

template <typename A>
inline void class_feature_sums(const ClassFeatures& features, const PixelRange& range, double* sums, PixelSums& bad) {
  sum_by_class<A>(features, range, sums, bad, [](const ClassTile<A>&, int64_t) {});
}

// gradient[c, p] = table[label[p], c]
template <typename A>
inline void class_means_gradient(const ClassFeatures& features, const PixelRange& range, const A* table) {
  constexpr int64_t width = vector_lanes<A>;
  const int64_t channels = features.channels, size = class_tile_pixels(channels), ld = class_ld(channels);
  const Scratch<A> scratch(class_tile_size(channels));
  ClassTile<A> tile;
  begin_tiles(channels, scratch.get(), tile);
  PixelSums bad{};  // the forward has seen them
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    load_class_labels(features, range.image, first, length, tile, bad);
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
    store_tile(features.map.gradient, range.image, first, channels, length, tile.ld, tile.x);
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
