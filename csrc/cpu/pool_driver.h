// Runs the loops of max_pool and average_pool over the threads.
#pragma once

#include <algorithm>

#include "relation_driver.h"

namespace medkd {

// Of [B, C, *S] with one to three spatial dimensions; those that are not there have a size of 1.
struct PoolCall {
  Pool pool{};
  int64_t images;
  std::vector<Tensor> holder;
  std::vector<int64_t> pooled_shape;

  PoolCall(const Tensor& x, const std::vector<int64_t>& window) : images(x.size(0)), pooled_shape{x.size(0), x.size(1)} {
    holder.reserve(3);
    const int64_t axes = x.dim() - 2;
    pool.channels = x.size(1);
    pool.pixels = pool.windows = 1;
    for (int64_t d = 0; d < 3; ++d) {
      const int64_t axis = d - 3 + axes;
      pool.size[d] = axis < 0 ? 1 : x.size(axis + 2);
      pool.window[d] = axis < 0 ? 1 : window[axis];
      pool.pooled_size[d] = ceil_div(pool.size[d], pool.window[d]);
      pool.pixels *= pool.size[d];
      pool.windows *= pool.pooled_size[d];
      if (axis >= 0) pooled_shape.push_back(pool.pooled_size[d]);
    }
  }

  // `most`: windows of a line that are worked on at a time.
  void lies_as(const Planes& x, int64_t most) {
    pool.x = x;
    // few channels: rather one after the other
    pool.channels_inside = x.stride_c == 1 && x.stride_n != 1 && pool.channels >= 8;
    pool.part = pool.channels_inside ? 32 : std::max<int64_t>(most, 1);
  }

  // Of an image: those that are gone over one by one.
  int64_t planes() const { return pool.channels_inside ? 1 : pool.channels; }

  void run(PoolLoop loop, int64_t planes) const {
    const int64_t parts = ceil_div(pool.pooled_size[2], pool.part) * pool.pooled_size[0] * pool.pooled_size[1];
    const int64_t all = images * planes * parts;
    if (all == 0) return;
    const int64_t elements = ceil_div(images * pool.channels * pool.pixels, all);
    torch::stable::parallel_for(0, all, grain(16 * elements), [&](int64_t begin, int64_t end) { loop(pool, begin, end); });
  }
};

}  // namespace medkd
