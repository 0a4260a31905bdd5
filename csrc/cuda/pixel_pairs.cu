#include "pixel_pairs.h"

namespace medkd {

constexpr int turn_threads = 256, turn_pixels = 64, turn_channels = 32;

// Turns tiles of 64 pixels and 32 channels over: in memory the pixels lie side by side, in the rows the channels.
template <typename A>
__global__ void __launch_bounds__(turn_threads) make_rows_kernel(const Normalised<A> x, int64_t depth, A* rows) {
  constexpr int width = lanes<A>, stride = turn_pixels + width;
  A* const tile = shared_memory<A>();  // [turn_channels, stride]
  const int64_t parts = ceil_div(depth, turn_channels), tiles = x.padded / turn_pixels;
  const int64_t channel = blockIdx.x % parts * turn_channels, pixel = blockIdx.x / parts % tiles * turn_pixels;
  const int64_t image = blockIdx.x / parts / tiles;
  Walk walk(turn_channels, turn_pixels / width, x.x.channels_inside(), static_cast<int>(threadIdx.x), turn_threads);
  for (; walk.inside(); walk.next()) {
    const int64_t at = pixel + walk.pack() * width;
    store_pack(tile + walk.row() * stride + walk.pack() * width,
               x.load(image, channel + walk.row(), at, pixels_in_pack<A>(at, x.pixels)));
  }
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < turn_pixels * (turn_channels / width); k += turn_threads) {
    const int row = k / (turn_channels / width), c = k % (turn_channels / width) * width;
    Pack<A, width> pack;
#pragma unroll
    for (int n = 0; n < width; ++n) pack.value[n] = tile[(c + n) * stride + row];
    if (channel + c < depth) store_whole(rows + (image * x.padded + pixel + row) * depth + channel + c, pack);
  }
}

template <typename A>
UnitRows<A> make_rows(const Normalised<A>& x, A* rows, cudaStream_t stream) {
  const int depth = row_depth<A>(x.channels);
  const int64_t parts = ceil_div(depth, turn_channels);
  launch<make_rows_kernel<A>>({x.images * (x.padded / turn_pixels) * parts}, turn_threads,
                              turn_channels * (turn_pixels + lanes<A>)*sizeof(A), stream, x, depth, rows);
  return {rows, x.padded, depth};
}

template UnitRows<float> make_rows<float>(const Normalised<float>&, float*, cudaStream_t);
template UnitRows<double> make_rows<double>(const Normalised<double>&, double*, cudaStream_t);

}  // namespace medkd
