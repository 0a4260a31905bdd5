#include "attention_driver.h"

namespace medkd {

struct AttentionCall {
  Attention attention{};
  ScalarType type;  // of the arithmetic
  std::vector<Tensor> holder;
  AttentionMaps maps;

  AttentionCall(const Tensor& x, const std::optional<Tensor>& mask, double power)
      : type(arithmetic_type(x, x)), maps(x.size(0), pixels_of(x), block_of(x.size(1))) {
    holder.reserve(2);
    attention.x = planes_of(x, holder);
    attention.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
    attention.channels = x.size(1);
    attention.pixels = maps.pixels;
    attention.power = power;
  }

  // Many channels: few pixels, so that there are enough ranges to share out.
  static int64_t block_of(int64_t channels) {
    return std::clamp<int64_t>((1 << 16) / std::max<int64_t>(channels, 1) / 64 * 64, 128, attention_block);
  }

  // Multiply-adds that a pixel is worth: what is not squared goes through the library's pow.
  int64_t operations() const {
    const double power = attention.power;
    return attention.channels * (power == 1 || power == 2 || power == 4 ? 8 : 128);
  }
};

template <typename A>
static std::tuple<Tensor, Tensor> forward(const AttentionCall& call, const Tensor& x) {
  const AttentionMaps& maps = call.maps;
  Tensor map = new_like(x, map_size(x), call.type), norms = new_like(x, {maps.images}, ScalarType::Double);
  A* values = static_cast<A*>(map.data_ptr());  // the energies, to begin with
  auto squares = slots<double>(maps.images * maps.blocks);
  maps.over_ranges(call.operations(), [&](const PixelRange& range, int64_t i) {
    loops<A>().attention_map.energies(call.attention, range, values + range.image * maps.pixels + range.begin, &squares[i]);
  });
  double* of_images = static_cast<double*>(norms.data_ptr());
  maps.norms(squares, of_images);
  maps.normalise(values, of_images);
  return {map, norms};
}

static std::tuple<Tensor, Tensor> attention_map(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    double power) {
  const AttentionCall call(x, mask, power);
  return call.type == ScalarType::Double ? forward<double>(call, x) : forward<float>(call, x);
}

template <typename A>
static void backward(const AttentionCall& call, const Tensor& map, const Tensor& norms, const Tensor& upstream) {
  const Tensor dense = as_contiguous(upstream);
  const A* q = static_cast<const A*>(map.data_ptr());
  const A* v = static_cast<const A*>(dense.data_ptr());
  const double* norm = static_cast<const double*>(norms.data_ptr());
  const std::vector<double> products = call.maps.products(q, v);
  call.maps.over_ranges(call.operations(), [&](const PixelRange& range, int64_t) {
    const int64_t first = range.image * call.maps.pixels;
    loops<A>().attention_map.gradient(call.attention, range, q + first, v + first, norm[range.image], products[range.image]);
  });
}

static Tensor attention_map_backward(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& map,                  // [B, *S], contiguous, in the type of the arithmetic
    const Tensor& norms,                // [B], double, contiguous
    const Tensor& upstream,             // [B, *S], in the type of the arithmetic
    double power) {
  AttentionCall call(x, mask, power);
  const HostGradient gradient(x);
  call.attention.gradient = planes_of(gradient.written, call.holder);
  if (call.type == ScalarType::Double)
    backward<double>(call, map, norms, upstream);
  else
    backward<float>(call, map, norms, upstream);
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("attention_map_cpp", TORCH_BOX(&medkd::attention_map));
  m.impl("attention_map_backward_cpp", TORCH_BOX(&medkd::attention_map_backward));
}
