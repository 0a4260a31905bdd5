// What the kernels of max_pool and average_pool share: where windows lie, and who works on which.
#pragma once

#include <algorithm>
#include <type_traits>

#include "tensor.h"

namespace medkd {

constexpr int pool_threads = 256;
constexpr int pool_tile = 32;  // channels, and windows, of a tile
constexpr int pool_rows = pool_threads / pool_tile;
// On a multiprocessor. Left alone, the compiler spills a few registers to fit more.
constexpr int least_blocks = 4;
constexpr int large_window = 64;  // pixels, from which on a warp goes over them

// What an element is compared or added up as.
template <typename T>
using Wide = std::conditional_t<sizeof(T) == 8, double, float>;

struct PoolCall {
  Planes x;             // [B, C, N]; its gradient in the backward
  void* pooled;         // [B, C, windows]; the upstream gradient in the backward
  const uint8_t* mask;  // [B, N] or nullptr
  int size[3], window[3], pooled_size[3];  // along z, y and x; in windows
  unsigned pixels, windows, channels;   // of a plane, and of an image
  unsigned planes, first_plane, count;  // of all images; of this launch, so few that 32 bits number their pixels

  // Neighbouring threads take neighbouring channels; few of them would leave most threads without.
  bool channels_inside() const { return x.stride_c == 1 && x.stride_n != 1 && channels >= 8; }
};

// A window: its first pixel along each axis, and how many there are.
struct Window {
  int first[3], count[3];

  __device__ __forceinline__ Window(const PoolCall& call, unsigned index) {
    int rest = static_cast<int>(index);
#pragma unroll
    for (int d = 2; d >= 0; --d) {
      const int line = rest / call.pooled_size[d];
      first[d] = (rest - line * call.pooled_size[d]) * call.window[d];
      count[d] = min(call.size[d] - first[d], call.window[d]);
      rest = line;
    }
  }

  __device__ __forceinline__ int64_t line(const PoolCall& call, int z, int y) const {
    return (int64_t{first[0] + z} * call.size[1] + first[1] + y) * call.size[2] + first[2];
  }
};

template <typename T>
__device__ __forceinline__ T* plane_of(const PoolCall& call, int64_t image, int64_t channel) {
  return static_cast<T*>(call.x.data) + image * call.x.stride_b + channel * call.x.stride_c;
}

__device__ __forceinline__ const uint8_t* mask_of(const PoolCall& call, int64_t image) {
  return call.mask == nullptr ? nullptr : call.mask + image * call.pixels;
}

// A thread's window, or pixel, of which plane.
struct InPlane {
  unsigned plane, image, channel, index;

  __device__ __forceinline__ InPlane(const PoolCall& call, unsigned turn, unsigned of_plane) {
    const unsigned planes = turn / of_plane;
    index = turn - planes * of_plane;
    plane = call.first_plane + planes;
    image = plane / call.channels;
    channel = plane - image * call.channels;
  }

  __device__ __forceinline__ int64_t window(const PoolCall& call) const { return int64_t{plane} * call.windows + index; }
};

__device__ __forceinline__ unsigned thread_index() { return blockIdx.x * blockDim.x + threadIdx.x; }

// The tile of 32 channels and 32 windows that a block has.
struct PoolTile {
  unsigned image, channel, first;

  explicit __device__ __forceinline__ PoolTile(const PoolCall& call) {
    const unsigned groups = ceil_div(call.channels, pool_tile), tiles = ceil_div(call.windows, pool_tile);
    const unsigned rest = blockIdx.x / tiles;
    first = (blockIdx.x - rest * tiles) * pool_tile;
    image = rest / groups;
    channel = (rest - image * groups) * pool_tile;
  }

  // Where the result of one of its channels and windows lies.
  __device__ __forceinline__ int64_t window(const PoolCall& call, int c, int w) const {
    return (int64_t{image} * call.channels + channel + c) * call.windows + first + w;
  }
};

// Shared memory of a tile: no two threads that go along either side meet in a bank.
constexpr int tile_stride = pool_tile + 1;

inline Blocks grid_of(int64_t work, int64_t of_block) { return {ceil_div(work, of_block)}; }

// Whether every line of pixels is a whole number of aligned packs of 16 bytes, in windows of two.
template <typename T>
bool lines_in_packs(const PoolCall& call) {
  const Planes& x = call.x;
  constexpr int64_t width = pack_of<T>;
  return call.window[2] == 2 && x.stride_n == 1 && call.size[2] % width == 0 && x.stride_b % width == 0 &&
         x.stride_c % width == 0 && reinterpret_cast<uintptr_t>(x.data) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(call.pooled) % 16 == 0;
}

inline Blocks tiles_of(const PoolCall& call) {
  const int64_t groups = ceil_div(call.channels, pool_tile), tiles = ceil_div(call.windows, pool_tile);
  return grid_of(call.planes / call.channels * groups * tiles, 1);
}

// Calls queue(call) with as many planes as 32 bits number the pixels of, as often as that takes.
template <typename Call, typename Queue>
void over_planes(Call call, const Queue& queue) {
  const unsigned most = std::max(0x7fffffffu / call.pixels, 1u);
  for (; call.first_plane < call.planes; call.first_plane += call.count) {
    call.count = std::min(most, call.planes - call.first_plane);
    queue(call);
  }
}

// A thread of `of_pixel` has a pixel, one of `in_packs` a pack of windows, a block of `in_tiles` a tile.
template <typename T, auto in_tiles, auto in_packs, auto of_pixel, typename Call>
void launch_gradient(const Call& all, bool packs, std::size_t tile_bytes, cudaStream_t stream) {
  if (!packs && all.channels_inside()) return launch<in_tiles>(tiles_of(all), pool_threads, tile_bytes, stream, all);
  over_planes(all, [&](const Call& call) {
    const int64_t windows = int64_t{call.count} * call.windows, pixels = int64_t{call.count} * call.pixels;
    if (packs)
      launch<in_packs>(grid_of(windows / (pack_of<T> / 2), pool_threads), pool_threads, 0, stream, call);
    else
      launch<of_pixel>(grid_of(pixels, pool_threads), pool_threads, 0, stream, call);
  });
}

inline bool is_large(const PoolCall& call) {
  return int64_t{call.window[0]} * call.window[1] * call.window[2] >= large_window;
}

// run(T()) with the type of x's elements.
template <typename Run>
void with_element(Type type, const Run& run) {
  switch (type) {
    case Type::float64: run(double()); break;
    case Type::bfloat16: run(BFloat16()); break;
    case Type::float16: run(Float16()); break;
    default: run(float());
  }
}

inline PoolCall call_of(const Tensor& x, const std::vector<int64_t>& window, std::vector<int64_t>& pooled_shape) {
  PoolCall call{};
  pooled_shape = {x.size(0), x.size(1)};
  int64_t pixels = 1, windows = 1;
  const int64_t axes = x.dim() - 2, planes = x.size(0) * x.size(1);
  for (int64_t d = 0; d < 3; ++d) {
    const int64_t axis = d - 3 + axes, size = axis < 0 ? 1 : x.size(axis + 2), step = axis < 0 ? 1 : window[axis];
    const int64_t number = ceil_div(size, step);
    call.size[d] = static_cast<int>(size);
    call.window[d] = static_cast<int>(step);
    call.pooled_size[d] = static_cast<int>(number);
    pixels *= size;
    windows *= number;
    if (axis >= 0) pooled_shape.push_back(number);
  }
  if (std::max(pixels, planes) > 0x7fffffff) throw std::runtime_error("medkd_fast: more pixels or planes than 32 bits number");
  call.pixels = static_cast<unsigned>(pixels);
  call.windows = static_cast<unsigned>(windows);
  call.channels = static_cast<unsigned>(x.size(1));
  call.planes = static_cast<unsigned>(planes);
  return call;
}

}  // namespace medkd
