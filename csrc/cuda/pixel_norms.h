// Pixels as pixel_relation and pixel_affinity multiply them: unit vectors over the channels. What a pixel is divided by is
// found once, in a pass of its own; the kernels divide as they load.
#pragma once

#include "../math/pixel_relation.h"
#include "pixels.h"
#include "room.h"

namespace medkd {

constexpr int64_t padded_to = 64;
inline int64_t padded_pixels(int64_t pixels) { return ceil_div(pixels, padded_to) * padded_to; }

inline PixelRows pixel_rows_of(const std::string& relation) {
  return relation == "gram" ? PixelRows::gram : relation == "pearson" ? PixelRows::pearson : PixelRows::cosine;
}

// One network's pixels.
template <typename A>
struct Normalised {
  PackedPlanes x;
  PixelRows kind;
  int64_t images, channels, pixels, padded;
  const A* mean;     // [B, padded] over the channels, for pearson; else nullptr
  const A* inverse;  // [B, padded]: PixelNorm::inverse; -1 at pixels that do not count and behind the last

  __device__ __forceinline__ int64_t at(int64_t image, int64_t pixel) const { return image * padded + pixel; }

  // Whether the gradient along a pixel's own direction vanishes.
  __device__ __forceinline__ bool turns(A inverse) const { return kind != PixelRows::gram && inverse < A(1) / A(1e-12); }

  __device__ __forceinline__ Raw fetch(int64_t image, int64_t channel, int64_t pixel, int count) const {
    return medkd::fetch<A>(x, image, channel, pixel, channel < channels ? count : 0);
  }

  // 0 where the channel or the pixel is not there or does not count, whatever the features hold.
  __device__ __forceinline__ Pack<A, lanes<A>> made(int64_t image, int64_t channel, int64_t pixel, int count,
                                                    const Raw& raw) const {
    Pack<A, lanes<A>> values = widen_raw<A>(x.planes.type, raw);
    if (count <= 0 || channel >= channels) return Pack<A, lanes<A>>{};
    const Pack<A, lanes<A>> factor = load_pack<lanes<A>>(inverse + at(image, pixel));
    Pack<A, lanes<A>> from{};
    if (mean != nullptr) from = load_pack<lanes<A>>(mean + at(image, pixel));
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) {
      const A made = rounded_product(values.value[k] - from.value[k], factor.value[k]);
      values.value[k] = factor.value[k] < A(0) ? A(0) : made;
    }
    return values;
  }

  __device__ __forceinline__ Pack<A, lanes<A>> load(int64_t image, int64_t channel, int64_t pixel, int count) const {
    return made(image, channel, pixel, count, fetch(image, channel, pixel, count));
  }
};

// Asks the room for what find_norms writes.
template <typename A>
void ask_norms(Room& room, int64_t images, int64_t pixels, PixelRows kind, A*& mean, A*& inverse);

// mask: [B, N] or nullptr.
template <typename A>
Normalised<A> find_norms(const Planes& x, int64_t images, int64_t channels, int64_t pixels, const uint8_t* mask,
                         PixelRows kind, A* mean, A* inverse, cudaStream_t stream);

// g[channel * stride + column], the gradient for the normalised pixels from `first` on, becomes the one for the features.
// To be called by all of a block's threads, whole warps; length: of the columns, a multiple of `lanes` is there.
//
// Eight threads of a warp lie along the pixels, four share out the channels.
template <typename A>
__device__ __forceinline__ void through_norms(const Normalised<A>& x, int64_t image, int64_t first, int length, A* g,
                                              int64_t stride) {
  constexpr int width = lanes<A>, parts = 4, along_pixels = warp_size / parts;
  const int part = lane_index() / along_pixels, span = along_pixels * width;
  const auto over_parts = [&](Pack<A, width>& values) {
#pragma unroll
    for (int k = 0; k < width; ++k) {
      values.value[k] += __shfl_xor_sync(all_lanes, values.value[k], along_pixels);
      values.value[k] += __shfl_xor_sync(all_lanes, values.value[k], 2 * along_pixels);
    }
  };
  for (int start = warp_index() * span; start < length; start += static_cast<int>(blockDim.x) / warp_size * span) {
    const int column = start + lane_index() % along_pixels * width;
    const int64_t pixel = first + column;
    const int count = column < length ? pixels_in_pack<A>(pixel, x.pixels) : 0;
    Pack<A, width> along{}, sum{}, inverse{};
    if (count > 0) {
      inverse = load_pack<width>(x.inverse + x.at(image, pixel));
      for (int64_t c = part; c < x.channels; c += parts) {
        const Pack<A, width> s = x.load(image, c, pixel, count), v = load_pack<width>(g + c * stride + column);
#pragma unroll
        for (int k = 0; k < width; ++k) along.value[k] += s.value[k] * v.value[k];
      }
    }
    over_parts(along);
#pragma unroll
    for (int k = 0; k < width; ++k) along.value[k] = x.turns(inverse.value[k]) ? along.value[k] : A(0);
    if (count > 0)
      for (int64_t c = part; c < x.channels; c += parts) {
        const Pack<A, width> s = x.load(image, c, pixel, count);
        Pack<A, width> v = load_pack<width>(g + c * stride + column);
#pragma unroll
        for (int k = 0; k < width; ++k) {
          // pixels that do not count get no gradient
          const A through = (v.value[k] - s.value[k] * along.value[k]) * inverse.value[k];
          v.value[k] = inverse.value[k] < A(0) ? A(0) : through;
          sum.value[k] += v.value[k];
        }
        store_pack(g + c * stride + column, v);
      }
    if (x.kind != PixelRows::pearson) continue;
    over_parts(sum);
    if (count > 0)
      for (int64_t c = part; c < x.channels; c += parts) {
        Pack<A, width> v = load_pack<width>(g + c * stride + column);
#pragma unroll
        for (int k = 0; k < width; ++k) v.value[k] -= sum.value[k] / static_cast<A>(x.channels);
        store_pack(g + c * stride + column, v);
      }
  }
}

// gradient = what through_norms makes of g [B, channels, padded], which is used up.
template <typename A>
void store_through_norms(const Normalised<A>& x, A* g, const Planes& gradient, cudaStream_t stream);

}  // namespace medkd
