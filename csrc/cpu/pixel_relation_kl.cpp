#include "../math/pixel_relation.h"

#include <limits>

#include "pixel_pairs_driver.h"

namespace medkd {

// What forward and backward of one call share.
template <typename A>
struct PairCall {
  RelationCall call;
  bool across_images;
  int64_t panels, padded, columns;  // columns: images that an image's pixels are related to
  std::vector<int64_t> valid;
  std::vector<double> weights;
  LoadedPanels<A> student, teacher;
  Lines<A> counts;
  PixelPairs<A> pairs;

  PairCall(const Tensor& student_, const Tensor& teacher_, const std::optional<Tensor>& mask,
           const std::string& relation, double temperature, bool across, const std::string& reduction)
      : call(prepared(student_, teacher_, mask, relation)),
        across_images(across),
        panels(ceil_div(call.relation.pixels, panel_pixels)),
        padded(panels * panel_pixels),
        columns(across ? call.images : 1),
        valid(count_valid(call.relation, call.images)),
        weights(image_weights(valid, reduction)),
        student(call.relation, call.relation.student, call.images, call.relation.student_channels),
        teacher(call.relation, call.relation.teacher, call.images, call.relation.teacher_channels),
        counts(call.images * padded) {
    for (int64_t image = 0; image < call.images; ++image)
      for (int64_t p = 0; p < padded; ++p) counts.get()[image * padded + p] = counted(image, p) ? A(1) : A(0);
    // e^(-2 / 0.05) is far from the smallest float
    const bool bounded = call.relation.rows != PixelRows::gram && temperature >= 0.05;
    pairs = {student.panels.rows, teacher.panels.rows, counts.get(), call.relation.student_channels,
             call.relation.teacher_channels, static_cast<A>(1 / temperature), bounded};
  }

  static RelationCall prepared(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                               const std::string& relation) {
    RelationCall made(student, teacher, mask);
    made.relation.rows = pixel_rows_of(relation);
    return made;
  }

  bool counted(int64_t image, int64_t pixel) const {
    const Relation& relation = call.relation;
    return pixel < relation.pixels && (relation.mask == nullptr || relation.mask[image * relation.pixels + pixel] != 0);
  }

  // The place of the rows of image a in their relations to image b.
  int64_t rows_at(int64_t a, int64_t b) const { return across_images ? a * columns + b : a; }

  double weight(int64_t a, int64_t b) const { return across_images ? weights[a] * weights[b] : weights[a]; }

  template <typename Work>
  void for_pairs(const Work& work) const {
    const int64_t channels = 2 * (call.relation.student_channels + call.relation.teacher_channels);
    for_block_pairs(call.images, panels, across_images, channels, work);
  }
};

template <typename A>
static std::tuple<Tensor, Tensor> forward(const PairCall<A>& pair_call, const Tensor& student,
                                          const std::string& reduction) {
  const RelationCall& call = pair_call.call;
  const int64_t padded = pair_call.padded, pairs = call.images * pair_call.columns;
  const std::unique_ptr<double[]> sums(new double[static_cast<std::size_t>(5 * pairs * padded)]());
  // [5, pairs, padded]
  const auto rows_from = [&](int64_t at) {
    double* from = sums.get() + at;
    const int64_t step = pairs * padded;
    return RowSums{from, from + step, from + 2 * step, from + 3 * step, from + 4 * step};
  };
  const RowSums all = rows_from(0);
  const double start = pair_call.pairs.bounded ? static_cast<double>(pair_call.pairs.scale)
                                               : -std::numeric_limits<double>::infinity();
  std::fill(all.max_s, all.max_s + pairs * padded, start);
  std::fill(all.max_t, all.max_t + pairs * padded, start);
  pair_call.for_pairs([&](int64_t a, int64_t first_i, int64_t last_i, int64_t b, int64_t first_j, int64_t last_j) {
    const int64_t of_a = a * pair_call.panels, of_b = b * pair_call.panels;
    loops<A>().pixel_pairs.sums(pair_call.pairs, {of_a + first_i, of_a + last_i, of_b + first_j, of_b + last_j},
                                rows_from(pair_call.rows_at(a, b) * padded + first_i * panel_pixels),
                                rows_from(pair_call.rows_at(b, a) * padded + first_j * panel_pixels));
  });

  // [images, columns, 4, padded]: maximum and 1 / sum for the student, then for the teacher
  Tensor rows = new_like(student, {call.images, pair_call.columns, 4, padded}, call.type);
  A* kept = static_cast<A*>(rows.data_ptr());
  std::vector<double> values(pairs);
  torch::stable::parallel_for(0, pairs, grain(64 * padded), [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      const int64_t a = pair / pair_call.columns, b = pair_call.across_images ? pair % pair_call.columns : a;
      const RowSums row = rows_from(pair * padded);
      A* out = kept + pair * 4 * padded;
      const bool related = pair_call.valid[a] > 0 && pair_call.valid[b] > 0;
      double value = 0;
      for (int64_t p = 0; p < padded; ++p) {
        const bool counts = related && pair_call.counts.get()[a * padded + p] != A(0);
        // the infinite maximum makes every exponential of a row that does not count 0
        out[p] = counts ? static_cast<A>(row.max_s[p]) : std::numeric_limits<A>::infinity();
        out[padded + p] = counts ? static_cast<A>(1 / row.sum_s[p]) : A(0);
        out[2 * padded + p] = counts ? static_cast<A>(row.max_t[p]) : std::numeric_limits<A>::infinity();
        out[3 * padded + p] = counts ? static_cast<A>(1 / row.sum_t[p]) : A(0);
        if (counts)
          value += portable::row_divergence(row.max_s[p], row.sum_s[p], row.max_t[p], row.sum_t[p], row.weighted[p]);
      }
      values[pair] = value * pair_call.weight(a, b) / static_cast<double>(std::max<int64_t>(pair_call.valid[a], 1));
    }
  });
  std::vector<int64_t> size(pair_call.across_images ? 2 : 1, call.images);
  return {reduce_values<A>(student, values, reduction, call.type, size), rows};
}

template <typename A>
static Tensor backward(PairCall<A>& pair_call, const Tensor& student, const Tensor& rows, const Tensor& upstream) {
  RelationCall& call = pair_call.call;
  const int64_t padded = pair_call.padded, channels = call.relation.student_channels;
  const int64_t panel_size = channels * panel_pixels, panels = call.images * pair_call.panels;
  const Lines<A> normalised(panels * panel_size);  // the gradient for the normalised student
  std::fill(normalised.get(), normalised.get() + panels * panel_size, A(0));

  const A* factors = static_cast<const A*>(upstream.data_ptr());
  const int64_t stride_a = upstream.dim() > 0 ? upstream.stride(0) : 0;
  const int64_t stride_b = upstream.dim() > 1 ? upstream.stride(1) : 0;
  const A* kept = static_cast<const A*>(rows.data_ptr());
  const double scale = static_cast<double>(pair_call.pairs.scale);
  const auto rows_from = [&](int64_t a, int64_t b, int64_t first) {
    const A* from = kept + pair_call.rows_at(a, b) * 4 * padded + first * panel_pixels;
    const double pixels = static_cast<double>(std::max<int64_t>(pair_call.valid[a], 1));
    const double arriving = static_cast<double>(factors[a * stride_a + b * stride_b]);
    return RowFactors<A>{from, from + padded, from + 2 * padded, from + 3 * padded,
                         static_cast<A>(arriving * scale * pair_call.weight(a, b) / pixels)};
  };
  pair_call.for_pairs([&](int64_t a, int64_t first_i, int64_t last_i, int64_t b, int64_t first_j, int64_t last_j) {
    const int64_t of_a = a * pair_call.panels, of_b = b * pair_call.panels;
    loops<A>().pixel_pairs.gradient(pair_call.pairs, {of_a + first_i, of_a + last_i, of_b + first_j, of_b + last_j},
                                    rows_from(a, b, first_i), rows_from(b, a, first_j), normalised.get());
  });

  const HostGradient gradient(student);
  call.relation.gradient = planes_of(gradient.written, call.holder);
  store_gradient(call, pair_call.student, normalised.get());
  return gradient.finish();
}

static std::tuple<Tensor, Tensor> pixel_relation_kl(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::string& relation, double temperature, bool across_images, const std::string& reduction) {
  if (arithmetic_type(student, teacher) == ScalarType::Double) {
    const PairCall<double> call(student, teacher, mask, relation, temperature, across_images, reduction);
    return forward(call, student, reduction);
  }
  const PairCall<float> call(student, teacher, mask, relation, temperature, across_images, reduction);
  return forward(call, student, reduction);
}

static Tensor pixel_relation_kl_backward(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& rows,                 // what the forward left, contiguous, in the type of the arithmetic
    const Tensor& upstream,             // [], [B] or [B, B], in the type of the arithmetic
    const std::string& relation, double temperature, bool across_images, const std::string& reduction) {
  if (arithmetic_type(student, teacher) == ScalarType::Double) {
    PairCall<double> call(student, teacher, mask, relation, temperature, across_images, reduction);
    return backward(call, student, rows, upstream);
  }
  PairCall<float> call(student, teacher, mask, relation, temperature, across_images, reduction);
  return backward(call, student, rows, upstream);
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("pixel_relation_kl_cpp", TORCH_BOX(&medkd::pixel_relation_kl));
  m.impl("pixel_relation_kl_backward_cpp", TORCH_BOX(&medkd::pixel_relation_kl_backward));
}
