#include "../math/spatial_kl.h"
#include "relation_driver.h"

namespace medkd {

using portable::RowPiece;

// Pixels of a part, and of the block that is in scratch memory at a time.
constexpr int64_t spatial_part = 8192;
static int64_t spatial_block(int64_t channels) { return std::clamp<int64_t>((1 << 14) / channels / 64 * 64, 64, 1024); }

template <typename A>
static std::tuple<Tensor, Tensor> forward(RelationCall& call, const Tensor& student, double temperature,
                                          const std::string& reduction) {
  const Relation& relation = call.relation;
  const int64_t channels = relation.student_channels, all = call.images * channels;
  const int64_t parts = std::max<int64_t>(ceil_div(relation.pixels, spatial_part), 1);
  std::vector<RowPiece> pieces(all * parts);
  torch::stable::parallel_for(
      0, call.images * parts, grain(64 * std::min(relation.pixels, spatial_part) * channels), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task % parts * spatial_part, last = std::min(first + spatial_part, relation.pixels);
          loops<A>().spatial_kl.sums(relation, {task / parts, first, last, spatial_block(channels), 0, 0},
                                     reinterpret_cast<double*>(pieces.data() + task * channels));
        }
      });
  std::vector<double> weights = image_weights(count_valid(relation, call.images), reduction);
  if (reduction == "mean")
    for (double& weight : weights) weight /= static_cast<double>(channels);
  Tensor rows = new_like(student, {call.images, channels, 4}, call.type);
  A* factors = static_cast<A*>(rows.data_ptr());
  std::vector<double> values(all);
  for (int64_t k = 0; k < all; ++k) {
    const int64_t image = k / channels, c = k % channels;
    RowPiece row = pieces[image * parts * channels + c];
    for (int64_t part = 1; part < parts; ++part) portable::join(row, pieces[(image * parts + part) * channels + c]);
    values[k] = weights[image] == 0 ? 0.0 : weights[image] * temperature * temperature * portable::divergence_of_row(row);
    factors[4 * k] = static_cast<A>(row.sum_s > 0 ? row.max_s : 0.0);
    factors[4 * k + 1] = static_cast<A>(row.sum_t * portable::inverse_of_sum(row.sum_s));
    factors[4 * k + 2] = static_cast<A>(row.sum_t > 0 ? row.max_t : 0.0);
    // without a pixel in the teacher's row its value is constantly 0
    factors[4 * k + 3] = static_cast<A>(weights[image] * temperature * portable::inverse_of_sum(row.sum_t));
  }
  return {reduce_values<A>(student, values, reduction, call.type, {call.images, channels}), rows};
}

static std::tuple<Tensor, Tensor> spatial_kl(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    double temperature, const std::string& reduction) {
  RelationCall call(student, teacher, mask);
  call.relation.inverse_temperature = 1 / temperature;
  return call.type == ScalarType::Double ? forward<double>(call, student, temperature, reduction)
                                         : forward<float>(call, student, temperature, reduction);
}

template <typename A>
static Tensor backward(RelationCall& call, const Tensor& student, const Tensor& rows, const Tensor& upstream) {
  const HostGradient gradient(student);
  call.relation.gradient = planes_of(gradient.written, call.holder);
  const Relation& relation = call.relation;
  const Tensor dense = as_contiguous(upstream);
  const int64_t channels = relation.student_channels;
  const int64_t parts = ceil_div(relation.pixels, spatial_part);
  torch::stable::parallel_for(
      0, call.images * parts, grain(64 * std::min(relation.pixels, spatial_part) * channels), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t first = task % parts * spatial_part, last = std::min(first + spatial_part, relation.pixels);
          loops<A>().spatial_kl.gradient(relation, {task / parts, first, last, spatial_block(channels), 0, 0},
                                         static_cast<const A*>(rows.data_ptr()), static_cast<const A*>(dense.data_ptr()),
                                         upstream.dim() == 0 ? 0 : 1);
        }
      });
  return gradient.finish();
}

static Tensor spatial_kl_backward(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& rows,                 // [B, C, 4], contiguous, in the type of the arithmetic
    const Tensor& upstream,             // [] or [B, C], in the type of the arithmetic
    double temperature) {
  RelationCall call(student, teacher, mask);
  call.relation.inverse_temperature = 1 / temperature;
  return call.type == ScalarType::Double ? backward<double>(call, student, rows, upstream)
                                         : backward<float>(call, student, rows, upstream);
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("spatial_kl_cpp", TORCH_BOX(&medkd::spatial_kl));
  m.impl("spatial_kl_backward_cpp", TORCH_BOX(&medkd::spatial_kl_backward));
}
