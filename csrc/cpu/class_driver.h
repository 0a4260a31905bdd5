// Runs the loops of class_means and class_similarity over the threads: parts of pixels that the shape alone decides, a slot
// of sums by class each, added in order.
#pragma once

#include <memory>

#include "pixel_loss_driver.h"
#include "relation_driver.h"

namespace medkd {

struct ClassCall {
  ClassFeatures features{};
  ScalarType type;      // of the arithmetic
  int64_t images, classes, channels;
  int64_t columns, ld;  // of a row of a table, see class_sums.h
  int64_t part, parts;  // pixels of a part, and parts of an image
  std::vector<Tensor> holder;

  ClassCall(const Tensor& x, const Tensor& target, int64_t classes, int64_t ignore_index)
      : type(arithmetic_type(x, x)),
        images(x.size(0)),
        classes(classes),
        channels(x.size(1)),
        columns(class_columns(channels)),
        ld(class_ld(channels)) {
    holder.reserve(2);
    PixelLoss& map = features.map;
    map.images = images;
    map.classes = classes;
    map.pixels = pixels_of(x);
    map.student = planes_of(x, holder);
    map.target = target.data_ptr();
    map.target_type = type_of(target);
    map.ignore_index = ignore_index;
    features.channels = channels;
    // long enough for slots to be small beside the features, short enough for maps of 64 x 64 to be shared out
    part = std::max({ceil_div(16 * classes, 256) * 256, 65536 / std::max<int64_t>(channels, 1) / 256 * 256, int64_t{256}});
    parts = ceil_div(map.pixels, part);
  }

  // visit(range, number of the part)
  template <typename Visit>
  void over_parts(const Visit& visit) const {
    PixelRanges(images, features.map.pixels, part).over_ranges(16 * channels, visit);
  }

  // sums_of(range, sums, bad) makes the sums of a part; use(number of the class, counted over the images, sums of its row) on
  // any thread. Throws, in the operator's name, where a label is none.
  template <typename SumsOf, typename Use>
  void by_class(const char* name, const SumsOf& sums_of, const Use& use) const {
    const int64_t size = (1 + classes) * ld;
    const std::unique_ptr<double[]> sums(new double[static_cast<std::size_t>(images * parts * size)]);
    auto bad = slots<PixelSums>(images * parts);
    over_parts([&](const PixelRange& range, int64_t i) { sums_of(range, sums.get() + i * size, bad[i]); });
    check_labels(name, bad, features.map);
    torch::stable::parallel_for(0, images * classes, grain(4 * (1 + parts) * ld), [&](int64_t begin, int64_t end) {
      std::vector<double> total(ld);
      for (int64_t k = begin; k < end; ++k) {
        std::fill(total.begin(), total.end(), 0.0);
        const double* slot = sums.get() + k / classes * parts * size + (1 + k % classes) * ld;
        for (int64_t i = 0; i < parts; ++i, slot += size)
          for (int64_t c = 0; c < ld; ++c) total[c] += slot[c];
        use(k, total.data());
      }
    });
  }

  // What by_class is to do with the sums of a class: means [B, K, C or more], zeros behind the channels, and numbers of pixels [B, K].
  template <typename A>
  auto means_into(const Tensor& means, const Tensor& counts) const {
    A* mean = static_cast<A*>(means.data_ptr());
    const int64_t width = means.size(2);
    int64_t* count = static_cast<int64_t*>(counts.data_ptr());
    return [this, mean, width, count](int64_t k, const double* sums) {
      const double number = sums[columns];
      for (int64_t c = 0; c < channels; ++c) mean[k * width + c] = static_cast<A>(sums[c] / std::max(number, 1.0));
      std::fill(mean + k * width + channels, mean + (k + 1) * width, A(0));
      count[k] = static_cast<int64_t>(number);
    };
  }

  // Of every image a table of zeros, and where the row of class k, counted over the images, begins.
  template <typename A>
  std::vector<A> tables() const {
    return std::vector<A>(static_cast<std::size_t>(images * (1 + classes) * ld));
  }

  // Tables of what arrives for a mean, [B, K, C], times a factor, over the number of its pixels.
  template <typename A>
  std::vector<A> shares(const Tensor& counts, const Tensor& upstream, A factor = A(1)) const {
    const Tensor dense = as_contiguous(upstream);
    const A* v = static_cast<const A*>(dense.data_ptr());
    const int64_t* number = static_cast<const int64_t*>(counts.data_ptr());
    auto table = tables<A>();
    for (int64_t k = 0; k < images * classes; ++k)
      for (int64_t c = 0; c < channels; ++c)
        table[row(k) + c] = factor * v[k * channels + c] / static_cast<A>(std::max<int64_t>(number[k], 1));
    return table;
  }

  int64_t row(int64_t k) const { return (k + k / classes + 1) * ld; }
  int64_t table(int64_t image) const { return row(image * classes); }
};

}  // namespace medkd
