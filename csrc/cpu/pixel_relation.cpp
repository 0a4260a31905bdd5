#include "../math/pixel_relation.h"

#include "pixel_pairs_driver.h"

namespace medkd {

// Every image by itself.
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
    double value = 0;
    for (int64_t i = 0; i < channels; ++i)
      value += portable::pixel_row(sums, widest, i, scale, matrices + (image * channels + i) * depth);
    for (int64_t i = channels; i < widest; ++i)
      value += portable::pixel_row<A>(sums, widest, i, scale, nullptr);
    values[image] = value * scale;
  });
  return {reduce_values<A>(student, values, reduction, call.type, {call.images}), matrix};
}

// An image's share in the sums over pairs of images: its weight over its pixels.
static std::vector<double> image_shares(const RelationCall& call, const std::string& reduction) {
  const std::vector<int64_t> valid = count_valid(call.relation, call.images);
  std::vector<double> shares = image_weights(valid, reduction);
  for (int64_t image = 0; image < call.images; ++image)
    shares[image] /= static_cast<double>(std::max<int64_t>(valid[image], 1));
  return shares;
}

// All pairs of images. The matrices are the images' own; the backward mixes them.
template <typename A>
static std::tuple<Tensor, Tensor> forward_across(RelationCall& call, const Tensor& student,
                                                 const std::string& reduction) {
  const int64_t images = call.images, channels = call.relation.student_channels;
  const int64_t widest = std::max(channels, call.relation.teacher_channels), depth = 2 * widest, size = depth * depth;
  Tensor matrix = new_like(student, {images, channels, depth}, call.type);
  A* matrices = static_cast<A*>(matrix.data_ptr());
  const std::vector<double> shares = image_shares(call, reduction);
  const RelationPlan plan{images, call.relation.pixels, 1, depth, depth};
  const std::unique_ptr<double[]> all(new double[static_cast<std::size_t>(images * size)]);
  sum_over_pixels(call.relation, loops<A>().pixel_relation, plan, [&](int64_t image, const double* sums) {
    std::copy(sums, sums + size, all.get() + image * size);
    for (int64_t i = 0; i < channels; ++i)
      portable::pixel_row(sums, widest, i, shares[image], matrices + (image * channels + i) * depth);
  });
  std::vector<double> values(reduction == "none" ? images * images : 1);
  if (reduction == "none") {
    torch::stable::parallel_for(0, images * images, grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t a = pair / images, b = pair % images;
        double value = 0;
        for (int64_t i = 0; i < widest; ++i)
          value += portable::pixel_pair_row(all.get() + a * size, all.get() + b * size, widest, i);
        values[pair] = value * shares[a] * shares[b];
      }
    });
  } else {  // the value is quadratic in the sums: that of the images' weighted sum is the sum over all pairs
    std::vector<double> total(size);
    for (int64_t image = 0; image < images; ++image)
      for (int64_t k = 0; k < size; ++k) total[k] += shares[image] * all[image * size + k];
    for (int64_t i = 0; i < widest; ++i) values[0] += portable::pixel_pair_row(total.data(), total.data(), widest, i);
  }
  return {reduce_values<A>(student, values, reduction, call.type, {images, images}), matrix};
}

// What each image's pixels are multiplied with: the sum over the images that it is related to.
template <typename A>
static Tensor mixed_matrices(const RelationCall& call, const Tensor& matrix, const Tensor& upstream,
                             const std::string& reduction) {
  const int64_t images = call.images, size = matrix.size(1) * matrix.size(2);
  const std::vector<double> shares = image_shares(call, reduction);
  Tensor mixed = new_like(matrix, {images, matrix.size(1), matrix.size(2)}, call.type);
  const A* in = static_cast<const A*>(matrix.data_ptr());
  A* out = static_cast<A*>(mixed.data_ptr());
  const A* factors = static_cast<const A*>(upstream.data_ptr());
  const int64_t stride_a = upstream.dim() > 0 ? upstream.stride(0) : 0;
  const int64_t stride_b = upstream.dim() > 0 ? upstream.stride(1) : 0;
  torch::stable::parallel_for(0, images, grain(images * size), [&](int64_t begin, int64_t end) {
    std::vector<double> sum(size);
    for (int64_t a = begin; a < end; ++a) {
      std::fill(sum.begin(), sum.end(), 0.0);
      for (int64_t b = 0; b < images; ++b) {
        const double both_ways = static_cast<double>(factors[a * stride_a + b * stride_b]) +
                                 static_cast<double>(factors[b * stride_a + a * stride_b]);
        for (int64_t k = 0; k < size; ++k) sum[k] += both_ways / 2 * static_cast<double>(in[b * size + k]);
      }
      for (int64_t k = 0; k < size; ++k) out[a * size + k] = static_cast<A>(shares[a] * sum[k]);
    }
  });
  return mixed;
}

static RelationCall prepared(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                             const std::string& relation) {
  RelationCall call(student, teacher, mask);
  call.relation.rows = pixel_rows_of(relation);
  return call;
}

static std::tuple<Tensor, Tensor> pixel_relation(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::string& relation, bool across_images, const std::string& reduction) {
  RelationCall call = prepared(student, teacher, mask, relation);
  if (call.type == ScalarType::Double)
    return across_images ? forward_across<double>(call, student, reduction) : forward<double>(call, student, reduction);
  return across_images ? forward_across<float>(call, student, reduction) : forward<float>(call, student, reduction);
}

template <typename A>
static Tensor backward(RelationCall& call, const Tensor& student, const Tensor& matrix, const Tensor& upstream,
                       bool across_images, const std::string& reduction) {
  const RelationLoops<A>& run = loops<A>().pixel_relation;
  if (!across_images) return relation_gradient(call, run, student, matrix, upstream);
  const Tensor mixed = mixed_matrices<A>(call, matrix, upstream, reduction);
  return relation_gradient(call, run, student, mixed, scalar<A>(student, 1, call.type));
}

static Tensor pixel_relation_backward(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& matrix,               // [B, C, 2 * the larger C], contiguous, in the type of the arithmetic
    const Tensor& upstream,             // [], [B] or [B, B], in the type of the arithmetic
    const std::string& relation, bool across_images, const std::string& reduction) {
  RelationCall call = prepared(student, teacher, mask, relation);
  return call.type == ScalarType::Double
             ? backward<double>(call, student, matrix, upstream, across_images, reduction)
             : backward<float>(call, student, matrix, upstream, across_images, reduction);
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("pixel_relation_cpp", TORCH_BOX(&medkd::pixel_relation));
  m.impl("pixel_relation_backward_cpp", TORCH_BOX(&medkd::pixel_relation_backward));
}
