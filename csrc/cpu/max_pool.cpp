#include <algorithm>

#include "relation_driver.h"

namespace medkd {

// Of [B, C, *S] with one to three spatial dimensions; those that are not there have a size of 1.
struct PoolCall {
  MaxPool pool{};
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

  void lies_as(const Planes& x) {
    pool.x = x;
    // few channels: rather one after the other
    pool.channels_inside = x.stride_c == 1 && x.stride_n != 1 && pool.channels >= 8;
    pool.part = pool.channels_inside ? 32 : pool.window[2] <= 2 ? 256 : std::max<int64_t>(256 / pool.window[2], 1);
  }

  void run(void (*loops)(const MaxPool&, int64_t, int64_t)) const {
    if (images * pool.channels * pool.pixels == 0) return;
    const int64_t parts = ceil_div(pool.pooled_size[2], pool.part) * pool.pooled_size[0] * pool.pooled_size[1];
    const int64_t all = images * (pool.channels_inside ? 1 : pool.channels) * parts;
    const int64_t elements = ceil_div(images * pool.channels * pool.pixels, all);
    torch::stable::parallel_for(0, all, grain(16 * elements),
                                [&](int64_t begin, int64_t end) { loops(pool, begin, end); });
  }
};

static std::tuple<Tensor, Tensor> max_pool(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::vector<int64_t>& window) {
  PoolCall call(x, window);
  call.lies_as(planes_of(x, call.holder));
  Tensor pooled = in_large_pages(new_like(x, call.pooled_shape, x.scalar_type()));
  Tensor place = new_like(x, call.pooled_shape, ScalarType::Short);
  call.pool.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.pool.pooled = pooled.data_ptr();
  call.pool.place = static_cast<int16_t*>(place.data_ptr());
  call.run(loop_table().max_pool.values);
  return {pooled, place};
}

static Tensor max_pool_backward(
    const Tensor& x,         // [B, C, *S]
    const Tensor& place,     // [B, C, *P], contiguous
    const Tensor& upstream,  // [B, C, *P], in x's type
    const std::vector<int64_t>& window) {
  PoolCall call(x, window);
  const HostGradient gradient(x);
  call.lies_as(planes_of(gradient.written, call.holder));
  const Tensor dense = torch::stable::contiguous(upstream);
  MaxPool& pool = call.pool;
  pool.pooled = dense.data_ptr();
  pool.place = static_cast<int16_t*>(place.data_ptr());
  std::vector<int64_t> offset;
  for (int64_t z = 0; z < pool.window[0]; ++z)
    for (int64_t y = 0; y < pool.window[1]; ++y)
      for (int64_t k = 0; k < pool.window[2]; ++k) offset.push_back((z * pool.size[1] + y) * pool.size[2] + k);
  pool.offset = offset.data();
  call.run(loop_table().max_pool.gradient);
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("max_pool_cpp", TORCH_BOX(&medkd::max_pool));
  m.impl("max_pool_backward_cpp", TORCH_BOX(&medkd::max_pool_backward));
}
