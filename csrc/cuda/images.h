// How many pixels of an image count, what its value weighs in the loss, and the loss.
#pragma once

#include "tensor.h"

namespace medkd {

struct Images {
  const int64_t* valid;  // [B], or nullptr: all pixels count
  int64_t images, pixels;
  bool mean;  // reduction "mean"

  __device__ __forceinline__ int64_t pixels_of(int64_t image) const { return valid == nullptr ? pixels : valid[image]; }

  __device__ __forceinline__ double at_least_one(int64_t image) const {
    const int64_t count = pixels_of(image);
    return count > 0 ? static_cast<double>(count) : 1.0;
  }

  // What the value of an image that counts is multiplied by. To be called by all of a block's threads.
  __device__ __forceinline__ double weight(int64_t* scratch) const {
    if (!mean) return 1.0;
    int64_t counted = pixels > 0 ? images : 0;
    if (valid != nullptr) {
      counted = 0;
      for (int64_t image = threadIdx.x; image < images; image += blockDim.x) counted += valid[image] > 0 ? 1 : 0;
      counted = block_sum(counted, scratch);
      __syncthreads();
    }
    return counted > 0 ? 1.0 / static_cast<double>(counted) : 1.0;
  }
};

// valid[image] = the pixels of the mask [B, N] that are not 0.
void count_valid(const uint8_t* mask, int64_t images, int64_t pixels, int64_t* valid, cudaStream_t stream);

// loss = the values, or their sum, in the type of the arithmetic. A value is the sum of `terms` neighbours.
void reduce_values(const double* values, int64_t count, int64_t terms, const std::string& reduction, const Tensor& loss,
                   cudaStream_t stream);

}  // namespace medkd
