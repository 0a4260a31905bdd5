// Runs the loops over pairs of pixels on the threads, without a buffer for each thread and without atomics.
#pragma once

#include <new>

#include "relation_driver.h"

namespace medkd {

// Memory aligned to a cache line.
template <typename A>
class Lines {
 public:
  explicit Lines(int64_t count)
      : data_(static_cast<A*>(::operator new(static_cast<std::size_t>(count) * sizeof(A), std::align_val_t(64)))) {
    ask_for_large_pages(data_.get(), count * static_cast<int64_t>(sizeof(A)));
  }
  A* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(A* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<A, Free> data_;
};

inline PixelRows pixel_rows_of(const std::string& relation) {
  return relation == "gram" ? PixelRows::gram : relation == "pearson" ? PixelRows::pearson : PixelRows::cosine;
}

// One network's features, normalised, in memory of their own.
template <typename A>
struct LoadedPanels {
  int64_t per_image;
  Lines<A> memory;
  Panels<A> panels;

  LoadedPanels(const Relation& relation, const Planes& x, int64_t images, int64_t channels)
      : per_image(ceil_div(relation.pixels, panel_pixels)),
        memory(images * per_image * panel_pixels * (channels + 2)) {
    const int64_t pixels = images * per_image * panel_pixels;
    A* inverse = memory.get() + pixels * channels;
    panels = {memory.get(), inverse, inverse + pixels, channels};
    const int64_t operations = 8 * panel_pixels * channels;
    torch::stable::parallel_for(0, images * per_image, grain(operations), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end; ++at)
        loops<A>().pixel_pairs.load(relation, x, panels, at / per_image, at % per_image, at % per_image + 1);
    });
  }
};

// Stores the gradient for the normalised features as call.relation.gradient.
template <typename A>
void store_gradient(const RelationCall& call, const LoadedPanels<A>& loaded, A* normalised) {
  const int64_t per_image = loaded.per_image, operations = 8 * panel_pixels * loaded.panels.channels;
  torch::stable::parallel_for(0, call.images * per_image, grain(operations), [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at)
      loops<A>().pixel_pairs.store(call.relation, loaded.panels, at / per_image, at % per_image, at % per_image + 1,
                                   normalised);
  });
}

// Calls work(a, first, last, b, first, last) for every two blocks of panels [first, last) of images a and b: within each
// image, or over all images. What belongs to a block may be written without care: blocks x and y with
// x + y = round modulo their number are disjoint pairs, every pair has its round, and one round follows the other.
template <typename Work>
void for_block_pairs(int64_t images, int64_t panels, bool across_images, int64_t channels, const Work& work) {
  // blocks of 256 pixels at most: their rows stay in the second-level cache; at least 16 an image if there are panels
  const int64_t block = std::clamp<int64_t>(panels / 16, 1, 4), per_image = ceil_div(panels, block);
  const int64_t sets = across_images ? 1 : images, blocks = across_images ? images * per_image : per_image;
  // an exponential costs about as much as 16 of the vectorised multiply-adds
  const int64_t operations = block * block * panel_pixels * panel_pixels * (channels + 32);
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int64_t round = 0; round < blocks; ++round) {
    pairs.clear();
    for (int64_t x = 0; x < blocks; ++x) {
      const int64_t y = (round - x + blocks) % blocks;
      if (x <= y) pairs.emplace_back(x, y);
    }
    const int64_t tasks = static_cast<int64_t>(pairs.size());
    torch::stable::parallel_for(0, sets * tasks, grain(operations), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const auto [x, y] = pairs[task % tasks];
        const int64_t set = task / tasks, first_i = x % per_image * block, first_j = y % per_image * block;
        work(set + x / per_image, first_i, std::min(first_i + block, panels), set + y / per_image, first_j,
             std::min(first_j + block, panels));
      }
    });
  }
}

}  // namespace medkd
