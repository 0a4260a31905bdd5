// Packs of neighbouring pixels of one channel, from and to tensors of any type and layout.
#pragma once

#include "tensor.h"
#include "tiles.h"

namespace medkd {

// 16 bytes or less as they lie in memory: loaded long before they are looked at.
struct alignas(16) Raw {
  uint32_t word[4];
};

// A tensor's planes, and whether every pack of `lanes` pixels in them that starts at a multiple of `lanes` is aligned.
struct PackedPlanes {
  Planes planes;
  bool packed;

  PackedPlanes() = default;
  __host__ __device__ PackedPlanes(const Planes& x, int64_t width)
      : planes(x), packed(x.stride_n == 1 && x.stride_b % width == 0 && x.stride_c % width == 0 &&
                          reinterpret_cast<uintptr_t>(x.data) % (width * element_bytes(x.type)) == 0) {}

  // Neighbouring threads take neighbouring channels, or else neighbouring pixels.
  __host__ __device__ bool channels_inside() const { return planes.stride_c == 1 && planes.stride_n != 1; }

  __host__ __device__ static int64_t element_bytes(Type type) { return type == Type::float64 ? 8 : type == Type::float32 ? 4 : 2; }
};

template <typename T, int count>
__device__ __forceinline__ Raw as_raw(const Pack<T, count>& pack) {
  Raw raw{};
  memcpy(&raw, &pack, sizeof pack);
  return raw;
}

template <typename T, typename A>
__device__ __forceinline__ Raw fetch_as(const PackedPlanes& x, int64_t at, int count) {
  const T* from = static_cast<const T*>(x.planes.data) + at;
  if constexpr (sizeof(T) <= sizeof(A)) {  // the arithmetic is never narrower than what it is made with
    Pack<T, lanes<A>> pack{};
    if (x.packed && count == lanes<A>) {
      pack = load_pack<lanes<A>>(from);
    } else {
#pragma unroll
      for (int k = 0; k < lanes<A>; ++k)
        if (k < count) pack.value[k] = from[k * x.planes.stride_n];
    }
    return as_raw(pack);
  } else {
    return Raw{};
  }
}

// `count` pixels (zeros behind them) from `pixel`, a multiple of `lanes`.
template <typename A>
__device__ __forceinline__ Raw fetch(const PackedPlanes& x, int64_t image, int64_t channel, int64_t pixel, int count) {
  if (count <= 0) return Raw{};
  const int64_t at = image * x.planes.stride_b + channel * x.planes.stride_c + pixel * x.planes.stride_n;
  switch (x.planes.type) {
    case Type::float64: return fetch_as<double, A>(x, at, count);
    case Type::bfloat16: return fetch_as<BFloat16, A>(x, at, count);
    case Type::float16: return fetch_as<Float16, A>(x, at, count);
    default: return fetch_as<float, A>(x, at, count);
  }
}

template <typename T, typename A>
__device__ __forceinline__ Pack<A, lanes<A>> widen_as(const Raw& raw) {
  Pack<T, lanes<A>> pack{};
  Pack<A, lanes<A>> out{};
  if constexpr (sizeof(T) <= sizeof(A)) {
    memcpy(&pack, &raw, sizeof pack);
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) out.value[k] = static_cast<A>(widen(pack.value[k]));
  }
  return out;
}

template <typename A>
__device__ __forceinline__ Pack<A, lanes<A>> widen_raw(Type type, const Raw& raw) {
  switch (type) {
    case Type::float64: return widen_as<double, A>(raw);
    case Type::bfloat16: return widen_as<BFloat16, A>(raw);
    case Type::float16: return widen_as<Float16, A>(raw);
    default: return widen_as<float, A>(raw);
  }
}

template <typename T, typename A>
__device__ __forceinline__ void put_as(const PackedPlanes& x, int64_t at, int count, const Pack<A, lanes<A>>& values) {
  T* to = static_cast<T*>(x.planes.data) + at;
  Pack<T, lanes<A>> pack;
#pragma unroll
  for (int k = 0; k < lanes<A>; ++k) narrow(values.value[k], pack.value[k]);
  if (sizeof pack <= 16 && x.packed && count == lanes<A>) {
    store_whole(to, pack);
  } else {
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k)
      if (k < count) to[k * x.planes.stride_n] = pack.value[k];
  }
}

template <typename A>
__device__ __forceinline__ void put(const PackedPlanes& x, int64_t image, int64_t channel, int64_t pixel, int count,
                                    const Pack<A, lanes<A>>& values) {
  const int64_t at = image * x.planes.stride_b + channel * x.planes.stride_c + pixel * x.planes.stride_n;
  switch (x.planes.type) {
    case Type::float64: return put_as<double, A>(x, at, count, values);
    case Type::bfloat16: return put_as<BFloat16, A>(x, at, count, values);
    case Type::float16: return put_as<Float16, A>(x, at, count, values);
    default: return put_as<float, A>(x, at, count, values);
  }
}

// The pixels of a pack that count: bit k for pixel k. mask: [N] of the image, or nullptr.
__device__ __forceinline__ unsigned counted(const uint8_t* mask, int64_t pixel, int count) {
  unsigned bits = (1u << (count < 0 ? 0 : count)) - 1;
  if (mask == nullptr) return bits;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    if (k < count && mask[pixel + k] == 0) bits &= ~(1u << k);
  return bits;
}

template <typename A>
__device__ __forceinline__ int pixels_in_pack(int64_t pixel, int64_t end) {
  return end - pixel >= lanes<A> ? lanes<A> : end > pixel ? static_cast<int>(end - pixel) : 0;
}

// A thread's way through pairs (row, pack) of a block's tile, `step` at a time, without divisions on the way.
struct Walk {
  int rows, packs;
  bool rows_inside;  // neighbouring threads take neighbouring rows
  int inner, outer, extent, inner_step, outer_step;

  __device__ __forceinline__ Walk(int rows, int packs, bool rows_inside, int first, int step)
      : rows(rows), packs(packs), rows_inside(rows_inside), extent(rows_inside ? rows : packs) {
    inner = first % extent;
    outer = first / extent;
    inner_step = step % extent;
    outer_step = step / extent;
  }

  __device__ __forceinline__ void next() {
    inner += inner_step;
    outer += outer_step;
    if (inner >= extent) {
      inner -= extent;
      ++outer;
    }
  }

  __device__ __forceinline__ int row() const { return rows_inside ? inner : outer; }
  __device__ __forceinline__ int pack() const { return rows_inside ? outer : inner; }
  __device__ __forceinline__ bool inside() const { return outer < (rows_inside ? packs : rows); }
};

}  // namespace medkd
