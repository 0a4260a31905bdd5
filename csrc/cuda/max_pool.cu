// max_pool: the maxima with their places, and the gradient.
//
// Where a channel's pixels lie side by side and windows are two along x, a thread takes 16 bytes of every line of its windows;
// else a window has one thread, or a warp where it is large. Where channels lie side by side neighbouring threads take
// neighbouring channels, and tiles are turned in shared memory, because the maxima are contiguous.
#include "pool.h"

namespace medkd {

struct MaxPoolCall : PoolCall {
  int16_t* place;  // [B, C, windows]
};

// The largest value so far with its place, -1 if there is none. The first of equal ones, the last that is no number.
template <typename T>
struct Largest {
  T value{};
  int place = -1;

  static __device__ __forceinline__ bool above(T later, T earlier) {
    const Wide<T> a = widen(later), b = widen(earlier);
    return a > b || a != a;
  }
  __device__ __forceinline__ void take(T x, int number) {
    if (place >= 0 && !above(x, value)) return;
    value = x;
    place = number;
  }
  // What others have found, in any order.
  __device__ __forceinline__ void merge(T x, int number) {
    if (number < 0 || (place >= 0 && !(number > place ? above(x, value) : !above(value, x)))) return;
    value = x;
    place = number;
  }
};

// A window's pixels from..., `step` apart along x.
template <typename T>
__device__ __forceinline__ Largest<T> largest_of(const PoolCall& call, const Window& window, const T* plane,
                                                 const uint8_t* mask, int from, int step) {
  Largest<T> found;
  for (int z = 0; z < window.count[0]; ++z)
    for (int y = 0; y < window.count[1]; ++y) {
      const int64_t line = window.line(call, z, y);
      const int number = (z * call.window[1] + y) * call.window[2];
      for (int x = from; x < window.count[2]; x += step)
        if (mask == nullptr || mask[line + x] != 0) found.take(plane[(line + x) * call.x.stride_n], number + x);
    }
  return found;
}

// Windows of two along x: a thread has 16 bytes of a line, half as many windows. A line is a whole number of them.
template <typename T>
__global__ void __launch_bounds__(pool_threads, least_blocks) pool_pairs_kernel(const MaxPoolCall call) {
  constexpr int width = pack_of<T>, own = width / 2;
  const unsigned turn = thread_index() * own;
  if (turn >= call.count * call.windows) return;
  const InPlane at(call, turn, call.windows);
  const Window window(call, at.index);
  const T* const from = plane_of<T>(call, at.image, at.channel);
  const uint8_t* const mask = mask_of(call, at.image);
  Largest<T> found[own];
  for (int z = 0; z < window.count[0]; ++z)
    for (int y = 0; y < window.count[1]; ++y) {
      const int64_t line = window.line(call, z, y);
      const int number = (z * call.window[1] + y) * 2;
      const Pack<T, width> pack = load_pack<width>(from + line);
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (mask == nullptr || mask[line + i] != 0) found[i / 2].take(pack.value[i], number + i % 2);
    }
  Pack<T, own> value;
  Pack<int16_t, own> place;
#pragma unroll
  for (int i = 0; i < own; ++i) {
    value.value[i] = found[i].value;
    place.value[i] = static_cast<int16_t>(found[i].place);
  }
  store_pack(static_cast<T*>(call.pooled) + at.window(call), value);
  store_pack(call.place + at.window(call), place);
}

template <typename T>
__global__ void __launch_bounds__(pool_threads, least_blocks) spread_pairs_kernel(const MaxPoolCall call) {
  constexpr int width = pack_of<T>, own = width / 2;
  const unsigned turn = thread_index() * own;
  if (turn >= call.count * call.windows) return;
  const InPlane at(call, turn, call.windows);
  const Window window(call, at.index);
  T* const to = plane_of<T>(call, at.image, at.channel);
  const Pack<T, own> upstream = load_pack<own>(static_cast<const T*>(call.pooled) + at.window(call));
  const Pack<int16_t, own> place = load_pack<own>(call.place + at.window(call));
  for (int z = 0; z < window.count[0]; ++z)
    for (int y = 0; y < window.count[1]; ++y) {
      const int number = (z * call.window[1] + y) * 2;
      Pack<T, width> pack;
#pragma unroll
      for (int i = 0; i < width; ++i) pack.value[i] = place.value[i / 2] == number + i % 2 ? upstream.value[i / 2] : T{};
      store_pack(to + window.line(call, z, y), pack);
    }
}

// A window has a thread, or a warp.
template <typename T, bool warp>
__global__ void __launch_bounds__(pool_threads, least_blocks) pool_kernel(const MaxPoolCall call) {
  const unsigned turn = warp ? blockIdx.x * (blockDim.x / warp_size) + threadIdx.x / warp_size : thread_index();
  if (turn >= call.count * call.windows) return;
  const InPlane at(call, turn, call.windows);
  const Window window(call, at.index);
  const T* const from = plane_of<T>(call, at.image, at.channel);
  Largest<T> found = largest_of(call, window, from, mask_of(call, at.image), warp ? lane_index() : 0, warp ? warp_size : 1);
  if (warp) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
      // as the arithmetic has it: a shuffle moves 4 or 8 bytes
      const Wide<T> wide = __shfl_xor_sync(all_lanes, static_cast<Wide<T>>(widen(found.value)), distance);
      const int number = __shfl_xor_sync(all_lanes, found.place, distance);
      T value;
      narrow(wide, value);
      found.merge(value, number);
    }
    if (lane_index() != 0) return;
  }
  static_cast<T*>(call.pooled)[at.window(call)] = found.value;
  call.place[at.window(call)] = static_cast<int16_t>(found.place);
}

template <typename T>
__global__ void __launch_bounds__(pool_threads, least_blocks) pool_channels_kernel(const MaxPoolCall call) {
  T* const values = shared_memory<T>();  // [channels, tile_stride]
  int16_t* const places = reinterpret_cast<int16_t*>(values + pool_tile * tile_stride);
  const PoolTile tile(call);
  const int lane = static_cast<int>(threadIdx.x) % pool_tile, row = static_cast<int>(threadIdx.x) / pool_tile;
  for (int w = row; w < pool_tile && tile.first + w < call.windows; w += pool_rows)
    if (tile.channel + lane < call.channels) {
      const Largest<T> found = largest_of(call, Window(call, tile.first + w),
                                          plane_of<T>(call, tile.image, tile.channel + lane), mask_of(call, tile.image), 0, 1);
      values[lane * tile_stride + w] = found.value;
      places[lane * tile_stride + w] = static_cast<int16_t>(found.place);
    }
  __syncthreads();
  for (int c = row; c < pool_tile && tile.channel + c < call.channels; c += pool_rows)
    if (tile.first + lane < call.windows) {
      const int64_t k = tile.window(call, c, lane);
      static_cast<T*>(call.pooled)[k] = values[c * tile_stride + lane];
      call.place[k] = places[c * tile_stride + lane];
    }
}

template <typename T>
__global__ void __launch_bounds__(pool_threads, least_blocks) spread_channels_kernel(const MaxPoolCall call) {
  T* const values = shared_memory<T>();  // [channels, tile_stride]
  int16_t* const places = reinterpret_cast<int16_t*>(values + pool_tile * tile_stride);
  const PoolTile tile(call);
  const int lane = static_cast<int>(threadIdx.x) % pool_tile, row = static_cast<int>(threadIdx.x) / pool_tile;
  for (int c = row; c < pool_tile && tile.channel + c < call.channels; c += pool_rows)
    if (tile.first + lane < call.windows) {
      const int64_t k = tile.window(call, c, lane);
      values[c * tile_stride + lane] = static_cast<const T*>(call.pooled)[k];
      places[c * tile_stride + lane] = call.place[k];
    }
  __syncthreads();
  if (tile.channel + lane >= call.channels) return;
  T* const to = plane_of<T>(call, tile.image, tile.channel + lane);
  for (int w = row; w < pool_tile && tile.first + w < call.windows; w += pool_rows) {
    const Window window(call, tile.first + w);
    const T upstream = values[lane * tile_stride + w];
    const int place = places[lane * tile_stride + w];
    for (int z = 0; z < window.count[0]; ++z)
      for (int y = 0; y < window.count[1]; ++y) {
        const int64_t line = window.line(call, z, y);
        const int number = (z * call.window[1] + y) * call.window[2];
        for (int x = 0; x < window.count[2]; ++x)
          to[(line + x) * call.x.stride_n] = place == number + x ? upstream : T{};
      }
  }
}

// A thread has a pixel.
template <typename T>
__global__ void __launch_bounds__(pool_threads, least_blocks) spread_kernel(const MaxPoolCall call) {
  const unsigned turn = thread_index();
  if (turn >= call.count * call.pixels) return;
  const InPlane at(call, turn, call.pixels);
  int rest = static_cast<int>(at.index), pixel[3];
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    const int line = rest / call.size[d];
    pixel[d] = rest - line * call.size[d];
    rest = line;
  }
  int64_t window = at.plane;
  int number = 0;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    const int index = pixel[d] / call.window[d];
    window = window * call.pooled_size[d] + index;
    number = number * call.window[d] + pixel[d] - index * call.window[d];
  }
  plane_of<T>(call, at.image, at.channel)[at.index * call.x.stride_n] =
      call.place[window] == number ? static_cast<const T*>(call.pooled)[window] : T{};
}

template <typename T>
static bool in_packs(const MaxPoolCall& call) {
  return lines_in_packs<T>(call) && reinterpret_cast<uintptr_t>(call.place) % 8 == 0;
}

template <typename T>
constexpr std::size_t tile_bytes = pool_tile * tile_stride * (sizeof(T) + sizeof(int16_t));

template <typename T>
static void forward(const MaxPoolCall& all, cudaStream_t stream) {
  if (!in_packs<T>(all) && all.channels_inside())
    return launch<pool_channels_kernel<T>>(tiles_of(all), pool_threads, tile_bytes<T>, stream, all);
  over_planes(all, [&](const MaxPoolCall& call) {
    const int64_t windows = int64_t{call.count} * call.windows;
    if (in_packs<T>(call))
      launch<pool_pairs_kernel<T>>(grid_of(windows / (pack_of<T> / 2), pool_threads), pool_threads, 0, stream, call);
    else if (is_large(call))
      launch<pool_kernel<T, true>>(grid_of(windows, pool_threads / warp_size), pool_threads, 0, stream, call);
    else
      launch<pool_kernel<T, false>>(grid_of(windows, pool_threads), pool_threads, 0, stream, call);
  });
}

template <typename T>
static void backward(const MaxPoolCall& call, cudaStream_t stream) {
  launch_gradient<T, spread_channels_kernel<T>, spread_pairs_kernel<T>, spread_kernel<T>>(call, in_packs<T>(call),
                                                                                          tile_bytes<T>, stream);
}

static std::tuple<Tensor, Tensor> max_pool(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::vector<int64_t>& window) {
  const OnDevice device(x);
  std::vector<int64_t> shape;
  std::vector<Tensor> holder;
  holder.reserve(1);
  MaxPoolCall call{call_of(x, window, shape), nullptr};
  Tensor pooled = new_like(x, shape, x.scalar_type()), place = new_like(x, shape, ScalarType::Short);
  if (x.numel() == 0) return {pooled, place};
  call.x = planes_of(x, holder);
  call.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.pooled = pooled.data_ptr();
  call.place = static_cast<int16_t*>(place.data_ptr());
  with_element(call.x.type, [&](auto zero) { forward<decltype(zero)>(call, device.stream()); });
  return {pooled, place};
}

static Tensor max_pool_backward(
    const Tensor& x,         // [B, C, *S]
    const Tensor& place,     // [B, C, *P], contiguous
    const Tensor& upstream,  // [B, C, *P], in x's type
    const std::vector<int64_t>& window) {
  const OnDevice device(x);
  std::vector<int64_t> shape;
  std::vector<Tensor> holder;
  holder.reserve(1);
  MaxPoolCall call{call_of(x, window, shape), nullptr};
  const Gradient gradient(x);
  if (x.numel() == 0) return gradient.finish();
  const Tensor dense = as_contiguous(upstream);
  call.x = planes_of(gradient.written, holder);
  call.pooled = dense.data_ptr();
  call.place = static_cast<int16_t*>(place.data_ptr());
  with_element(call.x.type, [&](auto zero) { backward<decltype(zero)>(call, device.stream()); });
  return gradient.finish();
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("max_pool_cuda", TORCH_BOX(&medkd::max_pool));
  m.impl("max_pool_backward_cuda", TORCH_BOX(&medkd::max_pool_backward));
}
