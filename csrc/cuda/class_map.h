// Labels, and what class_sums.cu makes of them for others.
#pragma once

#include "../math/elementary.h"
#include "tensor.h"

namespace medkd {

constexpr int nothing = -1, no_class = -2;  // pixels that do not count, and labels that are none

struct Labels {
  const void* target;  // [B, N]
  Type target_type;
  int64_t ignore_index, classes;

  __device__ __forceinline__ int64_t label_at(int64_t i) const {
    switch (target_type) {
      case Type::int64: return static_cast<const int64_t*>(target)[i];
      case Type::int32: return static_cast<const int32_t*>(target)[i];
      case Type::int16: return static_cast<const int16_t*>(target)[i];
      case Type::int8: return static_cast<const int8_t*>(target)[i];
      default: return static_cast<const uint8_t*>(target)[i];
    }
  }

  // Of pixel i, counted over the images: its class, `nothing`, or `no_class`.
  __device__ __forceinline__ int class_of(int64_t i) const {
    const int64_t label = label_at(i);
    if (label == ignore_index) return nothing;
    return label >= 0 && label < classes ? static_cast<int>(label) : no_class;
  }
};

inline Labels labels_of(const Tensor& target, int64_t classes, int64_t ignore_index) {
  return {target.data_ptr(), type_of(target), ignore_index, classes};
}

// What a pixel's label means for where its class's vectors are: one that is none counts as class 0.
__device__ __forceinline__ int64_t row_of(int label) { return label == no_class ? 0 : label; }

template <typename A>
__device__ __forceinline__ A not_a_number() {
  return infinity<A>() - infinity<A>();
}

// shares [B, K, C] = what arrives for a mean, times `factor` if there is one, over the number of its pixels.
template <typename A>
void share_out(const A* upstream, const A* factor, const int64_t* counts, int64_t rows, int64_t channels, A* shares,
               cudaStream_t stream);

}  // namespace medkd
