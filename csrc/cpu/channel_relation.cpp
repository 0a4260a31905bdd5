#include "channel_driver.h"

namespace medkd {

template <typename A>
static std::tuple<Tensor, Tensor> forward(ChannelCall& call, const Tensor& student, portable::Divergence divergence,
                                          const std::string& reduction) {
  const int64_t channels = call.channels, rows = call.rows;
  Tensor matrix = new_like(student, {call.images, rows, rows}, call.type);
  A* matrices = static_cast<A*>(matrix.data_ptr());
  const std::vector<int64_t> valid = count_valid(call.relation, call.images);
  const std::vector<double> weights = image_weights(valid, reduction);
  const std::vector<A> student_shift = channel_shifts<A>(call, call.relation.student, valid);
  const std::vector<A> teacher_shift = channel_shifts<A>(call, call.relation.teacher, valid);
  const bool shifted = !student_shift.empty();
  call.relation.student_shift = shifted ? student_shift.data() : nullptr;
  call.relation.teacher_shift = shifted ? teacher_shift.data() : nullptr;
  std::vector<double> values(call.images);
  const RelationPlan plan{call.images, call.relation.pixels, 2, rows, rows};
  sum_over_pixels(call.relation, loops<A>().channel_relation, plan, [&](int64_t image, double* relation_s) {
    double* relation_t = relation_s + rows * rows;
    const double pixels = pixels_that_count(valid[image]);
    const int64_t terms = divergence == portable::Divergence::kl ? channels : channels * channels;
    const double scale = weights[image] / static_cast<double>(terms);
    std::vector<double> left(channels), mean(channels), v(channels * channels);
    // the teacher's first: its factors are not needed again
    portable::relation_of_products(call.kind, relation_t, rows, channels, pixels, left.data(), mean.data());
    portable::relation_of_products(call.kind, relation_s, rows, channels, pixels, left.data(), mean.data());
    double value = 0;
    for (int64_t c = 0; c < channels; ++c)
      value += portable::divergence_of_rows(divergence, c, relation_s + c * rows, relation_t + c * rows, channels,
                                            call.temperature, scale, v.data() + c * channels);
    values[image] = value * scale;
    A* mine = matrices + image * rows * rows;
    portable::gradient_of_relation(call.kind, relation_s, rows, rows, channels, call.temperature, left.data(),
                                   mean.data(), v.data(), mine);
    if (shifted) end_with_shift(student_shift.data() + image * channels, channels, mine);
  });
  return {reduce_images<A>(student, values, reduction, call.type), matrix};
}

std::tuple<Tensor, Tensor> channel_relation(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::string& relation,
    const std::string& divergence,
    double temperature,
    const std::string& reduction) {
  ChannelCall call(student, teacher, mask, relation, temperature);
  const portable::Divergence which = portable::divergence_named(divergence);
  return call.type == ScalarType::Double ? forward<double>(call, student, which, reduction)
                                         : forward<float>(call, student, which, reduction);
}

Tensor channel_relation_backward(
    const Tensor& student,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& matrix,               // [B, C or C + 1, the same], contiguous, in the type of the arithmetic
    const Tensor& upstream,             // [] or [B], in the type of the arithmetic
    const std::string& relation,
    double temperature) {
  ChannelCall call(student, student, mask, relation, temperature);
  return matrix.scalar_type() == ScalarType::Double
             ? relation_gradient<double>(call, loops<double>().channel_relation, student, matrix, upstream)
             : relation_gradient<float>(call, loops<float>().channel_relation, student, matrix, upstream);
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("channel_relation_cpp", TORCH_BOX(&medkd::channel_relation));
  m.impl("channel_relation_backward_cpp", TORCH_BOX(&medkd::channel_relation_backward));
}
