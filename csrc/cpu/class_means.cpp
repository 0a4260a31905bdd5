#include "class_driver.h"

namespace medkd {

template <typename A>
static std::tuple<Tensor, Tensor> forward(const ClassCall& call, const Tensor& x) {
  Tensor means = new_like(x, {call.images, call.classes, call.channels}, call.type);
  Tensor counts = new_like(x, {call.images, call.classes}, ScalarType::Long);
  call.by_class(
      "class_means",
      [&](const PixelRange& range, double* sums, PixelSums& bad) {
        loops<A>().class_means.sums(call.features, range, sums, bad);
      },
      call.means_into<A>(means, counts));
  return {means, counts};
}

static std::tuple<Tensor, Tensor> class_means(
    const Tensor& x,       // [B, C, *S]
    const Tensor& target,  // [B, *S], contiguous
    int64_t num_classes, int64_t ignore_index) {
  const ClassCall call(x, target, num_classes, ignore_index);
  return call.type == ScalarType::Double ? forward<double>(call, x) : forward<float>(call, x);
}

template <typename A>
static void backward(const ClassCall& call, const Tensor& counts, const Tensor& upstream) {
  const auto table = call.shares<A>(counts, upstream);
  call.over_parts([&](const PixelRange& range, int64_t) {
    loops<A>().class_means.gradient(call.features, range, table.data() + call.table(range.image));
  });
}

static Tensor class_means_backward(
    const Tensor& x,         // [B, C, *S]
    const Tensor& target,    // [B, *S], contiguous
    const Tensor& counts,    // [B, K], int64, contiguous
    const Tensor& upstream,  // [B, K, C], in the type of the arithmetic
    int64_t ignore_index) {
  ClassCall call(x, target, counts.size(1), ignore_index);
  const HostGradient gradient(x);
  call.features.map.gradient = planes_of(gradient.written, call.holder);
  (call.type == ScalarType::Double ? backward<double> : backward<float>)(call, counts, upstream);
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("class_means_cpp", TORCH_BOX(&medkd::class_means));
  m.impl("class_means_backward_cpp", TORCH_BOX(&medkd::class_means_backward));
}
