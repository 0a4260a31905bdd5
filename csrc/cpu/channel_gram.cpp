#include "channel_driver.h"

namespace medkd {

// What the backward needs of an image beside its relation: [3, C], in double.
enum StateRow { left_row, mean_row, shift_row, state_rows };

template <typename A>
static std::tuple<Tensor, Tensor> forward(ChannelCall& call, const Tensor& x) {
  const int64_t channels = call.channels, rows = call.rows;
  Tensor relation = new_like(x, {call.images, channels, channels}, call.type);
  Tensor state = new_like(x, {call.images, state_rows, channels}, ScalarType::Double);
  A* relations = static_cast<A*>(relation.data_ptr());
  double* states = static_cast<double*>(state.data_ptr());
  const std::vector<int64_t> valid = count_valid(call.relation, call.images);
  const std::vector<A> shift = channel_shifts<A>(call, call.relation.student, valid);
  call.relation.student_shift = shift.empty() ? nullptr : shift.data();
  const RelationPlan plan{call.images, call.relation.pixels, 1, rows, rows};
  sum_over_pixels(call.relation, loops<A>().channel_relation, plan, [&](int64_t image, double* matrix) {
    double* mine = states + image * state_rows * channels;
    portable::relation_of_products(call.kind, matrix, rows, channels, pixels_that_count(valid[image]),
                                   mine + left_row * channels, mine + mean_row * channels);
    for (int64_t c = 0; c < channels; ++c) {
      mine[shift_row * channels + c] = shift.empty() ? 0.0 : static_cast<double>(shift[image * channels + c]);
      for (int64_t k = 0; k < channels; ++k)
        relations[(image * channels + c) * channels + k] = static_cast<A>(matrix[c * rows + k]);
    }
  });
  return {relation, state};
}

template <typename A>
static Tensor backward(ChannelCall& call, const Tensor& x, const Tensor& relation, const Tensor& state,
                       const Tensor& upstream) {
  const int64_t channels = call.channels, rows = call.rows, size = channels * channels;
  Tensor matrix = new_like(x, {call.images, rows, rows}, call.type);
  A* matrices = static_cast<A*>(matrix.data_ptr());
  const A* relations = static_cast<const A*>(relation.data_ptr());
  const double* states = static_cast<const double*>(state.data_ptr());
  const A* upstreams = static_cast<const A*>(upstream.data_ptr());
  torch::stable::parallel_for(0, call.images, grain(16 * size), [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const double* mine = states + image * state_rows * channels;
      std::vector<double> v(upstreams + image * size, upstreams + (image + 1) * size);
      A* out = matrices + image * rows * rows;
      portable::gradient_of_relation(call.kind, relations + image * size, channels, rows, channels, call.temperature,
                                     mine + left_row * channels, mine + mean_row * channels, v.data(), out);
      if (rows > channels) end_with_shift(mine + shift_row * channels, channels, out);
    }
  });
  return relation_gradient<A>(call, loops<A>().channel_relation, x, matrix, scalar<A>(x, 1.0, call.type));
}

static std::tuple<Tensor, Tensor> channel_gram(const Tensor& x,                    // [B, C, *S]
                                               const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
                                               const std::string& relation, double temperature) {
  ChannelCall call(x, x, mask, relation, temperature);
  return call.type == ScalarType::Double ? forward<double>(call, x) : forward<float>(call, x);
}

static Tensor channel_gram_backward(const Tensor& x,                    // [B, C, *S]
                                    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
                                    const Tensor& matrix,    // [B, C, C], contiguous, in the type of the arithmetic
                                    const Tensor& state,     // [B, 3, C], contiguous, double
                                    const Tensor& upstream,  // [B, C, C], in the type of the arithmetic
                                    const std::string& relation, double temperature) {
  ChannelCall call(x, x, mask, relation, temperature);
  const Tensor v = as_contiguous(upstream);
  return call.type == ScalarType::Double ? backward<double>(call, x, matrix, state, v)
                                         : backward<float>(call, x, matrix, state, v);
}

}  // namespace medkd

STABLE_TORCH_LIBRARY_IMPL(medkd_fast, CPU, m) {
  m.impl("channel_gram_cpp", TORCH_BOX(&medkd::channel_gram));
  m.impl("channel_gram_backward_cpp", TORCH_BOX(&medkd::channel_gram_backward));
}
