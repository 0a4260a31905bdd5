#include "../math/class_similarity.h"
#include "class_driver.h"

namespace medkd {

// 1 / max(norm, 1e-8) of a prototype as it is returned.
template <typename A>
static A inverse_of(const A* prototype, int64_t channels) {
  double square = 0;
  for (int64_t c = 0; c < channels; ++c) square += static_cast<double>(prototype[c]) * static_cast<double>(prototype[c]);
  return static_cast<A>(portable::inverse_norm(square));
}

// The prototypes [B, K, C] as tables, with the inverses of their norms behind.
template <typename A>
static std::vector<A> prototype_tables(const ClassCall& call, const Tensor& means) {
  auto tables = call.tables<A>();
  for (int64_t k = 0; k < call.images * call.classes; ++k) {
    const A* from = static_cast<const A*>(means.data_ptr()) + k * call.channels;
    A* to = tables.data() + call.row(k);
    std::copy(from, from + call.channels, to);
    to[call.columns] = inverse_of(from, call.channels);
  }
  return tables;
}

template <typename A>
static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const ClassCall& call, const Tensor& x, const Tensor& target) {
  const std::vector<int64_t> size = sizes_of(target);
  Tensor similarity = new_like(x, size, call.type), inverse = new_like(x, size, call.type);
  Tensor means = new_like(x, {call.images, call.classes, call.channels}, call.type);
  Tensor counts = new_like(x, {call.images, call.classes}, ScalarType::Long);
  call.by_class(
      "class_similarity",
      [&](const PixelRange& range, double* sums, PixelSums& bad) {
        loops<A>().class_means.sums(call.features, range, sums, bad);
      },
      [&](int64_t k, const double* sums) {
        const double number = sums[call.columns];
        A* mean = static_cast<A*>(means.data_ptr()) + k * call.channels;
        for (int64_t c = 0; c < call.channels; ++c)
          mean[c] = static_cast<A>(sums[c] / (number + portable::prototype_epsilon));
        static_cast<int64_t*>(counts.data_ptr())[k] = static_cast<int64_t>(number);
      });
  const std::vector<A> prototypes = prototype_tables<A>(call, means);
  call.over_parts([&](const PixelRange& range, int64_t) {
    const int64_t image = range.image * call.features.map.pixels;
    loops<A>().class_similarity.similarity(call.features, range, prototypes.data() + call.table(range.image),
                                           static_cast<A*>(similarity.data_ptr()) + image,
                                           static_cast<A*>(inverse.data_ptr()) + image);
  });
  return {similarity, means, counts, inverse};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> class_similarity(
    const Tensor& x,       // [B, C, *S]
    const Tensor& target,  // [B, *S], contiguous
    int64_t num_classes, int64_t ignore_index) {
  const ClassCall call(x, target, num_classes, ignore_index);
  return call.type == ScalarType::Double ? forward<double>(call, x, target) : forward<float>(call, x, target);
}

template <typename A>
static void backward(const ClassCall& call, const Tensor& similarity, const Tensor& means, const Tensor& counts,
                     const Tensor& inverse, const Tensor& upstream) {
  const Tensor dense = as_contiguous(upstream);
  const SimilarityMaps<A> maps{static_cast<const A*>(similarity.data_ptr()), static_cast<const A*>(inverse.data_ptr()),
                               static_cast<const A*>(dense.data_ptr())};
  const std::vector<A> prototypes = prototype_tables<A>(call, means);
  auto rest = call.tables<A>();  // what comes through the prototypes
  call.by_class(
      "class_similarity",
      [&](const PixelRange& range, double* sums, PixelSums&) {
        loops<A>().class_similarity.sums(call.features, range, maps, sums);
      },
      [&](int64_t k, const double* sums) {
        const double number = static_cast<double>(static_cast<const int64_t*>(counts.data_ptr())[k]);
        const A* prototype = prototypes.data() + call.row(k);
        const double own = static_cast<double>(prototype[call.columns]);
        const double along = portable::has_norm(prototype[call.columns]) ? own * own * sums[call.columns + 1] : 0.0;
        for (int64_t c = 0; c < call.channels; ++c)
          rest[call.row(k) + c] = static_cast<A>((own * sums[c] - along * static_cast<double>(prototype[c])) /
                                                 (number + portable::prototype_epsilon));
      });
  call.over_parts([&](const PixelRange& range, int64_t) {
    const int64_t table = call.table(range.image);
    loops<A>().class_similarity.gradient(call.features, range, prototypes.data() + table, rest.data() + table, maps);
  });
}

static Tensor class_similarity_backward(
    const Tensor& x,           // [B, C, *S]
    const Tensor& target,      // [B, *S], contiguous
    const Tensor& similarity,  // [B, *S], contiguous, this and all that follow in the type of the arithmetic
    const Tensor& means,       // [B, K, C], contiguous
    const Tensor& counts,      // [B, K], int64, contiguous
    const Tensor& inverse,     // [B, *S], contiguous
    const Tensor& upstream,    // [B, *S]
    int64_t ignore_index) {
  ClassCall call(x, target, counts.size(1), ignore_index);
  const HostGradient gradient(x);
  call.features.map.gradient = planes_of(gradient.written, call.holder);
  (call.type == ScalarType::Double ? backward<double> : backward<float>)(call, similarity, means, counts, inverse, upstream);
  return gradient.finish();
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("class_similarity_cpp", TORCH_BOX(&medkd::class_similarity));
  m.impl("class_similarity_backward_cpp", TORCH_BOX(&medkd::class_similarity_backward));
}
