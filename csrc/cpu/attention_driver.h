// Runs the loops of attention_map and importance_and_affinity over maps.
#pragma once

#include <algorithm>
#include <cmath>

#include "relation_driver.h"

namespace medkd {

// What energies are multiplied by. An image without any has the map 0.
inline double inverse_norm(double norm) { return norm == 0 ? 0.0 : 1 / norm; }

// Maps [B, N]; every range of their pixels has a slot for a sum.
struct AttentionMaps : PixelRanges {
  using PixelRanges::PixelRanges;

  static constexpr int64_t map_operations = 4;  // a pixel of the map

  // Of every image the sum of its ranges, in their order.
  void add_slots(const std::vector<double>& slots, double* of_images) const {
    for (int64_t image = 0; image < images; ++image) {
      double sum = 0;
      for (int64_t i = image * blocks; i < (image + 1) * blocks; ++i) sum += slots[i];
      of_images[image] = sum;
    }
  }

  // The norms of images' energies; squares: the sum of every range's.
  void norms(const std::vector<double>& squares, double* of_images) const {
    add_slots(squares, of_images);
    std::transform(of_images, of_images + images, of_images, [](double sum) { return std::sqrt(sum); });
  }

  // Energies become maps, in place.
  template <typename A>
  void normalise(A* values, const double* norms) const {
    over_ranges(map_operations, [&](const PixelRange& range, int64_t) {
      loops<A>().attention_map.normalise(values + range.image * pixels + range.begin, range.end - range.begin,
                                         inverse_norm(norms[range.image]));
    });
  }

  // Of every image the product of its map and of what arrives for it.
  template <typename A>
  std::vector<double> products(const A* map, const A* upstream) const {
    auto of_ranges = slots<double>(images * blocks), of_images = slots<double>(images);
    over_ranges(map_operations, [&](const PixelRange& range, int64_t i) {
      const int64_t first = range.image * pixels + range.begin;
      loops<A>().attention_map.product(map + first, upstream + first, range.end - range.begin, &of_ranges[i]);
    });
    add_slots(of_ranges, of_images.data());
    return of_images;
  }
};

inline std::vector<int64_t> map_size(const Tensor& x) {
  std::vector<int64_t> size{x.size(0)};
  for (int64_t d = 2; d < x.dim(); ++d) size.push_back(x.size(d));
  return size;
}

}  // namespace medkd
