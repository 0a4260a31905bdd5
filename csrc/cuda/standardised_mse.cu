// standardised_mse: five sums of every channel over all pixels in one pass, the terms that they give, and the gradient in
// another pass. Derivation: medkd_fast/reference/standardised_mse.py.
//
// Where a channel's pixels lie side by side a block takes tiles of one channel, 16 bytes a thread and load. Where channels lie
// side by side neighbouring threads take neighbouring channels. Either way a thread's five sums stay in registers, in double,
// from the first tile to the last; then the block's are added up, and put into its slot.
#include "../math/standardised_mse.h"

#include <algorithm>
#include <type_traits>

#include "images.h"
#include "pixels.h"
#include "planes.h"
#include "room.h"

namespace medkd {

constexpr int moment_threads = 256, moment_packs = 4, moments = 5;
// Where channels lie side by side: pixels that a thread loads at once, and has in a tile.
template <typename A>
constexpr int moment_batch = 2 * lanes<A>;
constexpr int moment_batches = 2;
// Blocks that are enough to fill a GPU; and the most tiles of a block, lest a thread's sums blur a constant channel.
constexpr int64_t enough_blocks = 4096, most_tiles = 16;

struct MomentCall {
  PackedPlanes student, teacher;
  const uint8_t* mask;  // [B, N] or nullptr
  int64_t images, channels, pixels;
  int threads;             // of a block
  int width;               // neighbouring threads with channels of their own: a power of two; 0: a block has one channel
  int64_t groups;          // blocks side by side for all channels
  int64_t tile;            // pixels of an image that a block takes at once
  int64_t tiles_of_image;
  int64_t tiles_of_block;  // in the first pass
  int64_t slots;

  int64_t tiles() const { return images * tiles_of_image; }
  Blocks grid(int64_t blocks) const { return {blocks * groups}; }
};

// A block's tile, or, where channels lie side by side, a thread's part of it. Tiles are counted over all images.
struct MomentTile {
  int64_t image, channel, first, end;
  int member, step;  // of those who share a channel's pixels, where channels lie side by side

  __device__ __forceinline__ MomentTile(const MomentCall& call, int64_t index) {
    const int thread = static_cast<int>(threadIdx.x);
    image = index / call.tiles_of_image;
    first = (index - image * call.tiles_of_image) * call.tile;
    end = call.pixels - first < call.tile ? call.pixels : first + call.tile;
    channel = call.width == 0 ? blockIdx.x % call.groups : blockIdx.x % call.groups * call.width + thread % call.width;
    member = call.width == 0 ? thread : thread / call.width;
    step = call.width == 0 ? call.threads : call.threads / call.width;
  }
};

// A thread's pixels of both networks, and which of them count.
template <typename A>
struct MomentPacks {
  Raw s[moment_packs], t[moment_packs];

  __device__ __forceinline__ static int64_t pixel_of(const MomentTile& tile, int pack) {
    return tile.first + (pack * int64_t{tile.step} + tile.member) * lanes<A>;
  }

  __device__ __forceinline__ MomentPacks(const MomentCall& call, const MomentTile& tile) {
#pragma unroll
    for (int pack = 0; pack < moment_packs; ++pack) {
      const int64_t pixel = pixel_of(tile, pack);
      const int count = pixels_in_pack<A>(pixel, tile.end);
      s[pack] = fetch<A>(call.student, tile.image, tile.channel, pixel, count);
      t[pack] = fetch<A>(call.teacher, tile.image, tile.channel, pixel, count);
    }
  }

  // visit(pack, first pixel, pixels inside, bits of those that count, s, t)
  template <typename Visit>
  __device__ __forceinline__ void over_packs(const MomentCall& call, const MomentTile& tile, const Visit& visit) const {
#pragma unroll
    for (int pack = 0; pack < moment_packs; ++pack) {
      const int64_t pixel = pixel_of(tile, pack);
      const int count = pixels_in_pack<A>(pixel, tile.end);
      const uint8_t* const mask = call.mask == nullptr ? nullptr : call.mask + tile.image * call.pixels;
      visit(pixel, count, counted(mask, pixel, count), widen_raw<A>(call.student.planes.type, s[pack]),
            widen_raw<A>(call.teacher.planes.type, t[pack]));
    }
  }
};

// The same where channels lie side by side: pixels from, from + step, ... of a thread's channel.
template <typename A>
struct MomentPixels {
  using Bits = std::conditional_t<sizeof(A) == sizeof(double), uint64_t, uint32_t>;  // an element as it lies in memory

  unsigned counts = 0;
  A s[moment_batch<A>], t[moment_batch<A>];

  __device__ __forceinline__ MomentPixels(const MomentCall& call, const MomentTile& tile, int64_t from) {
#pragma unroll
    for (int k = 0; k < moment_batch<A>; ++k) {
      const int64_t pixel = from + k * tile.step;
      const bool inside = tile.channel < call.channels && pixel < tile.end;
      if (inside && (call.mask == nullptr || call.mask[tile.image * call.pixels + pixel] != 0)) counts |= 1u << k;
    }
    // both networks' are on their way before the first is waited for
    Bits raw_s[moment_batch<A>], raw_t[moment_batch<A>];
    fetch_bits(call.student.planes, tile, from, raw_s);
    fetch_bits(call.teacher.planes, tile, from, raw_t);
    widen_bits(call.student.planes.type, raw_s, s);
    widen_bits(call.teacher.planes.type, raw_t, t);
  }

  __device__ __forceinline__ void fetch_bits(const Planes& x, const MomentTile& tile, int64_t from,
                                             Bits (&raw)[moment_batch<A>]) const {
    const int64_t offset = offset_of(x, tile.image, from) + tile.channel * x.stride_c;
    with_type<A>(x.type, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (sizeof(T) <= sizeof(A)) {  // the arithmetic is never narrower than what it is made with
        const T* const at = static_cast<const T*>(x.data) + offset;
#pragma unroll
        for (int k = 0; k < moment_batch<A>; ++k) {
          T value{};
          if (counts >> k & 1) value = at[k * tile.step * x.stride_n];
          Bits bits = 0;
          memcpy(&bits, &value, sizeof value);
          raw[k] = bits;
        }
      }
    });
  }

  __device__ __forceinline__ static void widen_bits(Type type, const Bits (&raw)[moment_batch<A>],
                                                    A (&out)[moment_batch<A>]) {
    with_type<A>(type, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (sizeof(T) <= sizeof(A)) {
#pragma unroll
        for (int k = 0; k < moment_batch<A>; ++k) {
          T value;
          memcpy(&value, &raw[k], sizeof value);
          out[k] = static_cast<A>(widen(value));
        }
      }
    });
  }
};

struct ThreadMoments {
  double sum[moments] = {};

  template <typename A>
  __device__ __forceinline__ void add(bool counts, A s, A t) {
    const double x = counts ? static_cast<double>(s) : 0.0, y = counts ? static_cast<double>(t) : 0.0;
    sum[0] += x;
    sum[1] += y;
    sum[2] += x * x;
    sum[3] += y * y;
    sum[4] += x * y;
  }
};

// A block's tiles of the first pass; its slots are every slots-th of [5, C, slots].
struct MomentRange {
  int64_t slot, begin, end;

  __device__ __forceinline__ explicit MomentRange(const MomentCall& call)
      : slot(blockIdx.x / call.groups), begin(slot * call.tiles_of_block) {
    const int64_t tiles = call.images * call.tiles_of_image;
    end = tiles - begin < call.tiles_of_block ? tiles : begin + call.tiles_of_block;
  }
};

template <typename A>
__global__ void __launch_bounds__(moment_threads) moments_of_rows_kernel(const MomentCall call,
                                                                         double* slots) {  // [5, C, slots]
  const int warps = static_cast<int>(blockDim.x) / warp_size;
  double* const scratch = shared_memory<double>();  // [5, warps]
  const MomentRange range(call);
  ThreadMoments own;
  for (int64_t index = range.begin; index < range.end; ++index) {
    const MomentTile tile(call, index);
    const MomentPacks<A> packs(call, tile);
    packs.over_packs(call, tile, [&](int64_t, int, unsigned counts, const auto& s, const auto& t) {
#pragma unroll
      for (int k = 0; k < lanes<A>; ++k) own.add(counts >> k & 1, s.value[k], t.value[k]);
    });
  }
  const int64_t channel = blockIdx.x % call.groups;
#pragma unroll
  for (int k = 0; k < moments; ++k) {
    const double sum = block_sum(own.sum[k], scratch + k * warps);
    if (threadIdx.x == 0) slots[(k * call.channels + channel) * call.slots + range.slot] = sum;
  }
}

template <typename A>
__global__ void __launch_bounds__(moment_threads) moments_of_channels_kernel(const MomentCall call,
                                                                             double* slots) {  // [5, C, slots]
  double* const shared = shared_memory<double>();  // [5, threads]
  const int thread = static_cast<int>(threadIdx.x);
  const MomentRange range(call);
  ThreadMoments own;
  for (int64_t index = range.begin; index < range.end; ++index) {
    const MomentTile tile(call, index);
    for (int64_t n = tile.first + tile.member; n < tile.end; n += moment_batch<A> * tile.step) {
      const MomentPixels<A> pixels(call, tile, n);
#pragma unroll
      for (int k = 0; k < moment_batch<A>; ++k) own.add(pixels.counts >> k & 1, pixels.s[k], pixels.t[k]);
    }
  }
#pragma unroll
  for (int k = 0; k < moments; ++k) shared[k * moment_threads + thread] = own.sum[k];
  for (int half = moment_threads / 2; half >= call.width; half /= 2) {
    __syncthreads();
    if (thread < half)
#pragma unroll
      for (int k = 0; k < moments; ++k) shared[k * moment_threads + thread] += shared[k * moment_threads + thread + half];
  }
  const int64_t channel = blockIdx.x % call.groups * call.width + thread;
  if (thread < call.width && channel < call.channels)
#pragma unroll
    for (int k = 0; k < moments; ++k)
      slots[(k * call.channels + channel) * call.slots + range.slot] = shared[k * moment_threads + thread];
}

// A warp a sum; the first also adds up the pixels. valid: [B], or nullptr: all pixels count.
__global__ void __launch_bounds__(moment_threads)
    add_moment_slots_kernel(const double* slots, int64_t count, int64_t size, const int64_t* valid, int64_t images,
                            int64_t pixels, double* sums) {  // [1 + 5C]
  const int64_t k = blockIdx.x * int64_t{moment_threads / warp_size} + warp_index();
  if (k == 0) {
    double number = 0;
    for (int64_t image = lane_index(); image < images; image += warp_size)
      number += static_cast<double>(valid == nullptr ? pixels : valid[image]);
    number = warp_sum(number);
    if (lane_index() == 0) sums[0] = number;
  }
  if (k >= size) return;
  double sum = 0;
#pragma unroll 4
  for (int64_t slot = lane_index(); slot < count; slot += warp_size) sum += slots[k * count + slot];
  sum = warp_sum(sum);
  if (lane_index() == 0) sums[1 + k] = sum;
}

template <typename A>
__global__ void __launch_bounds__(moment_threads)
    standardised_terms_kernel(const double* sums, int64_t channels, A* loss,
                              double* coefficients) {  // [4, C]
  const double number = sums[0] > 1 ? sums[0] : 1.0, share = 1 / (number * static_cast<double>(channels));
  double value = 0;
  for (int64_t c = threadIdx.x; c < channels; c += moment_threads) {
    const double* const of = sums + 1 + c;
    const StandardisedChannel k =
        standardised_channel(number, of[0], of[channels], of[2 * channels], of[3 * channels], of[4 * channels]);
    value += k.value;
    coefficients[c] = share * k.of_s;
    coefficients[channels + c] = share * k.of_t;
    coefficients[2 * channels + c] = k.mean_s;
    coefficients[3 * channels + c] = k.mean_t;
  }
  value = block_sum(value, shared_memory<double>());
  if (threadIdx.x == 0) *loss = static_cast<A>(share * value);
}

template <typename A>
__device__ __forceinline__ StandardisedGradient gradient_of_channel(const MomentCall& call, const MomentTile& tile,
                                                                    const double* coefficients, const A* upstream) {
  const double* const of = coefficients + tile.channel;
  return standardised_gradient_of(of[0], of[call.channels], of[2 * call.channels], of[3 * call.channels],
                                  static_cast<double>(*upstream));
}

template <typename A>
__device__ __forceinline__ A gradient_at(const StandardisedGradient& of, bool counts, A s, A t) {
  return counts ? static_cast<A>(of.at(static_cast<double>(s), static_cast<double>(t))) : A(0);
}

template <typename A>
__global__ void __launch_bounds__(moment_threads)
    standardised_gradient_of_rows_kernel(const MomentCall call, const double* coefficients, const A* upstream,
                                         const PackedPlanes gradient) {
  const MomentTile tile(call, blockIdx.x / call.groups);
  const MomentPacks<A> packs(call, tile);
  const StandardisedGradient of = gradient_of_channel(call, tile, coefficients, upstream);
  packs.over_packs(call, tile, [&](int64_t pixel, int count, unsigned counts, const auto& s, const auto& t) {
    Pack<A, lanes<A>> out;
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) out.value[k] = gradient_at(of, counts >> k & 1, s.value[k], t.value[k]);
    if (count > 0) put<A>(gradient, tile.image, tile.channel, pixel, count, out);
  });
}

template <typename A>
__global__ void __launch_bounds__(moment_threads)
    standardised_gradient_of_channels_kernel(const MomentCall call, const double* coefficients, const A* upstream,
                                             const Planes gradient) {
  const MomentTile tile(call, blockIdx.x / call.groups);
  if (tile.channel >= call.channels) return;
  const StandardisedGradient of = gradient_of_channel(call, tile, coefficients, upstream);
  for (int64_t n = tile.first + tile.member; n < tile.end; n += moment_batch<A> * tile.step) {
    const MomentPixels<A> pixels(call, tile, n);
    const int64_t offset = offset_of(gradient, tile.image, n) + tile.channel * gradient.stride_c;
    with_type<A>(gradient.type, [&](auto zero) {
      auto* const to = static_cast<decltype(zero)*>(gradient.data) + offset;
#pragma unroll
      for (int k = 0; k < moment_batch<A>; ++k)
        if (n + k * tile.step < tile.end)
          narrow(gradient_at(of, pixels.counts >> k & 1, pixels.s[k], pixels.t[k]), to[k * tile.step * gradient.stride_n]);
    });
  }
}

template <typename A>
static MomentCall moment_call(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                              std::vector<Tensor>& holder) {
  MomentCall call{};
  call.student = PackedPlanes(planes_of(student, holder), lanes<A>);
  call.teacher = PackedPlanes(planes_of(teacher, holder), lanes<A>);
  call.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.images = student.size(0);
  call.channels = student.size(1);
  call.pixels = pixels_of(student);
  if (call.student.channels_inside()) {
    call.threads = moment_threads;
    for (call.width = 1; call.width < warp_size && call.width < call.channels;) call.width *= 2;
    call.groups = ceil_div(call.channels, call.width);
    call.tile = int64_t{moment_threads / call.width} * moment_batches * moment_batch<A>;
  } else {
    constexpr int64_t own = moment_packs * lanes<A>;
    call.threads = static_cast<int>(std::clamp<int64_t>(ceil_div(call.pixels, own * warp_size), 1,
                                                        moment_threads / warp_size)) * warp_size;
    call.groups = call.channels;
    call.tile = call.threads * own;
  }
  call.tiles_of_image = ceil_div(call.pixels, call.tile);
  call.tiles_of_block = std::clamp<int64_t>(ceil_div(call.tiles() * call.groups, enough_blocks), 1, most_tiles);
  call.slots = ceil_div(call.tiles(), call.tiles_of_block);
  return call;
}

template <typename A>
static Tensor moments_of(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                         cudaStream_t stream) {
  std::vector<Tensor> holder;
  holder.reserve(2);
  const MomentCall call = moment_call<A>(student, teacher, mask, holder);
  const int64_t size = moments * call.channels;
  Tensor sums = new_like(student, {1 + size}, ScalarType::Double);
  Room room;
  double* slots = nullptr;
  int64_t* valid = nullptr;
  room.ask(slots, size * call.slots);
  if (call.mask != nullptr) room.ask(valid, call.images);
  room.take(student);
  if (valid != nullptr) count_valid(call.mask, call.images, call.pixels, valid, stream);
  if (call.width == 0)
    launch<moments_of_rows_kernel<A>>(call.grid(call.slots), call.threads,
                                      moments * (call.threads / warp_size) * sizeof(double), stream, call, slots);
  else
    launch<moments_of_channels_kernel<A>>(call.grid(call.slots), call.threads, moments * moment_threads * sizeof(double),
                                          stream, call, slots);
  launch<add_moment_slots_kernel>({ceil_div(size, moment_threads / warp_size)}, moment_threads,
                                  0, stream, slots, call.slots, size, valid, call.images, call.pixels,
                                  static_cast<double*>(sums.data_ptr()));
  return sums;
}

static Tensor standardised_mse(
    const Tensor& student,                // [B, C, *S]
    const Tensor& teacher,                // [B, C, *S]
    const std::optional<Tensor>& mask) {  // [B, *S], boolean, contiguous
  const OnDevice device(student);
  return arithmetic_type(student, teacher) == ScalarType::Double
             ? moments_of<double>(student, teacher, mask, device.stream())
             : moments_of<float>(student, teacher, mask, device.stream());
}

template <typename A>
static std::tuple<Tensor, Tensor> terms_of(const Tensor& sums, ScalarType type, cudaStream_t stream) {
  const int64_t channels = (sums.numel() - 1) / moments;
  Tensor loss = new_like(sums, {}, type), coefficients = new_like(sums, {4 * channels}, ScalarType::Double);
  launch<standardised_terms_kernel<A>>({1}, moment_threads, moment_threads / warp_size * sizeof(double), stream,
                                       static_cast<const double*>(sums.data_ptr()), channels,
                                       static_cast<A*>(loss.data_ptr()), static_cast<double*>(coefficients.data_ptr()));
  return {loss, coefficients};
}

static std::tuple<Tensor, Tensor> standardised_mse_terms(
    const Tensor& sums,  // [1 + 5C], double, contiguous
    bool single) {
  const OnDevice device(sums);
  return single ? terms_of<float>(sums, ScalarType::Float, device.stream())
                : terms_of<double>(sums, ScalarType::Double, device.stream());
}

template <typename A>
static Tensor backward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                       const Tensor& coefficients, const Tensor& upstream, cudaStream_t stream) {
  std::vector<Tensor> holder;
  holder.reserve(3);
  const MomentCall call = moment_call<A>(student, teacher, mask, holder);
  const Gradient gradient(student);
  const Planes written = planes_of(gradient.written, holder);
  const double* const of = static_cast<const double*>(coefficients.data_ptr());
  const A* const factor = static_cast<const A*>(upstream.data_ptr());
  if (call.width == 0)
    launch<standardised_gradient_of_rows_kernel<A>>(call.grid(call.tiles()), call.threads, 0, stream, call, of, factor,
                                                    PackedPlanes(written, lanes<A>));
  else
    launch<standardised_gradient_of_channels_kernel<A>>(call.grid(call.tiles()), call.threads, 0, stream, call, of, factor,
                                                        written);
  return gradient.finish();
}

static Tensor standardised_mse_backward(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& coefficients,         // [4C], double, contiguous, as standardised_mse_terms gives them
    const Tensor& upstream) {           // [], in the type of the arithmetic
  const OnDevice device(student);
  return arithmetic_type(student, teacher) == ScalarType::Double
             ? backward<double>(student, teacher, mask, coefficients, upstream, device.stream())
             : backward<float>(student, teacher, mask, coefficients, upstream, device.stream());
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("standardised_mse_cuda", TORCH_BOX(&medkd::standardised_mse));
  m.impl("standardised_mse_terms_cuda", TORCH_BOX(&medkd::standardised_mse_terms));
  m.impl("standardised_mse_backward_cuda", TORCH_BOX(&medkd::standardised_mse_backward));
}
