#include <algorithm>

#include "tensor.h"

namespace medkd {

struct Scalar {
  const void* data;
  bool twice;

  explicit Scalar(const Tensor& x) : data(x.data_ptr()), twice(type_of(x) == Type::float64) {}
  __device__ double get() const {
    return twice ? *static_cast<const double*>(data) : static_cast<double>(*static_cast<const float*>(data));
  }
};

// 16 bytes a thread; the few elements before the first aligned address and behind the last pack are the first block's.
template <typename T, typename A>
__global__ void scale_kernel(T* values, int64_t count, int64_t head, Scalar upstream, Scalar scale) {
  constexpr int width = pack_of<T>;
  const A factor = static_cast<A>(upstream.get() * scale.get());
  if (factor == A(1)) return;
  const int64_t packs = (count - head) / width;
  const int64_t first = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  for (int64_t i = first; i < packs; i += int64_t{gridDim.x} * blockDim.x) {
    T* at = values + head + i * width;
    Pack<T, width> pack = load_pack<width>(at);
#pragma unroll
    for (int k = 0; k < width; ++k) narrow(static_cast<A>(widen(pack.value[k])) * factor, pack.value[k]);
    store_pack(at, pack);
  }
  const int64_t rest = head + (count - head) % width;
  if (first < rest) {
    T* at = values + (first < head ? first : count - rest + first);
    narrow(static_cast<A>(widen(*at)) * factor, *at);
  }
}

template <typename T, typename A>
static void scale_in_place(const Tensor& gradient, const Tensor& upstream, const Tensor& scale, cudaStream_t stream) {
  constexpr int threads = 256;
  T* values = static_cast<T*>(gradient.data_ptr());
  const int64_t count = gradient.numel(), past = reinterpret_cast<uintptr_t>(values) % 16 / sizeof(T);
  const int64_t head = past == 0 ? 0 : std::min<int64_t>(pack_of<T> - past, count);
  const int64_t blocks = std::min<int64_t>(count / pack_of<T> / threads + 1, 1 << 20);
  launch<scale_kernel<T, A>>({blocks}, threads, 0, stream, values, count, head,
                             Scalar(upstream), Scalar(scale));
}

static void scale_gradient(Tensor gradient,          // dense, any layout
                           const Tensor& upstream,   // [], gradient that arrives for the loss
                           const Tensor& scale) {    // []
  const OnDevice device(gradient);
  switch (type_of(gradient)) {
    case Type::float64: return scale_in_place<double, double>(gradient, upstream, scale, device.stream());
    case Type::bfloat16: return scale_in_place<BFloat16, float>(gradient, upstream, scale, device.stream());
    case Type::float16: return scale_in_place<Float16, float>(gradient, upstream, scale, device.stream());
    default: return scale_in_place<float, float>(gradient, upstream, scale, device.stream());
  }
}

}  // namespace medkd

MEDKD_IMPLEMENTS { m.impl("scale_gradient_cuda", TORCH_BOX(&medkd::scale_gradient)); }
