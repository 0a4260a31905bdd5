#include "channel_pass.h"

namespace medkd {

constexpr int gram_threads = 512;

// What the backward needs of an image beside its relation: [3, C], in double.
enum StateRow { left_row, mean_row, shift_row, state_rows };

// A block an image.
template <typename A>
__global__ void channel_gram_kernel(ChannelKind kind, int64_t channels, int64_t rows, Images counts,
                                    double* products,  // [B, rows, rows]
                                    const A* shifts,   // [B, C] or nullptr
                                    A* relations,      // [B, C, C]
                                    double* states) {  // [B, 3, C]
  const int64_t image = blockIdx.x;
  const BlockTeam team;
  double* const product = products + image * rows * rows;
  double* const state = states + image * state_rows * channels;
  relation_of_products(kind, product, rows, channels, counts.at_least_one(image), state + left_row * channels,
                       state + mean_row * channels, team);
  for (int64_t c = team.first_row; c < channels; c += team.row_step) {
    if (team.lane == 0)
      state[shift_row * channels + c] = shifts == nullptr ? 0.0 : static_cast<double>(shifts[image * channels + c]);
    for (int64_t k = team.lane; k < channels; k += team.lanes)
      relations[(image * channels + c) * channels + k] = static_cast<A>(product[c * rows + k]);
  }
}

template <typename A>
__global__ void channel_gram_backward_kernel(ChannelKind kind, double temperature, int64_t channels, int64_t rows,
                                             const A* relations,    // [B, C, C]
                                             const double* states,  // [B, 3, C]
                                             const A* upstream,     // [B, C, C]
                                             double* v,             // [B, C, C]
                                             A* matrices) {         // [B, rows, rows]
  const int64_t image = blockIdx.x, size = channels * channels;
  const BlockTeam team;
  const double* const state = states + image * state_rows * channels;
  double* const mine = v + image * size;
  A* const matrix = matrices + image * rows * rows;
  for (int64_t k = threadIdx.x; k < size; k += blockDim.x) mine[k] = static_cast<double>(upstream[image * size + k]);
  team.wait();
  gradient_of_relation(kind, relations + image * size, channels, rows, channels, temperature,
                       state + left_row * channels, state + mean_row * channels, mine, matrix, team);
  if (rows > channels) {
    A* const last = matrix + channels * rows;
    for (int64_t c = threadIdx.x; c < rows; c += blockDim.x)
      last[c] = c < channels ? static_cast<A>(state[shift_row * channels + c]) : A(0);
  }
}

template <typename A>
static std::tuple<Tensor, Tensor> forward(const ChannelCall& call, const Tensor& x, cudaStream_t stream) {
  Tensor relation = new_like(x, {call.images, call.channels, call.channels}, call.type);
  Tensor state = new_like(x, {call.images, state_rows, call.channels}, ScalarType::Double);
  Room room;
  const ChannelProducts made = channel_products(call, false, room, x, stream);
  launch<channel_gram_kernel<A>>({call.images}, gram_threads, 0, stream, call.kind,
                                 call.channels, call.rows, made.counts, made.products,
                                 static_cast<const A*>(made.shifts), static_cast<A*>(relation.data_ptr()),
                                 static_cast<double*>(state.data_ptr()));
  return {relation, state};
}

template <typename A>
static Tensor backward(ChannelCall& call, const Tensor& x, const Tensor& relation, const Tensor& state,
                       const Tensor& upstream, cudaStream_t stream) {
  Room room;
  double* v = nullptr;
  A* matrix = nullptr;
  room.ask(v, call.images * call.channels * call.channels);
  room.ask(matrix, call.images * call.rows * call.rows);
  room.take(x);
  launch<channel_gram_backward_kernel<A>>(
      {call.images}, gram_threads, 0, stream, call.kind, call.temperature, call.channels,
      call.rows, static_cast<const A*>(relation.data_ptr()), static_cast<const double*>(state.data_ptr()),
      static_cast<const A*>(upstream.data_ptr()), v, matrix);
  const Gradient gradient(x);
  channel_gradient(call, planes_of(gradient.written, call.holder), matrix, nullptr, 0, stream);
  return gradient.finish();
}

static std::tuple<Tensor, Tensor> channel_gram(const Tensor& x,                    // [B, C, *S]
                                               const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
                                               const std::string& relation, double temperature) {
  const OnDevice device(x);
  const ChannelCall call(x, nullptr, mask, relation, temperature, arithmetic_type(x, x));
  return call.type == ScalarType::Double ? forward<double>(call, x, device.stream())
                                         : forward<float>(call, x, device.stream());
}

static Tensor channel_gram_backward(const Tensor& x,                    // [B, C, *S]
                                    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
                                    const Tensor& matrix,    // [B, C, C], contiguous, in the type of the arithmetic
                                    const Tensor& state,     // [B, 3, C], contiguous, double
                                    const Tensor& upstream,  // [B, C, C], in the type of the arithmetic
                                    const std::string& relation, double temperature) {
  const OnDevice device(x);
  ChannelCall call(x, nullptr, mask, relation, temperature, arithmetic_type(x, x));
  const Tensor v = as_contiguous(upstream);
  return call.type == ScalarType::Double ? backward<double>(call, x, matrix, state, v, device.stream())
                                         : backward<float>(call, x, matrix, state, v, device.stream());
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("channel_gram_cuda", TORCH_BOX(&medkd::channel_gram));
  m.impl("channel_gram_backward_cuda", TORCH_BOX(&medkd::channel_gram_backward));
}
