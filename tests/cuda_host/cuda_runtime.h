// The part of CUDA that csrc/cuda uses, for a host compiler: a launch runs the kernel before it returns.
//
// The threads of a block are fibers of one thread of the host (emulator.cpp). Any order of threads between two barriers and
// of blocks is possible, and the order is a different one every time, so a kernel that needs a certain one gives wrong
// results. Shared memory is NaN when a block begins.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
#define __grid_constant__

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Those of the fiber that runs.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_host {

constexpr std::size_t default_shared_bytes = 48 * 1024;
constexpr std::size_t most_shared_bytes = 99 * 1024;  // of a block, with compute capability 8.6, 8.9 and 12.0

// Runs `thread` for every thread of every block. Throws std::runtime_error in words when the kernel did what CUDA forbids.
void run(const cudaLaunchConfig_t& config, const std::function<void()>& thread);

void block_barrier();

// Waits until every lane in `mask` has come, then returns the value that lane `source` of them brought.
uint64_t exchange(unsigned mask, uint64_t value, int source);
int lane();

std::size_t limit_of(const void* kernel);
void set_limit(const void* kernel, std::size_t bytes);

}  // namespace cuda_host

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > cuda_host::most_shared_bytes) return cudaErrorInvalidValue;
  cuda_host::set_limit(reinterpret_cast<const void*>(kernel), static_cast<std::size_t>(bytes));
  return cudaSuccess;
}

template <typename... Params, typename... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024)
    return cudaErrorInvalidConfiguration;
  if (config->dynamicSmemBytes > cuda_host::limit_of(reinterpret_cast<const void*>(kernel)))
    return cudaErrorInvalidValue;
  cuda_host::run(*config, [&] { kernel(static_cast<Params>(args)...); });
  return cudaSuccess;
}

inline void __syncthreads() { cuda_host::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::exchange(mask, 0, cuda_host::lane()); }

namespace cuda_host {

template <typename T>
T shuffle(unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic<T>::value && sizeof(T) <= 8, "CUDA shuffles numbers of 4 and 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_host

// A source beyond the group of `width` lanes is the lane itself.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return cuda_host::shuffle(mask, value, (cuda_host::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32) {
  const int lane = cuda_host::lane(), source = lane ^ distance;
  return cuda_host::shuffle(mask, value, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = cuda_host::lane(), source = lane - static_cast<int>(distance);
  return cuda_host::shuffle(mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int lane = cuda_host::lane(), source = lane + static_cast<int>(distance);
  return cuda_host::shuffle(mask, value, source > (lane | (width - 1)) ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned votes = 0;
  for (int source = 0; source < 32; ++source)
    if (mask >> source & 1) votes |= static_cast<unsigned>(cuda_host::exchange(mask, predicate != 0, source)) << source;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

template <typename T>
T __ldg(const T* from) {
  return *from;
}

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }
inline unsigned __umulhi(unsigned x, unsigned y) { return static_cast<unsigned>(uint64_t{x} * y >> 32); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
using std::max;
using std::min;
