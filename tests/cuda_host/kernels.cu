// Kernels for the test of the emulation, right ones and wrong ones: tests/test_cuda_host.py.
#include "../../csrc/cuda/tensor.h"

namespace medkd {

// Sums of a block, a warp and a warp's halves, and neighbours' values.
__global__ void right(float* out, int64_t) {
  const float x = static_cast<float>(threadIdx.x);
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), stride = static_cast<int>(gridDim.x * blockDim.x);
  out[i] = block_sum(x, shared_memory<float>());
  out[i + stride] = warp_sum(x);
  out[i + 2 * stride] = warp_max(x);
  out[i + 3 * stride] = __shfl_up_sync(all_lanes, x, 1);
  out[i + 4 * stride] = __shfl_down_sync(all_lanes, x, 1, 16);
  // the even and the odd lanes, each among themselves
  const unsigned mask = threadIdx.x % 2 ? 0xaaaaaaaau : 0x55555555u;
  if (threadIdx.x % 2)
    out[i + 5 * stride] = __shfl_xor_sync(mask, x, 2);
  else
    out[i + 5 * stride] = __shfl_sync(mask, x, 4);
}

__global__ void behind_shared_memory(float*, int64_t shared_bytes) {
  shared_memory<float>()[shared_bytes / 4 - (threadIdx.x == 0 ? 0 : 1)] = 1;
}

__global__ void divergent_barrier(float*, int64_t) {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void lane_that_ended(float* out, int64_t) {
  if (threadIdx.x == 33) return;
  out[threadIdx.x] = warp_sum(1.0f);
}

__global__ void lane_at_another_barrier(float* out, int64_t) {
  if (threadIdx.x == 33) __syncthreads();
  out[threadIdx.x] = warp_sum(1.0f);
  if (threadIdx.x != 33) __syncthreads();
}

__global__ void lane_not_in_the_mask(float* out, int64_t) { out[threadIdx.x] = __shfl_sync(0xffffu, 1.0f, 0); }

// Reverses a block through shared memory.
template <bool barrier>
__global__ void reverse(float* out, int64_t) {
  float* shared = shared_memory<float>();
  shared[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (barrier) __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}

// Every block adds to what the block before it left.
__global__ void blocks_in_order(float* out, int64_t) {
  if (threadIdx.x == 0) out[blockIdx.x] = blockIdx.x == 0 ? 1 : out[blockIdx.x - 1] + 1;
}

static void run(const std::string& name, Tensor out, int64_t blocks, int64_t threads, int64_t shared_bytes) {
  const OnDevice device(out);
  float* data = static_cast<float*>(out.data_ptr());
  const auto go = [&](auto kernel) {
    launch<decltype(kernel)::value>({blocks}, static_cast<int>(threads),
                                    static_cast<std::size_t>(shared_bytes), device.stream(), data, shared_bytes);
  };
#define MEDKD_KERNEL(...) \
  if (name == #__VA_ARGS__) return go(std::integral_constant<void (*)(float*, int64_t), __VA_ARGS__>())
  MEDKD_KERNEL(right);
  MEDKD_KERNEL(behind_shared_memory);
  MEDKD_KERNEL(divergent_barrier);
  MEDKD_KERNEL(lane_that_ended);
  MEDKD_KERNEL(lane_at_another_barrier);
  MEDKD_KERNEL(lane_not_in_the_mask);
  MEDKD_KERNEL(reverse<true>);
  MEDKD_KERNEL(reverse<false>);
  MEDKD_KERNEL(blocks_in_order);
  throw std::runtime_error("no kernel " + name);
}

}  // namespace medkd

STABLE_TORCH_LIBRARY(medkd_fast_cuda_host, m) {
  m.def("run(str name, Tensor(a!) out, int blocks, int threads, int shared_bytes) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(medkd_fast_cuda_host, CPU, m) { m.impl("run", TORCH_BOX(&medkd::run)); }
