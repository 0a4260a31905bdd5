#include <cmath>

#include "relation_driver.h"

namespace medkd {

struct AttentionCall {
  Attention attention{};
  int64_t images, block, blocks;  // pixels of a range, and ranges of an image
  ScalarType type;                // of the arithmetic
  std::vector<Tensor> holder;

  AttentionCall(const Tensor& x, const std::optional<Tensor>& mask, double power)
      : images(x.size(0)), type(arithmetic_type(x, x)) {
    holder.reserve(2);
    attention.x = planes_of(x, holder);
    attention.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
    attention.channels = x.size(1);
    attention.pixels = pixels_of(x);
    attention.power = power;
    // many channels: few pixels, so that there are enough ranges to share out
    block = std::clamp<int64_t>((1 << 16) / std::max<int64_t>(attention.channels, 1) / 64 * 64, 128, attention_block);
    blocks = ceil_div(attention.pixels, block);
  }

  // visit(range, number of the range), where a pixel costs about as much as that many multiply-adds
  template <typename Visit>
  void over_ranges(int64_t operations, const Visit& visit) const {
    const int64_t pixels = std::min(block, attention.pixels);
    torch::stable::parallel_for(0, images * blocks, grain(pixels * operations), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % blocks * block;
        visit(PixelRange{i / blocks, first, std::min(first + block, attention.pixels)}, i);
      }
    });
  }

  // The sum of an image's ranges, in their order.
  double sum_of(const std::vector<double>& slots, int64_t image) const {
    double sum = 0;
    for (int64_t i = image * blocks; i < (image + 1) * blocks; ++i) sum += slots[i];
    return sum;
  }

  // Multiply-adds that an element is worth: what is not squared goes through the library's pow.
  int64_t operations() const {
    const double power = attention.power;
    return attention.channels * (power == 1 || power == 2 || power == 4 ? 8 : 128);
  }
};

constexpr int64_t map_operations = 4;  // a pixel of the map

template <typename A>
static std::tuple<Tensor, Tensor> forward(const AttentionCall& call, const Tensor& x) {
  std::vector<int64_t> size{call.images};
  for (int64_t d = 2; d < x.dim(); ++d) size.push_back(x.size(d));
  Tensor map = new_like(x, size, call.type), norms = new_like(x, {call.images}, ScalarType::Double);
  A* values = static_cast<A*>(map.data_ptr());  // the energies, to begin with
  double* norm = static_cast<double*>(norms.data_ptr());
  const int64_t pixels = call.attention.pixels;
  auto squares = slots<double>(call.images * call.blocks);
  call.over_ranges(call.operations(), [&](const PixelRange& range, int64_t i) {
    loops<A>().attention_map.energies(call.attention, range, values + range.image * pixels + range.begin, &squares[i]);
  });
  for (int64_t image = 0; image < call.images; ++image) norm[image] = std::sqrt(call.sum_of(squares, image));
  call.over_ranges(map_operations, [&](const PixelRange& range, int64_t) {
    const double of_image = norm[range.image];
    loops<A>().attention_map.normalise(values + range.image * pixels + range.begin, range.end - range.begin,
                                       of_image == 0 ? 0.0 : 1 / of_image);
  });
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
  const Tensor dense = torch::stable::contiguous(upstream);
  const A* q = static_cast<const A*>(map.data_ptr());
  const A* v = static_cast<const A*>(dense.data_ptr());
  const double* norm = static_cast<const double*>(norms.data_ptr());
  const int64_t pixels = call.attention.pixels;
  auto products = slots<double>(call.images * call.blocks), of_images = slots<double>(call.images);
  call.over_ranges(map_operations, [&](const PixelRange& range, int64_t i) {
    const int64_t first = range.image * pixels + range.begin;
    loops<A>().attention_map.product(q + first, v + first, range.end - range.begin, &products[i]);
  });
  for (int64_t image = 0; image < call.images; ++image) of_images[image] = call.sum_of(products, image);
  call.over_ranges(call.operations(), [&](const PixelRange& range, int64_t) {
    const int64_t first = range.image * pixels;
    loops<A>().attention_map.gradient(call.attention, range, q + first, v + first, norm[range.image],
                                      of_images[range.image]);
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
