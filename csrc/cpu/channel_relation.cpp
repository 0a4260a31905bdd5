#include "../math/channel_relation.h"

#include "relation_driver.h"

namespace medkd {

template <typename A>
static std::tuple<Tensor, Tensor> forward(RelationCall& call, const Tensor& student, const std::string& reduction) {
  const int64_t channels = call.relation.student_channels, size = channels * channels;
  Tensor matrix = new_like(student, {call.images, channels, channels}, call.type);
  A* matrices = static_cast<A*>(matrix.data_ptr());
  const std::vector<double> weights = image_weights(count_valid(call.relation, call.images), reduction);
  std::vector<double> values(call.images);
  const RelationPlan plan{call.images, call.relation.pixels, 2, channels, channels};
  sum_over_pixels(call.relation, loops<A>().channel_relation, plan, [&](int64_t image, const double* sums) {
    const double scale = weights[image] / static_cast<double>(size);
    std::vector<double> inverse(2 * channels);
    portable::inverse_channel_norms(sums, channels, inverse.data());
    portable::inverse_channel_norms(sums + size, channels, inverse.data() + channels);
    double value = 0;
    for (int64_t c = 0; c < channels; ++c)
      value += portable::channel_row(sums, sums + size, inverse.data(), inverse.data() + channels, channels, c, scale,
                                     matrices + image * size + c * channels);
    values[image] = value * scale;
  });
  return {reduce_images<A>(student, values, reduction, call.type), matrix};
}

static std::tuple<Tensor, Tensor> channel_relation(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::string& reduction) {
  RelationCall call(student, teacher, mask);
  return call.type == ScalarType::Double ? forward<double>(call, student, reduction)
                                         : forward<float>(call, student, reduction);
}

static Tensor channel_relation_backward(
    const Tensor& student,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& matrix,               // [B, C, C], contiguous, in the type of the arithmetic
    const Tensor& upstream) {           // [] or [B], in the type of the arithmetic
  RelationCall call(student, student, mask);
  return matrix.scalar_type() == ScalarType::Double
             ? relation_gradient(call, loops<double>().channel_relation, student, matrix, upstream)
             : relation_gradient(call, loops<float>().channel_relation, student, matrix, upstream);
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("channel_relation_cpp", TORCH_BOX(&medkd::channel_relation));
  m.impl("channel_relation_backward_cpp", TORCH_BOX(&medkd::channel_relation_backward));
}
