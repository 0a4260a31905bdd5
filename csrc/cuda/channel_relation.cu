#include "channel_pass.h"
#include "operators.h"

namespace medkd {

constexpr int relation_threads = 512;

// Between the passes over the pixels, a block an image.
template <typename A>
__global__ void channel_relation_kernel(ChannelKind kind, Divergence divergence, double temperature, int64_t channels,
                                        int64_t rows, Images counts, double* products,  // [B, 2, rows, rows]
                                        const A* shifts,                                 // [B, 2, C] or nullptr
                                        double* state,                                   // [B, C + 2, C]
                                        A* matrices,                                     // [B, rows, rows]
                                        double* values) {                                // [B]
  double* const scratch = shared_memory<double>();
  const int64_t image = blockIdx.x;
  const BlockTeam team;
  double* const relation_s = products + image * 2 * rows * rows;
  double* const relation_t = relation_s + rows * rows;
  double* const left = state + image * (channels + 2) * channels;
  double* const mean = left + channels;
  double* const v = mean + channels;  // [C, C]
  A* const matrix = matrices + image * rows * rows;
  const double pixels = counts.at_least_one(image);
  const double weight = counts.pixels_of(image) > 0 ? counts.weight(reinterpret_cast<int64_t*>(scratch)) : 0.0;
  const double terms = static_cast<double>(divergence == Divergence::kl ? channels : channels * channels);
  const double scale = weight / terms;

  // the teacher's first: its factors are not needed again
  relation_of_products(kind, relation_t, rows, channels, pixels, left, mean, team);
  relation_of_products(kind, relation_s, rows, channels, pixels, left, mean, team);
  double value = 0;
  for (int64_t c = team.first_row; c < channels; c += team.row_step)
    value += divergence_of_rows(divergence, c, relation_s + c * rows, relation_t + c * rows, channels, temperature, scale,
                                v + c * channels, team);
  team.wait();
  value = block_sum(value, scratch);
  if (threadIdx.x == 0) values[image] = value * scale;
  gradient_of_relation(kind, relation_s, rows, rows, channels, temperature, left, mean, v, matrix, team);
  if (shifts != nullptr) {
    A* const last = matrix + channels * rows;
    for (int64_t c = threadIdx.x; c < rows; c += blockDim.x) last[c] = c < channels ? shifts[image * 2 * channels + c] : A(0);
  }
}

template <typename A>
static std::tuple<Tensor, Tensor> forward(const ChannelCall& call, const Tensor& student, Divergence divergence,
                                          const std::string& reduction, cudaStream_t stream) {
  Tensor matrix = new_like(student, {call.images, call.rows, call.rows}, call.type);
  std::vector<int64_t> size;
  if (reduction == "none") size.push_back(call.images);
  Tensor loss = new_like(student, size, call.type);
  Room room;
  double *state = nullptr, *values = nullptr;
  room.ask(state, call.images * (call.channels + 2) * call.channels);
  room.ask(values, call.images);
  const ChannelProducts made = channel_products(call, reduction == "mean", room, student, stream);
  launch<channel_relation_kernel<A>>({call.images}, relation_threads,
                                     relation_threads / warp_size * sizeof(double), stream, call.kind, divergence,
                                     call.temperature, call.channels, call.rows, made.counts, made.products,
                                     static_cast<const A*>(made.shifts), state, static_cast<A*>(matrix.data_ptr()), values);
  reduce_values(values, call.images, 1, reduction, loss, stream);
  return {loss, matrix};
}

std::tuple<Tensor, Tensor> channel_relation(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::string& relation, const std::string& divergence, double temperature, const std::string& reduction) {
  const OnDevice device(student);
  const ChannelCall call(student, &teacher, mask, relation, temperature, arithmetic_type(student, teacher));
  const Divergence which = divergence_named(divergence);
  return call.type == ScalarType::Double ? forward<double>(call, student, which, reduction, device.stream())
                                         : forward<float>(call, student, which, reduction, device.stream());
}

static Tensor channel_relation_backward(
    const Tensor& student,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& matrix,               // [B, C or C + 1, the same], contiguous, in the type of the arithmetic
    const Tensor& upstream,             // [] or [B], in the type of the arithmetic
    const std::string& relation, double temperature) {
  const OnDevice device(student);
  ChannelCall call(student, nullptr, mask, relation, temperature, matrix.scalar_type());
  const Gradient gradient(student);
  channel_gradient(call, planes_of(gradient.written, call.holder), matrix.data_ptr(), upstream.data_ptr(),
                   upstream.dim() == 0 ? 0 : upstream.stride(0), device.stream());
  return gradient.finish();
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("channel_relation_cuda", TORCH_BOX(&medkd::channel_relation));
  m.impl("channel_relation_backward_cuda", TORCH_BOX(&medkd::channel_relation_backward));
}
