#include "attention_driver.h"
#include "class_driver.h"

namespace medkd {

template <typename A>
static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const ClassCall& call, const Tensor& x, double power) {
  const AttentionMaps maps(call.images, call.features.map.pixels, call.part);
  Tensor map = new_like(x, map_size(x), call.type), norms = new_like(x, {call.images}, ScalarType::Double);
  Tensor means = new_like(x, {call.images, call.classes, call.channels}, call.type);
  Tensor counts = new_like(x, {call.images, call.classes}, ScalarType::Long);
  A* values = static_cast<A*>(map.data_ptr());  // the energies, to begin with
  auto squares = slots<double>(maps.images * maps.blocks);
  call.by_class(
      "attention_and_means",
      [&](const PixelRange& range, double* sums, PixelSums& bad) {
        loops<A>().attention_and_means.sums(call.features, power, range, values + range.image * maps.pixels + range.begin,
                                            &squares[range.image * maps.blocks + range.begin / maps.block], sums, bad);
      },
      call.means_into<A>(means, counts));
  maps.normalise(values, squares, static_cast<double*>(norms.data_ptr()));
  return {map, norms, means, counts};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> attention_and_means(
    const Tensor& x,       // [B, C, *S]
    const Tensor& target,  // [B, *S], contiguous
    int64_t num_classes, double power, int64_t ignore_index) {
  const ClassCall call(x, target, num_classes, ignore_index);
  return call.type == ScalarType::Double ? forward<double>(call, x, power) : forward<float>(call, x, power);
}

template <typename A>
static void backward(const ClassCall& call, const Tensor& map, const Tensor& norms, const Tensor& counts,
                     const Tensor& of_map, const Tensor& of_means, double power) {
  const Tensor dense = as_contiguous(of_map);
  const A* q = static_cast<const A*>(map.data_ptr());
  const A* v = static_cast<const A*>(dense.data_ptr());
  const double* norm = static_cast<const double*>(norms.data_ptr());
  const AttentionMaps maps(call.images, call.features.map.pixels, call.part);
  const std::vector<double> products = maps.products(q, v);
  const auto table = call.shares<A>(counts, of_means);
  call.over_parts([&](const PixelRange& range, int64_t) {
    const int64_t image = range.image, first = image * maps.pixels;
    loops<A>().attention_and_means.gradient(call.features, power, range, q + first, v + first, norm[image], products[image],
                                            table.data() + call.table(image));
  });
}

static Tensor attention_and_means_backward(
    const Tensor& x,         // [B, C, *S]
    const Tensor& target,    // [B, *S], contiguous
    const Tensor& map,       // [B, *S], contiguous, in the type of the arithmetic
    const Tensor& norms,     // [B], double, contiguous
    const Tensor& counts,    // [B, K], int64, contiguous
    const Tensor& of_map,    // [B, *S], in the type of the arithmetic
    const Tensor& of_means,  // [B, K, C], in the type of the arithmetic
    double power, int64_t ignore_index) {
  ClassCall call(x, target, counts.size(1), ignore_index);
  const HostGradient gradient(x);
  call.features.map.gradient = planes_of(gradient.written, call.holder);
  (call.type == ScalarType::Double ? backward<double> : backward<float>)(call, map, norms, counts, of_map, of_means, power);
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("attention_and_means_cpp", TORCH_BOX(&medkd::attention_and_means));
  m.impl("attention_and_means_backward_cpp", TORCH_BOX(&medkd::attention_and_means_backward));
}
