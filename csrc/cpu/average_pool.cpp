#include "pool_driver.h"

namespace medkd {

// Windows of a line that are worked on at a time: their columns lie side by side.
static int64_t most_averages(const Pool& pool) { return 256 / pool.window[2]; }

static std::tuple<Tensor, Tensor> average_pool(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::vector<int64_t>& window) {
  PoolCall call(x, window);
  call.lies_as(planes_of(x, call.holder), most_averages(call.pool));
  std::vector<int64_t> of_image = call.pooled_shape;
  of_image.erase(of_image.begin() + 1);
  Tensor pooled = in_large_pages(new_like(x, call.pooled_shape, arithmetic_type(x, x)));
  Tensor number = new_like(x, of_image, ScalarType::Int);
  call.pool.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.pool.pooled = pooled.data_ptr();
  call.pool.number = static_cast<int32_t*>(number.data_ptr());
  call.run(loop_table().average_pool.number, 1);
  call.run(loop_table().average_pool.values, call.planes());
  return {pooled, number};
}

static Tensor average_pool_backward(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& number,               // [B, *P], int32, contiguous
    const Tensor& upstream,             // [B, C, *P], in the type of the arithmetic
    const std::vector<int64_t>& window) {
  PoolCall call(x, window);
  const HostGradient gradient(x);
  call.lies_as(planes_of(gradient.written, call.holder), most_averages(call.pool));
  const Tensor dense = as_contiguous(upstream);
  call.pool.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.pool.pooled = dense.data_ptr();
  call.pool.number = static_cast<int32_t*>(number.data_ptr());
  call.run(loop_table().average_pool.gradient, call.planes());
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("average_pool_cpp", TORCH_BOX(&medkd::average_pool));
  m.impl("average_pool_backward_cpp", TORCH_BOX(&medkd::average_pool_backward));
}
