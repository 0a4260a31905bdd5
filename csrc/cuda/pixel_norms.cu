#include "pixel_norms.h"

#include "apply.h"

namespace medkd {

constexpr int norm_threads = 256;
constexpr int members = 8;  // partial sums of a pixel's channels: in as many threads, or in one

// The members' sums of channel(c) for c = member, member + 8, ..., added in one order wherever they are.
template <typename A, typename Term>
__device__ __forceinline__ Pack<A, lanes<A>> over_channels(int64_t channels, bool shared_out, const Term& term) {
  constexpr int width = lanes<A>;
  Pack<A, width> sum[members] = {};
  if (shared_out) {
    const int member = lane_index() % members;
    for (int64_t c = member; c < channels; c += members) term(c, sum[0]);
#pragma unroll
    for (int k = 0; k < width; ++k)
#pragma unroll
      for (int distance = members / 2; distance > 0; distance /= 2)
        sum[0].value[k] += __shfl_xor_sync(all_lanes, sum[0].value[k], distance);
    return sum[0];
  }
  int64_t c = 0;
  for (; c + members <= channels; c += members)
#pragma unroll
    for (int member = 0; member < members; ++member) term(c + member, sum[member]);
#pragma unroll
  for (int member = 0; member < members; ++member)
    if (c + member < channels) term(c + member, sum[member]);
#pragma unroll
  for (int distance = members / 2; distance > 0; distance /= 2)
#pragma unroll
    for (int member = 0; member < distance; ++member)
#pragma unroll
      for (int k = 0; k < width; ++k) sum[member].value[k] += sum[member + distance].value[k];
  return sum[0];
}

// A thread makes a pack of pixels; eight do where channels lie side by side.
template <typename A>
__global__ void __launch_bounds__(norm_threads)
    norms_kernel(const Normalised<A> x, const uint8_t* mask, A* mean, A* inverse) {
  constexpr int width = lanes<A>;
  const bool shared_out = x.x.channels_inside();
  const int64_t at = (blockIdx.x * int64_t{norm_threads} + threadIdx.x) / (shared_out ? members : 1);
  const int64_t packs = x.padded / width, image = at / packs, pixel = at % packs * width;
  // threads behind the last stay with their warp
  const int count = image < x.images ? pixels_in_pack<A>(pixel, x.pixels) : 0;
  const unsigned counts = count > 0 ? counted(mask == nullptr ? nullptr : mask + image * x.pixels, pixel, count) : 0;
  const auto value = [&](int64_t c) { return widen_raw<A>(x.x.planes.type, x.fetch(image, c, pixel, count)); };

  Pack<A, width> from{}, result{};
  if (x.kind == PixelRows::pearson) {
    // less the first channel before: a large mean takes no digits, and equal channels become exact zeros
    const Pack<A, width> start = value(0);
    from = over_channels<A>(x.channels, shared_out, [&](int64_t c, Pack<A, width>& sum) {
      const Pack<A, width> v = value(c);
#pragma unroll
      for (int k = 0; k < width; ++k) sum.value[k] += v.value[k] - start.value[k];
    });
#pragma unroll
    for (int k = 0; k < width; ++k) from.value[k] = start.value[k] + from.value[k] / static_cast<A>(x.channels);
  }
  if (x.kind != PixelRows::gram)
    result = over_channels<A>(x.channels, shared_out, [&](int64_t c, Pack<A, width>& sum) {
      const Pack<A, width> v = value(c);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const A centred = v.value[k] - from.value[k];
        sum.value[k] += centred * centred;
      }
    });
#pragma unroll
  for (int k = 0; k < width; ++k) {
    const A made = x.kind == PixelRows::gram ? A(1) / square_root(static_cast<A>(x.channels))
                                             : pixel_norm(result.value[k]).inverse;
    result.value[k] = counts >> k & 1 ? made : A(-1);
  }
  if (image >= x.images || (shared_out && lane_index() % members != 0)) return;
  store_pack(inverse + x.at(image, pixel), result);
  if (mean != nullptr) store_pack(mean + x.at(image, pixel), from);
}

template <typename A>
void ask_norms(Room& room, int64_t images, int64_t pixels, PixelRows kind, A*& mean, A*& inverse) {
  room.ask(inverse, images * padded_pixels(pixels));
  if (kind == PixelRows::pearson) room.ask(mean, images * padded_pixels(pixels));
}

template <typename A>
Normalised<A> find_norms(const Planes& planes, int64_t images, int64_t channels, int64_t pixels, const uint8_t* mask,
                         PixelRows kind, A* mean, A* inverse, cudaStream_t stream) {
  const Normalised<A> x{{planes, lanes<A>}, kind, images, channels, pixels, padded_pixels(pixels), mean, inverse};
  const int64_t threads = images * x.padded / lanes<A> * (x.x.channels_inside() ? members : 1);
  launch<norms_kernel<A>>({ceil_div(threads, norm_threads)}, norm_threads, 0,
                          stream, x, mask, mean, inverse);
  return x;
}

constexpr int store_threads = 256, store_span = 256;

template <typename A>
__global__ void __launch_bounds__(store_threads)
    store_through_norms_kernel(const Normalised<A> x, A* g, const PackedPlanes gradient) {
  const int64_t spans = ceil_div(x.pixels, store_span);
  const int64_t image = blockIdx.x / spans, first = blockIdx.x % spans * store_span;
  const int length = x.pixels - first < store_span ? static_cast<int>(x.pixels - first) : store_span;
  A* const mine = g + image * x.channels * x.padded + first;
  through_norms(x, image, first, length, mine, x.padded);
  __syncthreads();
  put_tile(gradient, image, 0, static_cast<int>(x.channels), first, length, mine, x.padded,
           [](int, int, Pack<A, lanes<A>>&) {});
}

template <typename A>
void store_through_norms(const Normalised<A>& x, A* g, const Planes& gradient, cudaStream_t stream) {
  const int64_t blocks = x.images * ceil_div(x.pixels, store_span);
  launch<store_through_norms_kernel<A>>({blocks}, store_threads, 0, stream, x, g,
                                        PackedPlanes(gradient, lanes<A>));
}

#define MEDKD_INSTANTIATE(A)                                                                                          \
  template void ask_norms<A>(Room&, int64_t, int64_t, PixelRows, A*&, A*&);                                           \
  template Normalised<A> find_norms<A>(const Planes&, int64_t, int64_t, int64_t, const uint8_t*, PixelRows, A*, A*,   \
                                       cudaStream_t);                                                                 \
  template void store_through_norms<A>(const Normalised<A>&, A*, const Planes&, cudaStream_t);
MEDKD_INSTANTIATE(float)
MEDKD_INSTANTIATE(double)

}  // namespace medkd
