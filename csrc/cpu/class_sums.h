// What class_means and class_similarity share: sums of features by class, and vectors of a class at each of its pixels.
//
// A table of classes is [1 + K, class_ld] with its pointer at class 0: the row in front is that of the pixels that count nowhere,
// whose label is -1. A row has the channels, zeros up to a multiple of 16, and then what else there is of the class. Organs are
// coherent, so most blocks of 16 pixels have one class, and neighbours the same one: those are a run, which is added up along
// its pixels, and whose class's numbers are broadcast. In other blocks squares are transposed in registers, so that a
// pixel's channels are a vector.
#pragma once

#include "pixel_loss.h"

namespace medkd {
namespace MEDKD_ISA {

constexpr int32_t several_classes = -2;

// Pixels [first, end) of a tile.
struct Run {
  int64_t first, end;
  int32_t label;
};

template <typename A>
struct ClassTile {
  int64_t channels, ld;
  int64_t length, padded;
  A* x;           // [class_ld(channels), ld]: features, 0 at pixels that do not count; from class_columns on a row of ones
  Tile<A> pixel;  // labels
  Run runs[max_tile / lanes];
  int count;
};

inline int64_t class_tile_pixels(int64_t channels) {
  const int64_t fitting = 8192 / (channels > 0 ? channels : 1) / lanes * lanes;
  return fitting < lanes ? lanes : fitting > max_tile ? max_tile : fitting;
}

inline int64_t class_tile_size(int64_t channels) {
  return class_ld(channels) * (class_tile_pixels(channels) + lanes);
}

// `memory`: class_tile_size(channels) elements.
template <typename A>
inline void begin_tiles(int64_t channels, A* memory, ClassTile<A>& tile) {
  tile.channels = channels;
  tile.ld = class_tile_pixels(channels) + lanes;  // a cache line more, or rows would compete for the same sets
  tile.x = memory;
  const int64_t ones = class_columns(channels);
  for (int64_t k = channels * tile.ld; k < class_ld(channels) * tile.ld; ++k) memory[k] = A(0);
  for (int64_t p = 0; p < tile.ld; ++p) memory[ones * tile.ld + p] = A(1);
}

// The class of `lanes` pixels, or several_classes.
MEDKD_INLINE int32_t class_of_block(const int32_t* label) {
  int32_t differs = 0;
  for (int64_t j = 0; j < lanes; ++j) differs |= label[j] ^ label[0];
  return differs == 0 ? label[0] : several_classes;
}

template <typename A>
inline void find_runs(ClassTile<A>& tile) {
  const int32_t* label = tile.pixel.label;
  tile.count = 0;
  for (int64_t first = 0; first < tile.padded; first += lanes) {
    const int32_t found = class_of_block(label + first);
    if (tile.count > 0 && found != several_classes && tile.runs[tile.count - 1].label == found)
      tile.runs[tile.count - 1].end = first + lanes;
    else
      tile.runs[tile.count++] = {first, first + lanes, found};
  }
}

template <typename A>
inline void load_class_labels(const ClassFeatures& features, int64_t image, int64_t first, int64_t length,
                              ClassTile<A>& tile, PixelSums& bad) {
  tile.length = length;
  tile.padded = tile.pixel.padded = round_up(length, lanes);
  load_labels(features.map, image * features.map.pixels + first, length, true, tile.pixel, bad);
  find_runs(tile);
}

// Features of a tile's channels, from `channel` on, when its labels are there; zeros up to a whole vector of them.
template <typename A>
inline void load_class_rows(const ClassFeatures& features, int64_t image, int64_t first, int64_t channel, ClassTile<A>& tile) {
  const int64_t channels = tile.channels;
  load_tile(from_channel(features.map.student, channel), image, first, channels, tile.length, tile.padded, tile.ld, A(1),
            tile.x);
  if (channel > 0)
    for (int64_t k = channels * tile.ld; k < class_columns(channels) * tile.ld; ++k) tile.x[k] = A(0);
  const int32_t* label = tile.pixel.label;
  int32_t left_out = 0;
  for (int64_t p = 0; p < tile.length; ++p) left_out |= label[p];
  if (left_out >= 0) return;
  for (int64_t c = 0; c < channels; ++c) {
    A* row = tile.x + c * tile.ld;
    for (int64_t p = 0; p < tile.padded; ++p) row[p] = label[p] < 0 ? A(0) : row[p];
  }
}

template <typename A>
inline void load_class_tile(const ClassFeatures& features, int64_t image, int64_t first, int64_t length,
                            ClassTile<A>& tile, PixelSums& bad) {
  load_class_labels(features, image, first, length, tile, bad);
  load_class_rows(features, image, first, 0, tile);
}

// to[j] += x[j]
MEDKD_INLINE void add_vector(Vector<double> x, double* to) { store_loose<double>(load_loose(to) + x, to); }
MEDKD_INLINE void add_vector(Vector<float> x, double* to) {
  constexpr int width = vector_lanes<double>;
  typedef float Half __attribute__((vector_size(vector_bytes / 2), may_alias));
  Half half[2];
  __builtin_memcpy(half, &x, sizeof x);
  add_vector(__builtin_convertvector(half[0], Vector<double>), to);
  add_vector(__builtin_convertvector(half[1], Vector<double>), to + width);
}

// sums[k, j] += Σ of weight[p] row[j, p] over the pixels of class k, for as many rows as a vector has lanes.
template <bool weighted, typename A>
inline void add_rows(const ClassTile<A>& tile, const A* rows, const A* weight, double* sums, int64_t sums_ld) {
  constexpr int64_t width = vector_lanes<A>;
  const int64_t ld = tile.ld;
  auto row = [&](int64_t j, int64_t p) {
    return weighted ? load(weight + p) * load(rows + j * ld + p) : load(rows + j * ld + p);
  };
  for (int r = 0; r < tile.count; ++r) {
    const Run& run = tile.runs[r];
    if (run.label == -1) continue;
    if (run.label >= 0) {
      Vector<A> square[width] = {};
      for (int64_t p = run.first; p < run.end; p += width)
#pragma GCC unroll 16
        for (int64_t j = 0; j < width; ++j) square[j] += row(j, p);
      transpose<A>(square);
      double total[width] = {};
#pragma GCC unroll 16
      for (int64_t i = 0; i < width; ++i) add_vector(square[i], total);
      double* to = sums + run.label * sums_ld;
      for (int64_t j = 0; j < width; ++j) to[j] += total[j];
      continue;
    }
    for (int64_t p = run.first; p < run.end; p += width) {
      Vector<A> square[width];
#pragma GCC unroll 16
      for (int64_t j = 0; j < width; ++j) square[j] = row(j, p);
      transpose<A>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < width; ++i) add_vector(square[i], sums + tile.pixel.label[p + i] * sums_ld);
    }
  }
}

// sums [1 + K, class_ld(channels)] from class 0 on: of the tile's features, weighted or not, and then of the rows of ones
// and what a caller has put beside it.
template <bool weighted, typename A>
inline void add_tile(const ClassTile<A>& tile, const A* weight, double* sums) {
  constexpr int64_t width = vector_lanes<A>;
  const int64_t ld = class_ld(tile.channels), ones = class_columns(tile.channels);
  for (int64_t c = 0; c < tile.channels; c += width)
    add_rows<weighted>(tile, tile.x + c * tile.ld, weight, sums + c, ld);
  add_rows<false>(tile, tile.x + ones * tile.ld, weight, sums + ones, ld);
}

// square[j][i] = of(i)[j], where `of` gives some channels of pixel i's class.
template <typename A, typename Of>
MEDKD_INLINE void spread_classes(const Of& of, Vector<A>* square) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < vector_lanes<A>; ++i) square[i] = of(i);
  transpose<A>(square);
}

}  // namespace MEDKD_ISA
}  // namespace medkd
