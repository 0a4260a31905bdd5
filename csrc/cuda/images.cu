#include "images.h"

namespace medkd {

constexpr int count_threads = 1024, reduce_threads = 256;

// A block an image. Sixteen pixels at a time from the first aligned address on.
__global__ void count_kernel(const uint8_t* masks, int64_t pixels, int64_t* valid) {
  int64_t* scratch = shared_memory<int64_t>();
  const uint8_t* mask = masks + blockIdx.x * pixels;
  const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(mask) % 16);
  const int64_t head = past == 0 ? 0 : (16 - past < pixels ? 16 - past : pixels);
  const int64_t packs = (pixels - head) / 16, rest = head + packs * 16;
  int64_t count = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < packs; i += count_threads) {
    const Pack<uint8_t, 16> pack = load_pack<16>(mask + head + i * 16);
    int some = 0;
#pragma unroll
    for (int k = 0; k < 16; ++k) some += pack.value[k] != 0;
    count += some;
  }
  for (int64_t p = threadIdx.x; p < head; p += count_threads) count += mask[p] != 0;
  for (int64_t p = rest + threadIdx.x; p < pixels; p += count_threads) count += mask[p] != 0;
  count = block_sum(count, scratch);
  if (threadIdx.x == 0) valid[blockIdx.x] = count;
}

void count_valid(const uint8_t* mask, int64_t images, int64_t pixels, int64_t* valid, cudaStream_t stream) {
  const Blocks grid{images};
  launch<count_kernel>(grid, count_threads, count_threads / warp_size * sizeof(int64_t), stream, mask, pixels, valid);
}

template <typename A>
__global__ void each_value_kernel(const double* values, int64_t terms, A* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < terms; i += reduce_threads) sum += values[blockIdx.x * terms + i];
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<A>(sum);
}

template <typename A>
__global__ void sum_values_kernel(const double* values, int64_t count, A* out) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += reduce_threads) sum += values[i];
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) *out = static_cast<A>(sum);
}

template <typename A>
static void reduce_as(const double* values, int64_t count, int64_t terms, bool each, A* out, cudaStream_t stream) {
  constexpr std::size_t shared = reduce_threads / warp_size * sizeof(double);
  if (each)
    launch<each_value_kernel<A>>({count}, reduce_threads, shared, stream, values, terms, out);
  else
    launch<sum_values_kernel<A>>({1}, reduce_threads, shared, stream, values, count * terms, out);
}

void reduce_values(const double* values, int64_t count, int64_t terms, const std::string& reduction, const Tensor& loss,
                   cudaStream_t stream) {
  const bool each = reduction == "none";
  if (type_of(loss) == Type::float64)
    return reduce_as(values, count, terms, each, static_cast<double*>(loss.data_ptr()), stream);
  reduce_as(values, count, terms, each, static_cast<float*>(loss.data_ptr()), stream);
}

}  // namespace medkd
