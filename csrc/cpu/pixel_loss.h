// The frame of the per-pixel losses, decoupled_kl and class_kl: tiles of pixels are brought into scratch memory, the
// loss turns logits into values and gradients there, and the gradients go back. The student may be of a lower
// resolution: then a tile is part of a line along the last axis, interpolated on the way in, and its gradient is
// gathered along the line and added to the low-resolution lines on the way out. Upsampled logits never leave scratch.
//
// A loss is a type with `terms`, `uses_target` and
//   static void tile(const PixelLoss&, Tile<A>&)   // logits / temperature in, student <- gradient out
#pragma once

#include "band.h"

namespace medkd {
namespace MEDKD_ISA {

constexpr int64_t lanes = 16;     // rows are padded to this many pixels
constexpr int64_t max_tile = 256;  // pixels in a tile at most

template <typename A>
struct Tile {
  A* student;  // [C, student_ld]
  A* teacher;  // [C, teacher_ld]
  int64_t student_ld, teacher_ld;
  int64_t padded;           // pixels, a multiple of `lanes`
  int32_t label[max_tile];  // -1: ignored or padding
  A weight[max_tile];       // 0 where ignored
  A value[max_terms][max_tile];  // weighted, 0 where ignored
  bool want_gradient;
};

// Student and teacher of a tile stay in the second-level cache, where longer rows save more than the first would.
inline int64_t tile_pixels(int64_t classes, int64_t size) {
  const int64_t fitting = 65536 / (2 * classes * size) / lanes * lanes;
  return fitting < lanes ? lanes : fitting > max_tile ? max_tile : fitting;
}

template <typename I, typename A>
inline void load_labels_as(const PixelLoss& loss, int64_t first, int64_t length, bool uses_target, Tile<A>& tile,
                           PixelSums& sums) {
  const I* target = static_cast<const I*>(loss.target) + first;
  const int64_t ignore_index = loss.ignore_index, classes = loss.classes;
  int32_t bad = 0;
  for (int64_t p = 0; p < length; ++p) {  // without a branch
    const int64_t y = static_cast<int64_t>(target[p]);
    const int32_t ignored = y == ignore_index;
    const int32_t inside = static_cast<uint64_t>(y) < static_cast<uint64_t>(classes);
    bad |= uses_target & ((ignored | inside) ^ 1);
    tile.label[p] = (static_cast<int32_t>(y) & -inside) | -ignored;
  }
  if (bad)
    for (int64_t p = 0; p < length; ++p) {
      const int64_t y = static_cast<int64_t>(target[p]);
      if (y != loss.ignore_index && (y < 0 || y >= loss.classes)) {
        sums.bad_label = y;
        sums.has_bad_label = true;
      }
    }
}

// Labels and weights of the pixels [first, first + length) counted over all images.
template <typename A>
inline void load_labels(const PixelLoss& loss, int64_t first, int64_t length, bool uses_target, Tile<A>& tile,
                        PixelSums& sums) {
  if (loss.target == nullptr) {
    for (int64_t p = 0; p < length; ++p) tile.label[p] = 0;
  } else {
    switch (loss.target_type) {
      case Type::int64: load_labels_as<int64_t>(loss, first, length, uses_target, tile, sums); break;
      case Type::int32: load_labels_as<int32_t>(loss, first, length, uses_target, tile, sums); break;
      case Type::int16: load_labels_as<int16_t>(loss, first, length, uses_target, tile, sums); break;
      case Type::int8: load_labels_as<int8_t>(loss, first, length, uses_target, tile, sums); break;
      default: load_labels_as<uint8_t>(loss, first, length, uses_target, tile, sums);
    }
  }
  const A* weight = static_cast<const A*>(loss.weight);
  for (int64_t p = 0; p < length; ++p) {
    const A w = weight == nullptr ? A(1) : weight[first + p];
    tile.label[p] = w == A(0) ? -1 : tile.label[p];  // weight 0 leaves the loss whatever the logits are
    tile.weight[p] = tile.label[p] < 0 ? A(0) : w;
  }
  for (int64_t p = length; p < tile.padded; ++p) {
    tile.label[p] = -1;
    tile.weight[p] = A(0);
  }
}

template <typename Loss, typename A>
inline void finish_tile(const PixelLoss& loss, int64_t first, int64_t length, Tile<A>& tile, PixelSums& sums) {
  Loss::tile(loss, tile);
  sums.denominator += sum_row(tile.weight, tile.padded);
  for (int term = 0; term < Loss::terms; ++term) {
    sums.term[term] += sum_row(tile.value[term], tile.padded);
    if (loss.per_pixel[term] != nullptr) {
      A* out = static_cast<A*>(loss.per_pixel[term]) + first;
      for (int64_t p = 0; p < length; ++p) out[p] = tile.value[term][p];
    }
  }
}

template <typename Loss, typename A>
inline void pixel_range(const PixelLoss& loss, const PixelRange& range, PixelSums& sums) {
  const int64_t classes = loss.classes;
  const int64_t size = tile_pixels(classes, sizeof(A));
  const A inverse_temperature = static_cast<A>(1.0 / loss.temperature);
  const Scratch<A> scratch(2 * classes * size);
  Tile<A> tile;
  tile.student = scratch.get();
  tile.teacher = tile.student + classes * size;
  tile.student_ld = tile.teacher_ld = size;
  tile.want_gradient = loss.gradient.data != nullptr;
  for (int64_t first = range.begin; first < range.end; first += size) {
    const int64_t length = range.end - first < size ? range.end - first : size;
    tile.padded = round_up(length, lanes);
    load_labels(loss, range.image * loss.pixels + first, length, Loss::uses_target, tile, sums);
    load_tile(loss.student, range.image, first, classes, length, tile.padded, size, inverse_temperature, tile.student);
    load_tile(loss.teacher, range.image, first, classes, length, tile.padded, size, inverse_temperature, tile.teacher);
    finish_tile<Loss>(loss, range.image * loss.pixels + first, length, tile, sums);
    if (tile.want_gradient) store_tile(loss.gradient, range.image, first, classes, length, size, tile.student);
  }
}

// The low-resolution lines around the full-resolution line (z, y) and their weights, at most 4, none of weight 0.
struct Neighbours {
  int count;
  int64_t line[4];  // z_low * H_low + y_low
  double weight[4];
};

inline Neighbours neighbours(const PixelLoss& loss, int64_t z, int64_t y) {
  Neighbours result;
  result.count = 0;
  for (int dz = 0; dz < 2; ++dz)
    for (int dy = 0; dy < 2; ++dy) {
      const double wz = dz ? loss.z.upper_weight[z] : 1 - loss.z.upper_weight[z];
      const double wy = dy ? loss.y.upper_weight[y] : 1 - loss.y.upper_weight[y];
      if (wz * wy == 0) continue;
      result.line[result.count] = (loss.z.lower[z] + dz) * loss.y.low + loss.y.lower[y] + dy;
      result.weight[result.count++] = wz * wy;
    }
  return result;
}

// A class at -infinity is interpolated as a number that no logit reaches (0 times -infinity is no number), and is -infinity
// again wherever a neighbour had it.
template <typename A>
MEDKD_INLINE A finite_absent(A x) {
  return x < A(-1e30) ? A(-1e30) : x;
}
template <typename A>
MEDKD_INLINE A absent_again(A x) {
  return x < A(-1e20) ? -infinity<A>() : x;
}

template <typename Loss, typename A>
inline void pixel_slab(const PixelLoss& loss, const Slab& slab, PixelSums& sums) {
  const int64_t classes = loss.classes, width = loss.width, low = loss.low_width;
  const int64_t ld = round_up(width, lanes), low_ld = round_up(low, lanes);
  const int64_t size = tile_pixels(classes, sizeof(A));
  const A inverse_temperature = static_cast<A>(1.0 / loss.temperature);
  const BandWeights<A> along(loss.along), back(loss.back);
  const Scratch<A> scratch(classes * (ld + size + 2 * low_ld));
  A* line = scratch.get();                // [C, ld]: the interpolated student, then its gradient
  A* teacher = line + classes * ld;       // [C, size]
  A* blended = teacher + classes * size;  // [C, low_ld]: the low-resolution lines, blended across z and y
  A* loaded = blended + classes * low_ld;

  Tile<A> tile;
  tile.teacher = teacher;
  tile.student_ld = ld;
  tile.teacher_ld = size;
  tile.want_gradient = slab.gradient != nullptr;
  A* accumulated = static_cast<A*>(slab.gradient);
  if (tile.want_gradient)
    for (int64_t k = 0; k < (slab.low_end - slab.low_begin) * classes * low; ++k) accumulated[k] = A(0);

  for (int64_t index = slab.begin; index < slab.end; ++index) {
    const int64_t z = index / loss.y.full, y = index % loss.y.full;
    const Neighbours around = neighbours(loss, z, y);
    for (int k = 0; k < around.count; ++k) {
      load_tile(loss.student, slab.image, around.line[k] * low, classes, low, low, low_ld,
                inverse_temperature * static_cast<A>(around.weight[k]), k == 0 ? blended : loaded);
      if (k > 0)
        for (int64_t c = 0; c < classes; ++c)
          for (int64_t j = 0; j < low; ++j) blended[c * low_ld + j] += loaded[c * low_ld + j];
    }
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t j = 0; j < low; ++j) blended[c * low_ld + j] = finite_absent(blended[c * low_ld + j]);
    band_product(loss.along, along, classes, blended, low_ld, line, ld);
    for (int64_t c = 0; c < classes; ++c)
      for (int64_t x = 0; x < width; ++x) line[c * ld + x] = absent_again(line[c * ld + x]);
    for (int64_t x = 0; x < width; x += size) {
      const int64_t length = width - x < size ? width - x : size;
      const int64_t first = index * width + x;
      tile.student = line + x;
      tile.padded = round_up(length, lanes);
      load_labels(loss, slab.image * loss.pixels + first, length, Loss::uses_target, tile, sums);
      load_tile(loss.teacher, slab.image, first, classes, length, tile.padded, size, inverse_temperature, teacher);
      finish_tile<Loss>(loss, slab.image * loss.pixels + first, length, tile, sums);
    }
    if (!tile.want_gradient) continue;
    band_product(loss.back, back, classes, line, ld, blended, low_ld);
    for (int64_t c = 0; c < classes; ++c) {
      const A* gathered = blended + c * low_ld;
      for (int k = 0; k < around.count; ++k) {
        A* to = accumulated + ((around.line[k] - slab.low_begin) * classes + c) * low;
        const A weight = static_cast<A>(around.weight[k]);
        for (int64_t j = 0; j < low; ++j) to[j] += weight * gathered[j];
      }
    }
  }
}

template <typename Loss, typename A>
constexpr PixelLoops pixel_loops() {
  return {pixel_range<Loss, A>, pixel_slab<Loss, A>};
}

}  // namespace MEDKD_ISA
}  // namespace medkd
