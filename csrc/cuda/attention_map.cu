// attention_map: energies in one pass over the features, their norm, the gradient in one more pass. The backward of
// importance_and_affinity: that gradient, with what arrives for a pixel by its class added in the same pass.
// Derivations: medkd_fast/reference/attention_map.py, class_means.py, importance_and_affinity.py.
//
// Where a channel's pixels lie side by side a warp takes neighbouring packs of pixels, and the warps of a block share the
// channels out. Where channels lie side by side neighbouring threads take neighbouring channels of several pixels. A block
// leaves the sum of its energies' squares in a slot; whoever needs a sum over an image adds up the image's slots.
#include "../math/attention_map.h"

#include <algorithm>
#include <type_traits>

#include "class_map.h"
#include "operators.h"
#include "pixel_norms.h"
#include "pixels.h"
#include "planes.h"
#include "room.h"

namespace medkd {

constexpr int attention_threads = 256, attention_warps = attention_threads / warp_size;
// Loads of a thread that are on their way together: packs of a pixel's channels, or a channel's pixels.
constexpr int packs_at_once = 8, pixels_at_once = 8;
// Blocks on a multiprocessor. Left alone, the compiler spills a few registers to fit one more.
constexpr int least_blocks = 2;
// For an image, at most; everyone who needs their sum adds them up.
constexpr int64_t most_energy_slots = 1024, most_product_slots = 64;
// Pixels of a map that a block takes at a time.
constexpr int map_pixels = 4 * attention_threads;

struct AttentionCall {
  PackedPlanes x;
  const uint8_t* mask;  // [B, N] or nullptr
  int64_t images, channels, pixels;
  double power;
  int width;         // neighbouring threads with channels of their own, a power of two; 0: packs of pixels
  int members;       // threads that share the channels of a pack, or the pixels of a channel
  int tile;          // pixels that a block takes at a time
  int64_t tiles;     // of an image
};

// The sum of an image's slots, in every thread.
__device__ __forceinline__ double sum_of_slots(const double* slots, int64_t count, double* scratch) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += attention_threads) sum += slots[i];
  return block_sum(sum, scratch);
}

// An element as it lies in memory.
template <typename A>
using Bits = std::conditional_t<sizeof(A) == sizeof(double), uint64_t, uint32_t>;

// Bit k where pixel first + k * step counts.
__device__ __forceinline__ unsigned counted_pixels(const AttentionCall& call, int64_t image, int64_t first, int step) {
  unsigned counts = 0;
#pragma unroll
  for (int k = 0; k < pixels_at_once; ++k) {
    const int64_t pixel = first + k * step;
    if (pixel < call.pixels && (call.mask == nullptr || call.mask[image * call.pixels + pixel] != 0)) counts |= 1u << k;
  }
  return counts;
}

// Channel c of those pixels, 0 where they do not count.
template <typename A>
__device__ __forceinline__ void load_pixels(const Planes& x, int64_t image, int64_t c, int64_t first, int step,
                                            unsigned counts, A (&out)[pixels_at_once]) {
  const int64_t offset = offset_of(x, image, first) + c * x.stride_c;
  Bits<A> raw[pixels_at_once];
  with_type<A>(x.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= sizeof(A)) {  // the arithmetic is never narrower than what it is made with
      const T* at = static_cast<const T*>(x.data) + offset;
#pragma unroll
      for (int k = 0; k < pixels_at_once; ++k) {
        T value{};
        if (counts >> k & 1) value = at[k * step * x.stride_n];
        raw[k] = 0;
        memcpy(&raw[k], &value, sizeof value);
      }
#pragma unroll
      for (int k = 0; k < pixels_at_once; ++k) {
        T value;
        memcpy(&value, &raw[k], sizeof value);
        out[k] = static_cast<A>(widen(value));
      }
    }
  });
}

// Packs of the channels c, c + step, ... of a thread's pixels.
template <typename A>
__device__ __forceinline__ void fetch_channels(const AttentionCall& call, int64_t image, int64_t c, int step, int64_t pixel,
                                               int count, Raw (&raw)[packs_at_once]) {
#pragma unroll
  for (int i = 0; i < packs_at_once; ++i)
    raw[i] = fetch<A>(call.x, image, c + i * step, pixel, c + i * step < call.channels ? count : 0);
}

// Which tiles of which image a block adds up, and its thread's place in them.
struct Slot {
  int64_t image, begin, end;

  __device__ Slot(const AttentionCall& call, int64_t slots, int64_t tiles_of_slot)
      : image(blockIdx.x / slots),
        begin(blockIdx.x % slots * tiles_of_slot),
        end(call.tiles - begin < tiles_of_slot ? call.tiles : begin + tiles_of_slot) {}
};

template <typename A>
__global__ void __launch_bounds__(attention_threads, least_blocks)
    energies_of_packs_kernel(const AttentionCall call, int64_t slots, int64_t tiles_of_slot,
                             A* energies,        // [B, N]
                             double* squares) {  // [B, slots]
  double* const scratch = shared_memory<double>();  // [warps], then the members' sums [members, tile]
  A* const sums = reinterpret_cast<A*>(scratch + attention_warps);
  const Slot slot(call, slots, tiles_of_slot);
  const int thread = static_cast<int>(threadIdx.x), packs = attention_threads / call.members;
  const int member = thread / packs, own = thread % packs * lanes<A>;
  double square = 0;
  for (int64_t tile = slot.begin; tile < slot.end; ++tile) {
    const int64_t first = tile * call.tile, pixel = first + own;
    const int count = pixels_in_pack<A>(pixel, call.pixels);
    A sum[lanes<A>] = {};
    for (int64_t c = member; c < call.channels; c += packs_at_once * call.members) {
      Raw raw[packs_at_once];
      fetch_channels<A>(call, slot.image, c, call.members, pixel, count, raw);
      with_power<A>(call.power, [&](const auto& power) {
#pragma unroll
        for (int i = 0; i < packs_at_once; ++i) {
          const Pack<A, lanes<A>> wide = widen_raw<A>(call.x.planes.type, raw[i]);
#pragma unroll
          for (int k = 0; k < lanes<A>; ++k) sum[k] += power.value(wide.value[k]);
        }
      });
    }
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) sums[member * call.tile + own + k] = sum[k];
    __syncthreads();
    for (int p = thread; p < call.tile; p += attention_threads) {
      if (first + p >= call.pixels) break;
      A energy = sums[p];
      for (int m = 1; m < call.members; ++m) energy += sums[m * call.tile + p];
      const int64_t at = slot.image * call.pixels + first + p;
      if (call.mask != nullptr && call.mask[at] == 0) energy = A(0);
      energies[at] = energy;
      square += static_cast<double>(energy) * static_cast<double>(energy);
    }
    __syncthreads();
  }
  square = block_sum(square, scratch);
  if (thread == 0) squares[blockIdx.x] = square;
}

template <typename A>
__global__ void __launch_bounds__(attention_threads, least_blocks)
    energies_of_pixels_kernel(const AttentionCall call, int64_t slots, int64_t tiles_of_slot,
                              A* energies,        // [B, N]
                              double* squares) {  // [B, slots]
  const Slot slot(call, slots, tiles_of_slot);
  const int thread = static_cast<int>(threadIdx.x), member = thread / call.width, channel = thread % call.width;
  double square = 0;
  for (int64_t tile = slot.begin; tile < slot.end; ++tile) {
    const int64_t first = tile * call.tile + member;
    const unsigned counts = counted_pixels(call, slot.image, first, call.members);
    A sum[pixels_at_once] = {};
    for (int64_t c = channel; c < call.channels; c += call.width) {
      A x[pixels_at_once];
      load_pixels(call.x.planes, slot.image, c, first, call.members, counts, x);
      with_power<A>(call.power, [&](const auto& power) {
#pragma unroll
        for (int k = 0; k < pixels_at_once; ++k) sum[k] += power.value(x[k]);
      });
    }
#pragma unroll
    for (int k = 0; k < pixels_at_once; ++k) {
      for (int distance = call.width / 2; distance > 0; distance /= 2)
        sum[k] += __shfl_xor_sync(all_lanes, sum[k], distance);
      const int64_t pixel = first + k * call.members;
      if (channel == 0 && pixel < call.pixels) {
        energies[slot.image * call.pixels + pixel] = sum[k];
        square += static_cast<double>(sum[k]) * static_cast<double>(sum[k]);
      }
    }
  }
  square = block_sum(square, shared_memory<double>());
  if (thread == 0) squares[blockIdx.x] = square;
}

// The energies become the map, in place.
template <typename A>
__global__ void __launch_bounds__(attention_threads)
    normalise_kernel(A* map, int64_t pixels, int64_t blocks, const double* squares, int64_t slots, double* norms) {
  const int64_t image = blockIdx.x / blocks, first = blockIdx.x % blocks * map_pixels;
  const double norm = sqrt(sum_of_slots(squares + image * slots, slots, shared_memory<double>()));
  if (threadIdx.x == 0 && first == 0) norms[image] = norm;
  const double factor = norm == 0 ? 0.0 : 1 / norm;
#pragma unroll
  for (int k = 0; k < map_pixels / attention_threads; ++k) {
    const int64_t pixel = first + k * attention_threads + threadIdx.x;
    A* const at = map + image * pixels + pixel;
    if (pixel < pixels) *at = static_cast<A>(factor * static_cast<double>(*at));
  }
}

// Every block a part of an image's <v, q>.
template <typename A>
__global__ void __launch_bounds__(attention_threads)
    products_kernel(const A* map, const A* upstream, int64_t pixels, int64_t slots, double* products) {
  const int64_t image = blockIdx.x / slots;
  double sum = 0;
#pragma unroll 4
  for (int64_t p = blockIdx.x % slots * attention_threads + threadIdx.x; p < pixels; p += slots * attention_threads)
    sum += static_cast<double>(map[image * pixels + p]) * static_cast<double>(upstream[image * pixels + p]);
  sum = block_sum(sum, shared_memory<double>());
  if (threadIdx.x == 0) products[blockIdx.x] = sum;
}

// What the gradient takes beside the features.
template <typename A>
struct Arriving {
  const A* map;            // [B, N]
  const A* upstream;       // [B, N]
  const A* weight;         // of the upstream, or nullptr
  const double* norms;     // [B]
  const double* products;  // [B, slots]
  int64_t slots;
};

// Of an image: gradient = factor (v - q <v, q>) slope(scale x).
template <typename A>
struct ImageGradient {
  const A* map;
  const A* upstream;
  double factor, product;
  A scale;

  // To be called by all of a block's threads; scratch: [warps + 2]
  __device__ __forceinline__ ImageGradient(const AttentionCall& call, const Arriving<A>& arriving, int64_t image,
                                           double* scratch)
      : map(arriving.map + image * call.pixels), upstream(arriving.upstream + image * call.pixels) {
    if (threadIdx.x == 0) {
      const AttentionSlope slope = attention_slope(arriving.norms[image], call.power);
      scratch[attention_warps] = slope.scale;
      scratch[attention_warps + 1] =
          arriving.weight == nullptr ? slope.factor : slope.factor * static_cast<double>(*arriving.weight);
    }
    product = sum_of_slots(arriving.products + image * arriving.slots, arriving.slots, scratch);
    scale = static_cast<A>(scratch[attention_warps]);
    factor = scratch[attention_warps + 1];
  }

  __device__ __forceinline__ A of_pixel(int64_t pixel) const {
    const double v = static_cast<double>(upstream[pixel]), q = static_cast<double>(map[pixel]);
    return static_cast<A>(factor * (v - q * product));
  }
};

// What the gradient of attention_map gets besides. `counts`: bit k where a pixel counts.
struct Nothing {
  template <int pixels>
  struct OfPixels {
    __device__ __forceinline__ OfPixels(const Nothing&, const AttentionCall&, int64_t, int64_t, int, unsigned&) {}
    template <typename A>
    __device__ __forceinline__ A plus(A value, int64_t, int) const {
      return value;
    }
  };
};

// And that of importance_and_affinity: its class's vector, of shares [B, K, C]. The labels say which pixels count.
template <typename A>
struct ByClass {
  Labels labels;
  const A* shares;

  // Pixels first + k * step.
  template <int pixels>
  struct OfPixels {
    const A* of_image;
    int64_t channels;
    int label[pixels];

    __device__ __forceinline__ OfPixels(const ByClass& all, const AttentionCall& call, int64_t image, int64_t first, int step,
                                        unsigned& counts)
        : of_image(all.shares + image * all.labels.classes * call.channels), channels(call.channels) {
#pragma unroll
      for (int k = 0; k < pixels; ++k) {
        label[k] = counts >> k & 1 ? all.labels.class_of(image * call.pixels + first + k * step) : nothing;
        if (label[k] == nothing) counts &= ~(1u << k);
      }
    }

    __device__ __forceinline__ A plus(A value, int64_t channel, int k) const {
      if (label[k] < 0) return label[k] == nothing ? value : not_a_number<A>();
      return value + of_image[label[k] * channels + channel];
    }
  };
};

constexpr std::size_t gradient_bytes = (attention_warps + 2) * sizeof(double);

template <typename A, typename Besides>
__global__ void __launch_bounds__(attention_threads, least_blocks)
    gradient_of_packs_kernel(const AttentionCall call, const Arriving<A> arriving, const Besides besides,
                             const PackedPlanes gradient) {
  const int64_t image = blockIdx.x / call.tiles;
  const int thread = static_cast<int>(threadIdx.x), packs = attention_threads / call.members;
  const int64_t pixel = blockIdx.x % call.tiles * call.tile + thread % packs * lanes<A>;
  const int count = pixels_in_pack<A>(pixel, call.pixels);
  const ImageGradient<A> of_image(call, arriving, image, shared_memory<double>());
  unsigned counts = counted(call.mask == nullptr ? nullptr : call.mask + image * call.pixels, pixel, count);
  const typename Besides::template OfPixels<lanes<A>> more(besides, call, image, pixel, 1, counts);
  A factor[lanes<A>] = {};
#pragma unroll
  for (int k = 0; k < lanes<A>; ++k)
    if (k < count) factor[k] = of_image.of_pixel(pixel + k);
  for (int64_t c = thread / packs; c < call.channels; c += packs_at_once * call.members) {
    Raw raw[packs_at_once];
    fetch_channels<A>(call, image, c, call.members, pixel, count, raw);
    Pack<A, lanes<A>> wide[packs_at_once];
    with_power<A>(call.power, [&](const auto& power) {
#pragma unroll
      for (int i = 0; i < packs_at_once; ++i) {
        wide[i] = widen_raw<A>(call.x.planes.type, raw[i]);
#pragma unroll
        for (int k = 0; k < lanes<A>; ++k)
          wide[i].value[k] = counts >> k & 1 ? factor[k] * power.slope(of_image.scale * wide[i].value[k]) : A(0);
      }
    });
#pragma unroll
    for (int i = 0; i < packs_at_once; ++i) {
      const int64_t channel = c + i * call.members;
      if (channel >= call.channels) break;
#pragma unroll
      for (int k = 0; k < lanes<A>; ++k) wide[i].value[k] = more.plus(wide[i].value[k], channel, k);
      put<A>(gradient, image, channel, pixel, count, wide[i]);
    }
  }
}

template <typename A, typename Besides>
__global__ void __launch_bounds__(attention_threads, least_blocks)
    gradient_of_pixels_kernel(const AttentionCall call, const Arriving<A> arriving, const Besides besides,
                              const Planes gradient) {
  const int64_t image = blockIdx.x / call.tiles;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t first = blockIdx.x % call.tiles * call.tile + thread / call.width;
  const ImageGradient<A> of_image(call, arriving, image, shared_memory<double>());
  unsigned counts = counted_pixels(call, image, first, call.members);
  const typename Besides::template OfPixels<pixels_at_once> more(besides, call, image, first, call.members, counts);
  A factor[pixels_at_once] = {};
#pragma unroll
  for (int k = 0; k < pixels_at_once; ++k)
    if (counts >> k & 1) factor[k] = of_image.of_pixel(first + k * call.members);
  for (int64_t c = thread % call.width; c < call.channels; c += call.width) {
    A x[pixels_at_once];
    load_pixels(call.x.planes, image, c, first, call.members, counts, x);
    with_power<A>(call.power, [&](const auto& power) {
#pragma unroll
      for (int k = 0; k < pixels_at_once; ++k)
        x[k] = more.plus(counts >> k & 1 ? factor[k] * power.slope(of_image.scale * x[k]) : A(0), c, k);
    });
    with_type<A>(gradient.type, [&](auto zero) {
      auto* to = static_cast<decltype(zero)*>(gradient.data) + offset_of(gradient, image, first) + c * gradient.stride_c;
#pragma unroll
      for (int k = 0; k < pixels_at_once; ++k)
        if (first + k * call.members < call.pixels) narrow(x[k], to[k * call.members * gradient.stride_n]);
    });
  }
}

template <typename A>
static AttentionCall attention_call(const Tensor& x, const std::optional<Tensor>& mask, double power,
                                    std::vector<Tensor>& holder) {
  AttentionCall call{};
  call.x = PackedPlanes(planes_of(x, holder), lanes<A>);
  call.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.images = x.size(0);
  call.channels = x.size(1);
  call.pixels = pixels_of(x);
  call.power = power;
  const auto power_of_two = [&](int most) {  // as many as there are channels, or all
    int result = 1;
    while (result < most && result < call.channels) result *= 2;
    return result;
  };
  if (call.x.channels_inside()) {
    call.width = power_of_two(warp_size);
    call.members = attention_threads / call.width;
    call.tile = call.members * pixels_at_once;
  } else {
    call.members = power_of_two(attention_warps);
    call.tile = attention_threads / call.members * lanes<A>;
  }
  call.tiles = ceil_div(call.pixels, call.tile);
  return call;
}

template <typename A>
static std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& mask, double power,
                                          ScalarType type, cudaStream_t stream) {
  std::vector<Tensor> holder;
  holder.reserve(1);
  const AttentionCall call = attention_call<A>(x, mask, power, holder);
  std::vector<int64_t> size{call.images};
  for (int64_t d = 2; d < x.dim(); ++d) size.push_back(x.size(d));
  Tensor map = new_like(x, size, type), norms = new_like(x, {call.images}, ScalarType::Double);
  double* const norm = static_cast<double*>(norms.data_ptr());
  if (call.pixels == 0) {
    torch::stable::zero_(norms);
    return {map, norms};
  }
  const int64_t tiles_of_slot = ceil_div(call.tiles, most_energy_slots), slots = ceil_div(call.tiles, tiles_of_slot);
  Room room;
  double* squares = nullptr;
  room.ask(squares, call.images * slots);
  room.take(x);
  A* const energies = static_cast<A*>(map.data_ptr());
  const Blocks grid{call.images * slots};
  constexpr std::size_t scratch = attention_warps * sizeof(double);
  if (call.width == 0)
    launch<energies_of_packs_kernel<A>>(grid, attention_threads, scratch + call.members * call.tile * sizeof(A), stream,
                                        call, slots, tiles_of_slot, energies, squares);
  else
    launch<energies_of_pixels_kernel<A>>(grid, attention_threads, scratch, stream, call, slots, tiles_of_slot, energies,
                                         squares);
  const int64_t blocks = ceil_div(call.pixels, map_pixels);
  launch<normalise_kernel<A>>({call.images * blocks}, attention_threads, scratch, stream, energies, call.pixels,
                              blocks, static_cast<const double*>(squares), slots, norm);
  return {map, norms};
}

template <typename A, typename Besides>
static Tensor backward(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& map, const Tensor& norms,
                       const Tensor& upstream, const A* weight, double power, const Besides& besides,
                       cudaStream_t stream) {
  std::vector<Tensor> holder;
  holder.reserve(2);
  const AttentionCall call = attention_call<A>(x, mask, power, holder);
  const Gradient gradient(x);
  if (call.pixels == 0 || call.channels == 0) return gradient.finish();
  const Planes written = planes_of(gradient.written, holder);
  const Tensor dense = as_contiguous(upstream);
  const A* const q = static_cast<const A*>(map.data_ptr());
  const A* const v = static_cast<const A*>(dense.data_ptr());
  const int64_t slots = std::min(ceil_div(call.pixels, map_pixels), most_product_slots);
  Room room;
  double* products = nullptr;
  room.ask(products, call.images * slots);
  room.take(x);
  launch<products_kernel<A>>({call.images * slots}, attention_threads, attention_warps * sizeof(double), stream, q,
                             v, call.pixels, slots, products);
  const Arriving<A> arriving{q, v, weight, static_cast<const double*>(norms.data_ptr()), products, slots};
  const Blocks grid{call.images * call.tiles};
  if (call.width == 0)
    launch<gradient_of_packs_kernel<A, Besides>>(grid, attention_threads, gradient_bytes, stream, call, arriving, besides,
                                                 PackedPlanes(written, lanes<A>));
  else
    launch<gradient_of_pixels_kernel<A, Besides>>(grid, attention_threads, gradient_bytes, stream, call, arriving, besides,
                                                  written);
  return gradient.finish();
}

std::tuple<Tensor, Tensor> attention_map(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    double power) {
  const OnDevice device(x);
  const ScalarType type = arithmetic_type(x, x);
  return type == ScalarType::Double ? forward<double>(x, mask, power, type, device.stream())
                                    : forward<float>(x, mask, power, type, device.stream());
}

static Tensor attention_map_backward(
    const Tensor& x,                    // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& map,                  // [B, *S], contiguous, in the type of the arithmetic
    const Tensor& norms,                // [B], double, contiguous
    const Tensor& upstream,             // [B, *S], in the type of the arithmetic
    double power) {
  const OnDevice device(x);
  return arithmetic_type(x, x) == ScalarType::Double
             ? backward<double>(x, mask, map, norms, upstream, nullptr, power, Nothing{}, device.stream())
             : backward<float>(x, mask, map, norms, upstream, nullptr, power, Nothing{}, device.stream());
}

template <typename A>
static Tensor backward_by_class(const Tensor& x, const Labels& labels, const Tensor& map, const Tensor& norms,
                                const Tensor& counts, const Tensor& of_map, const Tensor& of_means,
                                const Tensor& v_importance, const Tensor& v_affinity, double power, cudaStream_t stream) {
  const Tensor dense = as_contiguous(of_means);
  Room room;
  A* shares = nullptr;
  room.ask(shares, dense.numel());
  room.take(x);
  if (dense.numel() > 0)
    share_out(static_cast<const A*>(dense.data_ptr()), static_cast<const A*>(v_affinity.data_ptr()),
              static_cast<const int64_t*>(counts.data_ptr()), counts.numel(), dense.size(2), shares, stream);
  return backward<A>(x, std::nullopt, map, norms, of_map, static_cast<const A*>(v_importance.data_ptr()), power,
                     ByClass<A>{labels, shares}, stream);
}

static Tensor importance_and_affinity_backward(
    const Tensor& x,             // the student, [B, C, *S]
    const Tensor& target,        // [B, *S], contiguous
    const Tensor& map,           // [B, *S], contiguous, in the type of the arithmetic
    const Tensor& norms,         // [B], double, contiguous
    const Tensor& counts,        // [B, K], int64, contiguous
    const Tensor& of_map,        // [B, *S], in the type of the arithmetic, as all that follow
    const Tensor& of_means,      // [B, K, C]
    const Tensor& v_importance,  // []
    const Tensor& v_affinity,    // []
    double power, int64_t ignore_index) {
  const OnDevice device(x);
  const Labels labels = labels_of(target, counts.size(1), ignore_index);
  return (arithmetic_type(x, x) == ScalarType::Double ? backward_by_class<double> : backward_by_class<float>)(
      x, labels, map, norms, counts, of_map, of_means, v_importance, v_affinity, power, device.stream());
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("attention_map_cuda", TORCH_BOX(&medkd::attention_map));
  m.impl("attention_map_backward_cuda", TORCH_BOX(&medkd::attention_map_backward));
  m.impl("importance_and_affinity_backward_cuda", TORCH_BOX(&medkd::importance_and_affinity_backward));
}
