#include "pixel_pairs_driver.h"

namespace medkd {

static RelationCall prepared(const Tensor& x, const std::string& relation) {
  RelationCall call(x, x, std::nullopt);
  call.relation.rows = pixel_rows_of(relation);
  return call;
}

template <typename A>
static Tensor forward(const RelationCall& call, const Tensor& x) {
  const int64_t pixels = call.relation.pixels, channels = call.relation.student_channels;
  const LoadedPanels<A> loaded(call.relation, call.relation.student, call.images, channels);
  const int64_t image_size = loaded.per_image * channels * panel_pixels;
  Tensor affinity = in_large_pages(new_like(x, {call.images, pixels, pixels}, call.type));
  A* out = static_cast<A*>(affinity.data_ptr());
  for_block_pairs(call.images, loaded.per_image, false, channels,
                  [&](int64_t image, int64_t first_i, int64_t last_i, int64_t, int64_t first_j, int64_t last_j) {
                    loops<A>().pixel_pairs.relations(loaded.panels.rows + image * image_size, channels, pixels,
                                                     {first_i, last_i, first_j, last_j},
                                                     out + image * pixels * pixels);
                  });
  return affinity;
}

template <typename A>
static Tensor backward(RelationCall& call, const Tensor& x, const Tensor& upstream) {
  const int64_t pixels = call.relation.pixels, channels = call.relation.student_channels;
  const LoadedPanels<A> loaded(call.relation, call.relation.student, call.images, channels);
  const int64_t panel_size = channels * panel_pixels, image_size = loaded.per_image * panel_size;
  const Lines<A> normalised(call.images * image_size);  // the gradient for the normalised features
  std::fill(normalised.get(), normalised.get() + call.images * image_size, A(0));
  const A* arriving = static_cast<const A*>(upstream.data_ptr());
  for_block_pairs(call.images, loaded.per_image, false, 2 * channels,
                  [&](int64_t image, int64_t first_i, int64_t last_i, int64_t, int64_t first_j, int64_t last_j) {
                    loops<A>().pixel_pairs.relations_gradient(
                        loaded.panels.rows + image * image_size, channels, pixels, {first_i, last_i, first_j, last_j},
                        arriving + image * pixels * pixels, normalised.get() + image * image_size);
                  });
  const HostGradient gradient(x);
  call.relation.gradient = planes_of(gradient.written, call.holder);
  store_gradient(call, loaded, normalised.get());
  return gradient.finish();
}

static Tensor pixel_affinity(const Tensor& x,  // [B, C, *S]
                             const std::string& relation) {
  const RelationCall call = prepared(x, relation);
  return call.type == ScalarType::Double ? forward<double>(call, x) : forward<float>(call, x);
}

static Tensor pixel_affinity_backward(
    const Tensor& x,         // [B, C, *S]
    const Tensor& upstream,  // [B, N, N], contiguous, in the type of the arithmetic
    const std::string& relation) {
  RelationCall call = prepared(x, relation);
  return call.type == ScalarType::Double ? backward<double>(call, x, upstream) : backward<float>(call, x, upstream);
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("pixel_affinity_cpp", TORCH_BOX(&medkd::pixel_affinity));
  m.impl("pixel_affinity_backward_cpp", TORCH_BOX(&medkd::pixel_affinity_backward));
}
