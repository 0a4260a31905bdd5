// class_similarity: the cosines in a pass behind that which makes the prototypes; weighted sums by class and the gradient in
// two more. Derivation: medkd_fast/reference/class_similarity.py.
#pragma once

#include "../math/class_similarity.h"
#include "class_sums.h"

namespace medkd {
namespace MEDKD_ISA {

// Of as many pixels as a vector has lanes: the products of their features with their classes' prototypes, and their squares.
template <typename A>
MEDKD_INLINE void pixel_products(const ClassTile<A>& tile, const Run& run, int64_t p, const A* prototypes, int64_t ld,
                                 Vector<A>& product, Vector<A>& square) {
  constexpr int64_t width = vector_lanes<A>;
  constexpr int chains = 4;
  Vector<A> products[chains] = {}, squares[chains] = {};
  const A* x = tile.x + p;
  if (run.label != several_classes) {
    const A* own = prototypes + run.label * ld;
    for (int64_t c = 0; c < tile.channels; c += chains)
#pragma GCC unroll 4
      for (int64_t j = 0; j < chains; ++j) {
        const Vector<A> value = load(x + (c + j) * tile.ld);
        products[j] += value * own[c + j];
        squares[j] += value * value;
      }
  } else {
    for (int64_t c = 0; c < tile.channels; c += width) {
      Vector<A> spread[width];
      spread_classes<A>([&](int64_t i) { return load_loose(prototypes + tile.pixel.label[p + i] * ld + c); }, spread);
#pragma GCC unroll 16
      for (int64_t j = 0; j < width; ++j) {
        const Vector<A> value = load(x + (c + j) * tile.ld);
        products[j % chains] += value * spread[j];
        squares[j % chains] += value * value;
      }
    }
  }
  product = (products[0] + products[1]) + (products[2] + products[3]);
  square = (squares[0] + squares[1]) + (squares[2] + squares[3]);
}

// prototypes: a table; behind the channels of each class the inverse of its norm. out, inverse: [N] of the image.
template <typename A>
inline void similarity_of_pixels(const ClassFeatures& features, const PixelRange& range, const A* prototypes, A* out,
                                 A* inverse) {
  constexpr int64_t width = vector_lanes<A>;
  const int64_t channels = features.channels, size = class_tile_pixels(channels);
  const int64_t columns = class_columns(channels), ld = class_ld(channels);
  const Scratch<A> scratch(class_tile_size(channels));
  ClassTile<A> tile;
  begin_tiles(channels, scratch.get(), tile);
  PixelSums bad{};  // the sums have seen them
  alignas(64) A product[max_tile], square[max_tile];
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    load_class_tile(features, range.image, first, length, tile, bad);
    for (int r = 0; r < tile.count; ++r)
      for (int64_t p = tile.runs[r].first; p < tile.runs[r].end; p += width) {
        Vector<A> of, itself;
        pixel_products(tile, tile.runs[r], p, prototypes, ld, of, itself);
        store_loose<A>(of, product + p);
        store_loose<A>(itself, square + p);
      }
    for (int64_t p = 0; p < length; ++p) {
      const A own = inverse_norm(square[p]);
      inverse[first + p] = own;
      product[p] *= own;
    }
    for (int64_t p = 0; p < length; ++p) out[first + p] = product[p] * prototypes[tile.pixel.label[p] * ld + columns];
  }
}

// sums as class_feature_sums has them, of the features times upstream times inverse; behind the numbers those of upstream times
// similarity.
template <typename A>
inline void similarity_sums(const ClassFeatures& features, const PixelRange& range, const SimilarityMaps<A>& maps,
                            double* sums) {
  const int64_t channels = features.channels, size = class_tile_pixels(channels), ld = class_ld(channels);
  const Scratch<A> scratch(class_tile_size(channels));
  ClassTile<A> tile;
  begin_tiles(channels, scratch.get(), tile);
  PixelSums bad{};
  alignas(64) A weight[max_tile];
  A* along = tile.x + (class_columns(channels) + 1) * tile.ld;
  for (int64_t k = 0; k < (1 + features.map.classes) * ld; ++k) sums[k] = 0;
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    load_class_tile(features, range.image, first, length, tile, bad);
    const int64_t at = range.image * features.map.pixels + first;
    for (int64_t p = 0; p < length; ++p) {
      const A v = tile.pixel.label[p] < 0 ? A(0) : maps.upstream[at + p];
      weight[p] = v * maps.inverse[at + p];
      along[p] = v * maps.similarity[at + p];
    }
    for (int64_t p = length; p < tile.padded; ++p) weight[p] = along[p] = A(0);
    add_tile<true>(tile, weight, sums + ld);
  }
}

// gradient[c, p] = of_prototype[p] prototypes[label[p], c] + of_feature[p] x[c, p] + rest[label[p], c]. Both tables as
// similarity_of_pixels takes them.
template <typename A>
inline void similarity_gradient_of_pixels(const ClassFeatures& features, const PixelRange& range, const A* prototypes,
                                          const A* rest, const SimilarityMaps<A>& maps) {
  constexpr int64_t width = vector_lanes<A>;
  const int64_t channels = features.channels, size = class_tile_pixels(channels);
  const int64_t columns = class_columns(channels), ld = class_ld(channels);
  const Scratch<A> scratch(class_tile_size(channels));
  ClassTile<A> tile;
  begin_tiles(channels, scratch.get(), tile);
  PixelSums bad{};
  alignas(64) A of_prototype[max_tile] = {}, of_feature[max_tile] = {};
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    load_class_tile(features, range.image, first, length, tile, bad);
    const int64_t at = range.image * features.map.pixels + first;
    for (int64_t p = 0; p < length; ++p) of_prototype[p] = prototypes[tile.pixel.label[p] * ld + columns];
    for (int64_t p = 0; p < length; ++p) {
      const A v = tile.pixel.label[p] < 0 ? A(0) : maps.upstream[at + p];
      const SimilarityGradient<A> of = similarity_gradient(v, maps.similarity[at + p], maps.inverse[at + p], of_prototype[p]);
      of_prototype[p] = of.of_prototype;
      of_feature[p] = of.of_feature;
    }
    for (int r = 0; r < tile.count; ++r) {
      const Run& run = tile.runs[r];
      if (run.label != several_classes) {
        for (int64_t c = 0; c < channels; ++c) {
          const A own = prototypes[run.label * ld + c], more = rest[run.label * ld + c];
          A* __restrict row = tile.x + c * tile.ld;
          for (int64_t p = run.first; p < run.end; ++p) row[p] = of_prototype[p] * own + more + of_feature[p] * row[p];
        }
        continue;
      }
      for (int64_t p = run.first; p < run.end; p += width)
        for (int64_t c = 0; c < channels; c += width) {
          Vector<A> square[width];
          spread_classes<A>(
              [&](int64_t i) {
                const int64_t at = tile.pixel.label[p + i] * ld + c;
                return of_prototype[p + i] * load_loose(prototypes + at) + load_loose(rest + at);
              },
              square);
#pragma GCC unroll 16
          for (int64_t j = 0; j < width; ++j) {
            A* row = tile.x + (c + j) * tile.ld + p;
            store_loose<A>(square[j] + load(of_feature + p) * load(row), row);
          }
        }
    }
    store_tile(features.map.gradient, range.image, first, channels, length, tile.ld, tile.x);
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
