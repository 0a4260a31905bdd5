// Launching a kernel, and what kernels share: the block's memory, sums in a fixed order, wide loads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../math/half.h"

extern __shared__ __align__(16) unsigned char medkd_shared_memory[];

namespace medkd {

using namespace MEDKD_ISA;  // there is one build of the device's code

constexpr int warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;
// Of a block, on every GPU from compute capability 8.0 on: 8.6, 8.9 and 12.0 have no more.
constexpr std::size_t most_shared_bytes = 99 * 1024;

// How many parts of b, the last one perhaps smaller, make a.
template <typename T>
__host__ __device__ constexpr T ceil_div(T a, std::common_type_t<T> b) {
  return (a + b - 1) / b;
}

// Of a launch. More than CUDA takes is an error in `launch`, where a dim3 would keep the remainder.
struct Blocks {
  int64_t x, y = 1;
};

// Queues kernel(args...); what goes wrong here is thrown with the kernel's name. (What goes wrong while it runs is seen by
// torch when it synchronises.)
template <auto kernel, typename... Args>
inline void launch(Blocks blocks, int threads, std::size_t shared_bytes, cudaStream_t stream, Args... args) {
  if (blocks.x == 0 || blocks.y == 0) return;
  cudaError_t error = blocks.x > 0x7fffffff || blocks.y > 0xffff ? cudaErrorInvalidConfiguration : cudaSuccess;
  if (error == cudaSuccess && shared_bytes > 48 * 1024)  // more must be asked for, on every device, and by all threads alike
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks.x), static_cast<unsigned>(blocks.y));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, args...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // taken notice of
  throw std::runtime_error(std::string(__PRETTY_FUNCTION__) + ": " + cudaGetErrorString(error) + " (" +
                           std::to_string(blocks.x) + " x " + std::to_string(blocks.y) + " blocks of " +
                           std::to_string(threads) + " threads with " + std::to_string(shared_bytes) +
                           " bytes of shared memory)");
}

// A product that no multiply-add swallows: it is the same number wherever it is made, so equal features have no difference.
__device__ __forceinline__ float rounded_product(float a, float b) {
#if MEDKD_DEVICE_CODE
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
__device__ __forceinline__ double rounded_product(double a, double b) {
#if MEDKD_DEVICE_CODE
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// The dynamic shared memory of the block, the only one that kernels use.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  return reinterpret_cast<T*>(medkd_shared_memory);
}

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % warp_size; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / warp_size; }

// The sum over a warp's lanes, in every lane. Each is added to its neighbour at distance 16, 8, ...: the same order always.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(all_lanes, x, distance);
  return x;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(all_lanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// The sum over a block's threads, whose number is a multiple of 32, in every thread: warps first, then the warps' sums in
// their order. `scratch` is shared memory for one value a warp, free for other use after the next __syncthreads.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* scratch) {
  x = warp_sum(x);
  if (lane_index() == 0) scratch[warp_index()] = x;
  __syncthreads();
  T sum = T(0);
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / warp_size; ++warp) sum += scratch[warp];
  return sum;
}

// Neighbours in memory, moved together; the address must be a multiple of their size, at most 16 bytes.
template <typename T, int count>
struct alignas(sizeof(T) * count) Pack {
  T value[count];
};

template <typename T>
constexpr int pack_of = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

template <int count, typename T>
__device__ __forceinline__ Pack<T, count> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, count>*>(from);
}

template <int count, typename T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, count>& pack) {
  *reinterpret_cast<Pack<T, count>*>(to) = pack;
}

// store_pack to global memory in one store: the compiler makes one of every element where an address is a product of strides.
template <typename T, int count>
__device__ __forceinline__ void store_whole(T* to, const Pack<T, count>& pack) {
#if MEDKD_DEVICE_CODE
  const auto at = __cvta_generic_to_global(to);
  uint32_t word[4] = {};
  if constexpr (sizeof pack <= sizeof word) memcpy(word, &pack, sizeof pack);
  if constexpr (sizeof pack == 16)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(word[0]), "r"(word[1]), "r"(word[2]), "r"(word[3])
                 : "memory");
  if constexpr (sizeof pack == 8)
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(at), "r"(word[0]), "r"(word[1]) : "memory");
  if constexpr (sizeof pack == 4) asm volatile("st.global.b32 [%0], %1;" ::"l"(at), "r"(word[0]) : "memory");
#else
  store_pack(to, pack);
#endif
}

}  // namespace medkd
