// average_pool: the numbers of the windows' pixels, the averages, and the gradient.
//
// Where a channel's pixels lie side by side and windows are two along x, a thread takes 16 bytes of every line of its windows;
// else a window has one thread, or a warp where it is large. Where channels lie side by side neighbouring threads take
// neighbouring channels, and tiles are turned in shared memory, because the averages are contiguous.
#include "pool.h"

namespace medkd {

struct AveragePoolCall : PoolCall {
  int32_t* number;  // [B, windows]
};

__device__ __forceinline__ bool counts(const uint8_t* mask, int64_t pixel) { return mask == nullptr || mask[pixel] != 0; }

__device__ __forceinline__ int lanes_first(bool warp) { return warp ? lane_index() : 0; }

// A window, counted over the images, has a thread, or a warp.
template <bool warp>
__global__ void __launch_bounds__(pool_threads, least_blocks) number_kernel(const AveragePoolCall call, unsigned images) {
  const unsigned turn = warp ? blockIdx.x * (blockDim.x / warp_size) + threadIdx.x / warp_size : thread_index();
  if (turn >= images * call.windows) return;
  const unsigned image = turn / call.windows;
  const Window window(call, turn - image * call.windows);
  const uint8_t* const mask = mask_of(call, image);
  int found = 0;
  if (mask == nullptr) {
    found = window.count[0] * window.count[1] * window.count[2];
  } else {
    for (int z = 0; z < window.count[0]; ++z)
      for (int y = 0; y < window.count[1]; ++y)
        for (int x = lanes_first(warp); x < window.count[2]; x += warp ? warp_size : 1)
          found += counts(mask, window.line(call, z, y) + x) ? 1 : 0;
    if (warp) found = warp_sum(found);
  }
  if (!warp || lane_index() == 0) call.number[turn] = found;
}

// Of a window, every `step`-th pixel along x.
template <typename Sum, typename T>
__device__ __forceinline__ Sum sum_of(const AveragePoolCall& call, const Window& window, const T* plane, const uint8_t* mask,
                                      int from, int step) {
  Sum sum = 0;
  for (int z = 0; z < window.count[0]; ++z)
    for (int y = 0; y < window.count[1]; ++y) {
      const int64_t line = window.line(call, z, y);
      for (int x = from; x < window.count[2]; x += step)
        if (counts(mask, line + x)) sum += static_cast<Sum>(widen(plane[(line + x) * call.x.stride_n]));
    }
  return sum;
}

template <typename A, typename Sum>
__device__ __forceinline__ A average_of(Sum sum, int number) {
  return number > 0 ? static_cast<A>(sum / static_cast<Sum>(number)) : A(0);
}

// Windows of two along x: a thread has 16 bytes of a line, half as many windows. A line is a whole number of them.
template <typename T>
__global__ void __launch_bounds__(pool_threads, least_blocks) average_pairs_kernel(const AveragePoolCall call) {
  using A = Wide<T>;
  constexpr int width = pack_of<T>, own = width / 2;
  const unsigned turn = thread_index() * own;
  if (turn >= call.count * call.windows) return;
  const InPlane at(call, turn, call.windows);
  const Window window(call, at.index);
  const T* const from = plane_of<T>(call, at.image, at.channel);
  const uint8_t* const mask = mask_of(call, at.image);
  A sum[own] = {};
  for (int z = 0; z < window.count[0]; ++z)
    for (int y = 0; y < window.count[1]; ++y) {
      const int64_t line = window.line(call, z, y);
      const Pack<T, width> pack = load_pack<width>(from + line);
#pragma unroll
      for (int i = 0; i < width; ++i) sum[i / 2] += counts(mask, line + i) ? widen(pack.value[i]) : A(0);
    }
  const int32_t* const number = call.number + int64_t{at.image} * call.windows + at.index;
  Pack<A, own> average;
#pragma unroll
  for (int i = 0; i < own; ++i) average.value[i] = average_of<A>(sum[i], number[i]);
  store_pack(static_cast<A*>(call.pooled) + at.window(call), average);
}

template <typename T>
__global__ void __launch_bounds__(pool_threads, least_blocks) share_pairs_kernel(const AveragePoolCall call) {
  using A = Wide<T>;
  constexpr int width = pack_of<T>, own = width / 2;
  const unsigned turn = thread_index() * own;
  if (turn >= call.count * call.windows) return;
  const InPlane at(call, turn, call.windows);
  const Window window(call, at.index);
  T* const to = plane_of<T>(call, at.image, at.channel);
  const uint8_t* const mask = mask_of(call, at.image);
  const int32_t* const number = call.number + int64_t{at.image} * call.windows + at.index;
  const Pack<A, own> upstream = load_pack<own>(static_cast<const A*>(call.pooled) + at.window(call));
  A share[own];
#pragma unroll
  for (int i = 0; i < own; ++i) share[i] = average_of<A>(upstream.value[i], number[i]);
  for (int z = 0; z < window.count[0]; ++z)
    for (int y = 0; y < window.count[1]; ++y) {
      const int64_t line = window.line(call, z, y);
      Pack<T, width> pack;
#pragma unroll
      for (int i = 0; i < width; ++i) narrow(counts(mask, line + i) ? share[i / 2] : A(0), pack.value[i]);
      store_pack(to + line, pack);
    }
}

// A window has a thread, or a warp, which adds up in double.
template <typename T, bool warp>
__global__ void __launch_bounds__(pool_threads, least_blocks) average_kernel(const AveragePoolCall call) {
  using Sum = std::conditional_t<warp, double, Wide<T>>;
  const unsigned turn = warp ? blockIdx.x * (blockDim.x / warp_size) + threadIdx.x / warp_size : thread_index();
  if (turn >= call.count * call.windows) return;
  const InPlane at(call, turn, call.windows);
  const T* const from = plane_of<T>(call, at.image, at.channel);
  Sum sum = sum_of<Sum>(call, Window(call, at.index), from, mask_of(call, at.image), lanes_first(warp), warp ? warp_size : 1);
  if (warp) {
    sum = warp_sum(sum);
    if (lane_index() != 0) return;
  }
  static_cast<Wide<T>*>(call.pooled)[at.window(call)] =
      average_of<Wide<T>>(sum, call.number[int64_t{at.image} * call.windows + at.index]);
}

template <typename T, typename Sum>
__global__ void __launch_bounds__(pool_threads, least_blocks) average_channels_kernel(const AveragePoolCall call) {
  using A = Wide<T>;
  A* const values = shared_memory<A>();  // [channels, tile_stride]
  const PoolTile tile(call);
  const int lane = static_cast<int>(threadIdx.x) % pool_tile, row = static_cast<int>(threadIdx.x) / pool_tile;
  for (int w = row; w < pool_tile && tile.first + w < call.windows; w += pool_rows)
    if (tile.channel + lane < call.channels) {
      const T* const from = plane_of<T>(call, tile.image, tile.channel + lane);
      const Sum sum = sum_of<Sum>(call, Window(call, tile.first + w), from, mask_of(call, tile.image), 0, 1);
      values[lane * tile_stride + w] = average_of<A>(sum, call.number[int64_t{tile.image} * call.windows + tile.first + w]);
    }
  __syncthreads();
  for (int c = row; c < pool_tile && tile.channel + c < call.channels; c += pool_rows)
    if (tile.first + lane < call.windows)
      static_cast<A*>(call.pooled)[tile.window(call, c, lane)] = values[c * tile_stride + lane];
}

template <typename T>
__global__ void __launch_bounds__(pool_threads, least_blocks) share_channels_kernel(const AveragePoolCall call) {
  using A = Wide<T>;
  A* const shares = shared_memory<A>();  // [channels, tile_stride]
  const PoolTile tile(call);
  const int lane = static_cast<int>(threadIdx.x) % pool_tile, row = static_cast<int>(threadIdx.x) / pool_tile;
  for (int c = row; c < pool_tile && tile.channel + c < call.channels; c += pool_rows)
    if (tile.first + lane < call.windows)
      shares[c * tile_stride + lane] = average_of<A>(static_cast<const A*>(call.pooled)[tile.window(call, c, lane)],
                                                     call.number[int64_t{tile.image} * call.windows + tile.first + lane]);
  __syncthreads();
  if (tile.channel + lane >= call.channels) return;
  T* const to = plane_of<T>(call, tile.image, tile.channel + lane);
  const uint8_t* const mask = mask_of(call, tile.image);
  for (int w = row; w < pool_tile && tile.first + w < call.windows; w += pool_rows) {
    const Window window(call, tile.first + w);
    const A share = shares[lane * tile_stride + w];
    for (int z = 0; z < window.count[0]; ++z)
      for (int y = 0; y < window.count[1]; ++y) {
        const int64_t line = window.line(call, z, y);
        for (int x = 0; x < window.count[2]; ++x)
          narrow(counts(mask, line + x) ? share : A(0), to[(line + x) * call.x.stride_n]);
      }
  }
}

// A thread has a pixel.
template <typename T>
__global__ void __launch_bounds__(pool_threads, least_blocks) share_kernel(const AveragePoolCall call) {
  using A = Wide<T>;
  const unsigned turn = thread_index();
  if (turn >= call.count * call.pixels) return;
  const InPlane at(call, turn, call.pixels);
  int rest = static_cast<int>(at.index), index[3];
#pragma unroll
  for (int d = 2; d >= 0; --d) {
    const int line = rest / call.size[d];
    index[d] = (rest - line * call.size[d]) / call.window[d];
    rest = line;
  }
  const int64_t window = (int64_t{index[0]} * call.pooled_size[1] + index[1]) * call.pooled_size[2] + index[2];
  const A upstream = static_cast<const A*>(call.pooled)[int64_t{at.plane} * call.windows + window];
  const A share = average_of<A>(upstream, call.number[int64_t{at.image} * call.windows + window]);
  narrow(counts(mask_of(call, at.image), at.index) ? share : A(0),
         plane_of<T>(call, at.image, at.channel)[at.index * call.x.stride_n]);
}

template <typename T>
constexpr std::size_t tile_bytes = pool_tile * tile_stride * sizeof(Wide<T>);

template <typename T>
static void forward(const AveragePoolCall& all, cudaStream_t stream) {
  if (!lines_in_packs<T>(all) && all.channels_inside()) {
    if (is_large(all))
      launch<average_channels_kernel<T, double>>(tiles_of(all), pool_threads, tile_bytes<T>, stream, all);
    else
      launch<average_channels_kernel<T, Wide<T>>>(tiles_of(all), pool_threads, tile_bytes<T>, stream, all);
    return;
  }
  over_planes(all, [&](const AveragePoolCall& call) {
    const int64_t windows = int64_t{call.count} * call.windows;
    if (is_large(call))
      launch<average_kernel<T, true>>(grid_of(windows, pool_threads / warp_size), pool_threads, 0, stream, call);
    else if (lines_in_packs<T>(call))
      launch<average_pairs_kernel<T>>(grid_of(windows / (pack_of<T> / 2), pool_threads), pool_threads, 0, stream, call);
    else
      launch<average_kernel<T, false>>(grid_of(windows, pool_threads), pool_threads, 0, stream, call);
  });
}

template <typename T>
static void backward(const AveragePoolCall& call, cudaStream_t stream) {
  launch_gradient<T, share_channels_kernel<T>, share_pairs_kernel<T>, share_kernel<T>>(call, lines_in_packs<T>(call),
                                                                                       tile_bytes<T>, stream);
}

static void count(const AveragePoolCall& call, int64_t images, cudaStream_t stream) {
  const int64_t windows = images * call.windows;
  if (windows > 0x7fffffff) throw std::runtime_error("medkd_fast: more windows than 32 bits number");
  const unsigned of_all = static_cast<unsigned>(images);
  if (is_large(call))
    launch<number_kernel<true>>(grid_of(windows, pool_threads / warp_size), pool_threads, 0, stream, call, of_all);
  else
    launch<number_kernel<false>>(grid_of(windows, pool_threads), pool_threads, 0, stream, call, of_all);
}

static std::tuple<Tensor, Tensor> average_pool(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::vector<int64_t>& window) {
  const OnDevice device(x);
  std::vector<int64_t> shape;
  std::vector<Tensor> holder;
  holder.reserve(1);
  AveragePoolCall call{call_of(x, window, shape), nullptr};
  Tensor pooled = new_like(x, shape, arithmetic_type(x, x));
  shape.erase(shape.begin() + 1);
  Tensor number = new_like(x, shape, ScalarType::Int);
  call.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.pooled = pooled.data_ptr();
  call.number = static_cast<int32_t*>(number.data_ptr());
  if (number.numel() > 0) count(call, x.size(0), device.stream());
  if (x.numel() == 0) return {pooled, number};
  call.x = planes_of(x, holder);
  with_element(call.x.type, [&](auto zero) { forward<decltype(zero)>(call, device.stream()); });
  return {pooled, number};
}

static Tensor average_pool_backward(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& number,               // [B, *P], int32, contiguous
    const Tensor& upstream,             // [B, C, *P], in the type of the arithmetic
    const std::vector<int64_t>& window) {
  const OnDevice device(x);
  std::vector<int64_t> shape;
  std::vector<Tensor> holder;
  holder.reserve(1);
  AveragePoolCall call{call_of(x, window, shape), nullptr};
  const Gradient gradient(x);
  if (x.numel() == 0) return gradient.finish();
  const Tensor dense = as_contiguous(upstream);
  call.x = planes_of(gradient.written, holder);
  call.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.pooled = dense.data_ptr();
  call.number = static_cast<int32_t*>(number.data_ptr());
  with_element(call.x.type, [&](auto zero) { backward<decltype(zero)>(call, device.stream()); });
  return gradient.finish();
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("average_pool_cuda", TORCH_BOX(&medkd::average_pool));
  m.impl("average_pool_backward_cuda", TORCH_BOX(&medkd::average_pool_backward));
}
