#include "pool_driver.h"

namespace medkd {

// Windows of a line that are worked on at a time: those of one pixel or two along x lie side by side themselves, of others the
// columns do.
static int64_t most_maxima(const Pool& pool) { return pool.window[2] <= 2 ? 256 : 256 / pool.window[2]; }

static std::tuple<Tensor, Tensor> max_pool(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::vector<int64_t>& window) {
  PoolCall call(x, window);
  call.lies_as(planes_of(x, call.holder), most_maxima(call.pool));
  Tensor pooled = in_large_pages(new_like(x, call.pooled_shape, x.scalar_type()));
  Tensor place = new_like(x, call.pooled_shape, ScalarType::Short);
  call.pool.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.pool.pooled = pooled.data_ptr();
  call.pool.place = static_cast<int16_t*>(place.data_ptr());
  call.run(loop_table().max_pool.values, call.planes());
  return {pooled, place};
}

static Tensor max_pool_backward(
    const Tensor& x,         // [B, C, *S]
    const Tensor& place,     // [B, C, *P], contiguous
    const Tensor& upstream,  // [B, C, *P], in x's type
    const std::vector<int64_t>& window) {
  PoolCall call(x, window);
  const HostGradient gradient(x);
  call.lies_as(planes_of(gradient.written, call.holder), most_maxima(call.pool));
  const Tensor dense = as_contiguous(upstream);
  Pool& pool = call.pool;
  pool.pooled = dense.data_ptr();
  pool.place = static_cast<int16_t*>(place.data_ptr());
  std::vector<int64_t> offset;
  for (int64_t z = 0; z < pool.window[0]; ++z)
    for (int64_t y = 0; y < pool.window[1]; ++y)
      for (int64_t k = 0; k < pool.window[2]; ++k) offset.push_back((z * pool.size[1] + y) * pool.size[2] + k);
  pool.offset = offset.data();
  call.run(loop_table().max_pool.gradient, call.planes());
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("max_pool_cpp", TORCH_BOX(&medkd::max_pool));
  m.impl("max_pool_backward_cpp", TORCH_BOX(&medkd::max_pool_backward));
}
