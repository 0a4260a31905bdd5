// What every kernel's arguments are made of: plain data, no tensors.
#pragma once

#include <cstdint>

namespace medkd {

enum class Type : int32_t { float64, float32, bfloat16, float16, int64, int32, int16, int8, uint8, boolean };

// A tensor [B, C, N] in any layout whose pixels lie at one stride: contiguous and channels_last among them.
struct Planes {
  void* data;
  Type type;
  int64_t stride_b, stride_c, stride_n;
};

// What pixel_relation makes of a pixel's channels before it multiplies pixels: a unit vector, a unit vector of the
// centred channels, or the channels over the root of their number.
enum class PixelRows : int32_t { cosine, pearson, gram };

// What the channel relations make of the features before they multiply them: nothing; minus a shift; the exponentials
// of that over a temperature. The latter two have a row of ones more.
enum class Features : int32_t { plain, centred, exponential };

}  // namespace medkd
