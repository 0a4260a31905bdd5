#include "../math/pixel_relation.h"

#include "relation_driver.h"

namespace medkd {

template <typename A>
static std::tuple<Tensor, Tensor> forward(RelationCall& call, const Tensor& student, const std::string& reduction) {
  const int64_t channels = call.relation.student_channels;
  const int64_t widest = std::max(channels, call.relation.teacher_channels), depth = 2 * widest;
  Tensor matrix = new_like(student, {call.images, channels, depth}, call.type);
  A* matrices = static_cast<A*>(matrix.data_ptr());
  const std::vector<int64_t> valid = count_valid(call.relation, call.images);
  const std::vector<double> weights = image_weights(valid, reduction);
  std::vector<double> values(call.images);
  const RelationPlan plan{call.images, call.relation.pixels, 1, depth, depth};
  sum_over_pixels(call.relation, loops<A>().pixel_relation, plan, [&](int64_t image, const double* sums) {
    const double pixels = static_cast<double>(std::max<int64_t>(valid[image], 1));
    const double scale = weights[image] / (pixels * pixels);
    std::vector<double> unused(depth);  // channels that only the teacher has
    double value = 0;
    for (int64_t i = 0; i < channels; ++i)
      value += portable::pixel_row(sums, widest, i, scale, matrices + (image * channels + i) * depth);
    for (int64_t i = channels; i < widest; ++i) value += portable::pixel_row(sums, widest, i, scale, unused.data());
    values[image] = value * scale;
  });
  return {reduce_images<A>(student, values, reduction, call.type), matrix};
}

static std::tuple<Tensor, Tensor> pixel_relation(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::string& reduction) {
  RelationCall call(student, teacher, mask);
  return call.type == ScalarType::Double ? forward<double>(call, student, reduction)
                                         : forward<float>(call, student, reduction);
}

static Tensor pixel_relation_backward(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& matrix,               // [B, C, 2 * the larger C], contiguous, in the type of the arithmetic
    const Tensor& upstream) {           // [] or [B], in the type of the arithmetic
  RelationCall call(student, teacher, mask);
  return call.type == ScalarType::Double
             ? relation_gradient(call, loops<double>().pixel_relation, student, matrix, upstream)
             : relation_gradient(call, loops<float>().pixel_relation, student, matrix, upstream);
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("pixel_relation_cpp", TORCH_BOX(&medkd::pixel_relation));
  m.impl("pixel_relation_backward_cpp", TORCH_BOX(&medkd::pixel_relation_backward));
}
