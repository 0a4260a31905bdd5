// importance_and_affinity: attention_map, class_means and channel_relation of both networks, and what is made of their results.
// Its backward is in attention_map.cu. Derivation: medkd_fast/reference/importance_and_affinity.py.
//
// A block leaves the sum of its squared differences of maps in a slot; one block adds up the slots in their order.
#include <algorithm>

#include "channel_pass.h"
#include "class_map.h"
#include "operators.h"

namespace medkd {

constexpr int numbers_threads = 256, numbers_warps = numbers_threads / warp_size;
constexpr std::size_t numbers_bytes = numbers_warps * sizeof(double);
constexpr int64_t most_slots = 1024;

// mask = 1 where a pixel counts.
__global__ void __launch_bounds__(numbers_threads) mask_kernel(const Labels labels, int64_t pixels, uint8_t* mask) {
  const int64_t i = blockIdx.x * int64_t{numbers_threads} + threadIdx.x;
  if (i < pixels) mask[i] = labels.class_of(i) != nothing;
}

// What squared differences are multiplied by: those of maps, [1], and every image's mean over all pairs of classes, [B].
template <typename A>
__global__ void __launch_bounds__(numbers_threads)
    image_shares_kernel(const int64_t* counts, int64_t images, int64_t classes, double* of_maps, A* of_pairs) {
  int64_t* const scratch = shared_memory<int64_t>();
  int64_t with_class = 0, with_pair = 0;
  for (int64_t image = warp_index(); image < images; image += numbers_warps) {
    int64_t there = 0;
    for (int64_t k = lane_index(); k < classes; k += warp_size) there += counts[image * classes + k] != 0;
    there = warp_sum(there);
    if (lane_index() != 0) continue;
    with_class += there > 0;
    with_pair += there > 1;
    const double all = static_cast<double>(classes * classes), pairs = static_cast<double>(there * (there - 1));
    of_pairs[image] = static_cast<A>(there > 1 ? all / pairs : 0.0);
  }
  with_class = block_sum(with_class, scratch);
  __syncthreads();
  with_pair = block_sum(with_pair, scratch);
  if (threadIdx.x == 0) *of_maps = 1 / static_cast<double>(with_class > 0 ? with_class : 1);
  for (int64_t image = threadIdx.x; image < images; image += numbers_threads)
    of_pairs[image] /= static_cast<A>(with_pair > 0 ? with_pair : 1);
}

// Maps [B, N] of both networks: the gradient for the student's, and the sums of squared differences [blocks].
template <typename A>
__global__ void __launch_bounds__(numbers_threads)
    differences_kernel(const A* __restrict__ student, const A* __restrict__ teacher, int64_t pixels, const double* of_maps,
                       A* __restrict__ of_map, double* slots) {
  const double twice = 2 * *of_maps;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = blockIdx.x * int64_t{numbers_threads} + threadIdx.x; i < pixels;
       i += gridDim.x * int64_t{numbers_threads}) {
    const double difference = static_cast<double>(student[i]) - static_cast<double>(teacher[i]);
    of_map[i] = static_cast<A>(twice * difference);
    sum += difference * difference;
  }
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) slots[blockIdx.x] = sum;
}

template <typename A>
__global__ void __launch_bounds__(numbers_threads)
    both_numbers_kernel(const double* slots, int64_t count, const double* of_maps, const A* squared, const A* of_pairs,
                        int64_t images, A* importance, A* affinity) {
  double* const scratch = shared_memory<double>();
  double of_classes = 0, of_pixels = 0;
  for (int64_t image = threadIdx.x; image < images; image += numbers_threads)
    of_classes += static_cast<double>(squared[image]) * static_cast<double>(of_pairs[image]);
  for (int64_t slot = threadIdx.x; slot < count; slot += numbers_threads) of_pixels += slots[slot];
  of_classes = block_sum(of_classes, scratch);
  __syncthreads();
  of_pixels = block_sum(of_pixels, scratch);
  if (threadIdx.x != 0) return;
  *affinity = static_cast<A>(of_classes);
  *importance = static_cast<A>(of_pixels * *of_maps + 0 * of_classes);  // labels that are none show in the means alone
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <typename A>
static Results compare(const Tensor& student, const Tensor& teacher, const Tensor& target, const Tensor& mask,
                       int64_t num_classes, double power, int64_t ignore_index, ScalarType type, cudaStream_t stream) {
  const int64_t images = student.size(0), channels = student.size(1), pixels = target.numel();
  const int64_t width = std::max(channels, teacher.size(1));
  const auto [map, norms] = attention_map(student, mask, power);
  const auto [map_t, norms_t] = attention_map(teacher, mask, power);
  const auto [means, counts] = wide_class_means(student, target, num_classes, ignore_index, width);
  const auto [means_t, counts_t] = wide_class_means(teacher, target, num_classes, ignore_index, width);
  const auto [squared, matrix] = channel_relation(means, means_t, std::nullopt, "cosine", "mse_of_pairs", 1, "none");

  Tensor importance = new_like(student, {}, type), affinity = new_like(student, {}, type);
  Tensor of_map = new_like(student, sizes_of(map), type);
  Tensor of_means = new_like(student, {images, num_classes, channels}, type);
  const int64_t blocks = std::min(ceil_div(pixels, numbers_threads), most_slots);
  Room room;
  double *of_maps = nullptr, *slots = nullptr;
  A* of_pairs = nullptr;
  room.ask(of_maps, 1);
  room.ask(slots, blocks);
  room.ask(of_pairs, images);
  room.take(student);
  launch<image_shares_kernel<A>>({1}, numbers_threads, numbers_bytes, stream,
                                 static_cast<const int64_t*>(counts.data_ptr()), images, num_classes, of_maps, of_pairs);
  launch<differences_kernel<A>>({blocks}, numbers_threads, numbers_bytes, stream,
                                static_cast<const A*>(map.data_ptr()), static_cast<const A*>(map_t.data_ptr()), pixels,
                                static_cast<const double*>(of_maps), static_cast<A*>(of_map.data_ptr()), slots);
  launch<both_numbers_kernel<A>>({1}, numbers_threads, numbers_bytes, stream, static_cast<const double*>(slots), blocks,
                                 static_cast<const double*>(of_maps), static_cast<const A*>(squared.data_ptr()),
                                 static_cast<const A*>(of_pairs), images, static_cast<A*>(importance.data_ptr()),
                                 static_cast<A*>(affinity.data_ptr()));
  ChannelCall call(means, nullptr, std::nullopt, "cosine", 1, type);
  call.pixels = channels;  // features of the class means: the student has no others
  channel_gradient(call, planes_of(of_means, call.holder), matrix.data_ptr(), of_pairs, 1, stream);
  return {importance, affinity, map, norms, counts, of_map, of_means};
}

static Results importance_and_affinity(
    const Tensor& student,  // [B, C, *S]
    const Tensor& teacher,  // [B, other C, *S]
    const Tensor& target,   // [B, *S], contiguous
    int64_t num_classes, double power, int64_t ignore_index) {
  const OnDevice device(student);
  const ScalarType type = arithmetic_type(student, teacher);
  Tensor mask = new_like(target, sizes_of(target), ScalarType::Bool);
  const int64_t pixels = target.numel();
  launch<mask_kernel>({ceil_div(pixels, numbers_threads)}, numbers_threads, 0,
                      device.stream(), labels_of(target, num_classes, ignore_index), pixels,
                      static_cast<uint8_t*>(mask.data_ptr()));
  return (type == ScalarType::Double ? compare<double> : compare<float>)(student, teacher, target, mask, num_classes, power,
                                                                         ignore_index, type, device.stream());
}

}  // namespace medkd

MEDKD_IMPLEMENTS { m.impl("importance_and_affinity_cuda", TORCH_BOX(&medkd::importance_and_affinity)); }
