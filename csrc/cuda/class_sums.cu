// class_means and class_similarity, which share their passes: sums of features by class, products of pixels with vectors of
// their classes, and gradients made of such vectors. Derivations: medkd_fast/reference/class_means.py, class_similarity.py.
//
// Sums: a block takes a stretch of pixels, 32 channels and some classes. A tile goes through shared memory, so that a warp's
// lanes have channels of their own whichever way memory lies; a lane walks the pixels in their order and keeps the sum of the
// pixels since the class last changed, which it adds to its own column of the classes' sums when it changes. Slots are
// added in order. In the other passes a thread has a pack of pixels of some channels, or, where channels lie side by side, a
// warp has a pixel.
#include "../math/class_similarity.h"

#include <algorithm>

#include "class_map.h"
#include "operators.h"
#include "pixels.h"
#include "planes.h"
#include "room.h"

namespace medkd {

constexpr int class_threads = 128, class_warps = class_threads / warp_size, tile_packs = 16;
// On a multiprocessor, of kernels from which the compiler, left alone, spills a few registers to fit one more.
constexpr int least_blocks = 4;
constexpr int most_classes = 32;  // of a block's sums
constexpr int64_t most_slots = 64, least_stretch = 1024;
// Behind the channels of a class's sums: the number of its pixels, and what else there is of each.
constexpr int more_sums = 2;

template <typename A>
constexpr int tile_pixels = tile_packs * lanes<A>;
constexpr int tile_pitch = warp_size + 1;  // from a pixel's channels to the next one's

struct ClassMap : Labels {
  PackedPlanes x, gradient;
  int64_t images, channels, pixels;
  int64_t stretch, slots;  // pixels of a slot, and slots of an image
};

// Numbers of pixels; each [B, N]. `other` is added up by class beside the features, which are multiplied by `weight`.
template <typename A>
struct PixelWeights {
  const A *upstream, *inverse, *similarity;  // all nullptr: 1, and nothing

  __device__ __forceinline__ A weight(int64_t i) const { return upstream == nullptr ? A(1) : upstream[i] * inverse[i]; }
  __device__ __forceinline__ A other(int64_t i) const { return upstream == nullptr ? A(0) : upstream[i] * similarity[i]; }
};

template <typename A>
struct TileNumbers {
  A weight[tile_pixels<A>], other[tile_pixels<A>];
  int label[tile_pixels<A>];
};

template <typename A>
std::size_t sums_bytes(int64_t classes) {
  return static_cast<std::size_t>(std::min<int64_t>(classes, most_classes)) * class_threads * sizeof(double) +
         sizeof(TileNumbers<A>) + tile_pixels<A> * tile_pitch * sizeof(A);
}

// A block's tile: which pack of which channel a thread moves in its i-th turn.
struct PackPlace {
  int channel, pack;
  __device__ __forceinline__ PackPlace(bool channels_inside, int turn) {
    const int flat = static_cast<int>(threadIdx.x) + turn * class_threads;
    if (channels_inside) {
      channel = flat % warp_size;
      pack = flat / warp_size;
    } else {  // 8 packs of 4 channels a warp: no bank twice
      channel = flat / 8 % warp_size;
      pack = flat / 8 / warp_size * 8 + flat % 8;
    }
  }
};

template <typename A>
__global__ void __launch_bounds__(class_threads, least_blocks)
    class_sums_kernel(const ClassMap map, const PixelWeights<A> weights, int64_t groups,
                      double* slots) {  // [B, slots, K, C + 2]
  constexpr int pixels = tile_pixels<A>, pitch = tile_pitch, turns = tile_packs * warp_size / class_threads;
  const int64_t group = blockIdx.y % groups, first_class = blockIdx.y / groups * most_classes;
  const int some_classes = static_cast<int>(map.classes - first_class < most_classes ? map.classes - first_class : most_classes);
  double* const sums = shared_memory<double>();  // [classes, threads]
  TileNumbers<A>& numbers = *reinterpret_cast<TileNumbers<A>*>(sums + some_classes * class_threads);
  A* const tile = reinterpret_cast<A*>(&numbers + 1);  // [pixels, pitch]
  const int thread = static_cast<int>(threadIdx.x), lane = lane_index(), warp = warp_index();
  const int64_t image = blockIdx.x / map.slots, begin = blockIdx.x % map.slots * map.stretch;
  const int64_t end = map.pixels - begin < map.stretch ? map.pixels : begin + map.stretch;
  const int64_t first_channel = group * warp_size, channel = first_channel + lane;
  for (int k = 0; k < some_classes; ++k) sums[k * class_threads + thread] = 0;

  int current = nothing;
  double sum = 0;
  for (int64_t first = begin; first < end; first += pixels) {
    Raw raw[turns];
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      const PackPlace at(map.x.channels_inside(), turn);
      const int64_t pixel = first + at.pack * lanes<A>;
      const bool there = first_channel + at.channel < map.channels;
      raw[turn] = fetch<A>(map.x, image, first_channel + at.channel, pixel, there ? pixels_in_pack<A>(pixel, end) : 0);
    }
    __syncthreads();  // the tile before is done with
    if (thread < pixels) {
      const int64_t i = image * map.pixels + first + thread;
      const bool inside = first + thread < end;
      numbers.label[thread] = inside ? map.class_of(i) : nothing;
      numbers.weight[thread] = inside ? weights.weight(i) : A(0);
      numbers.other[thread] = inside ? weights.other(i) : A(0);
    }
#pragma unroll
    for (int turn = 0; turn < turns; ++turn) {
      const PackPlace at(map.x.channels_inside(), turn);
      const Pack<A, lanes<A>> wide = widen_raw<A>(map.x.planes.type, raw[turn]);
#pragma unroll
      for (int k = 0; k < lanes<A>; ++k) tile[(at.pack * lanes<A> + k) * pitch + at.channel] = wide.value[k];
    }
    __syncthreads();
#pragma unroll 4
    for (int p = warp * (pixels / class_warps); p < (warp + 1) * (pixels / class_warps); ++p) {
      const int label = numbers.label[p];
      if (label == nothing) continue;
      const int64_t own = row_of(label) - first_class;
      if (own < 0 || own >= some_classes) continue;
      if (own != current) {
        if (current != nothing) sums[current * class_threads + thread] += sum;
        sum = 0;
        current = static_cast<int>(own);
      }
      const A value = channel < map.channels ? tile[p * pitch + lane] * numbers.weight[p]
                      : channel == map.channels ? A(1)
                                                : numbers.other[p];
      sum += static_cast<double>(label == no_class && channel < map.channels ? not_a_number<A>() : value);
    }
  }
  if (current != nothing) sums[current * class_threads + thread] += sum;
  __syncthreads();
  if (channel >= map.channels + more_sums) return;
  for (int k = warp; k < some_classes; k += class_warps) {
    double total = 0;
    for (int other = 0; other < class_warps; ++other) total += sums[k * class_threads + other * warp_size + lane];
    slots[(blockIdx.x * map.classes + first_class + k) * (map.channels + more_sums) + channel] = total;
  }
}

// The sum of a class over the slots of its image, of a channel or what lies behind.
__device__ __forceinline__ double add_slots(const ClassMap& map, const double* slots, int64_t channel) {
  const int64_t row = map.channels + more_sums, image = blockIdx.x / map.classes, k = blockIdx.x % map.classes;
  const double* at = slots + (image * map.slots * map.classes + k) * row + channel;
  double sum = 0;
  for (int64_t slot = 0; slot < map.slots; ++slot) sum += at[slot * map.classes * row];
  return sum;
}

// A block a class. Means [B, K, width], or, with `inverses`, prototypes and the inverses of their norms.
template <typename A>
__global__ void __launch_bounds__(class_threads)
    finish_means_kernel(const ClassMap map, const double* slots, int64_t width, A* means, int64_t* counts, A* inverses) {
  const double number = add_slots(map, slots, map.channels);
  const double divisor = inverses != nullptr ? number + prototype_epsilon : number > 1 ? number : 1.0;
  double square = 0;
  for (int64_t c = threadIdx.x; c < width; c += class_threads) {
    const A mean = c < map.channels ? static_cast<A>(add_slots(map, slots, c) / divisor) : A(0);
    means[blockIdx.x * width + c] = mean;
    square += static_cast<double>(mean) * static_cast<double>(mean);
  }
  square = block_sum(square, shared_memory<double>());
  if (threadIdx.x != 0) return;
  counts[blockIdx.x] = static_cast<int64_t>(number);
  if (inverses != nullptr) inverses[blockIdx.x] = static_cast<A>(inverse_norm(square));
}

// A block a class.
template <typename A>
__global__ void __launch_bounds__(class_threads)
    shares_kernel(const A* upstream, const A* factor, const int64_t* counts, int64_t channels, A* shares) {
  const int64_t number = counts[blockIdx.x], first = blockIdx.x * channels;
  const A times = factor == nullptr ? A(1) : *factor;
  for (int64_t c = threadIdx.x; c < channels; c += class_threads)
    shares[first + c] = times * upstream[first + c] / static_cast<A>(number > 1 ? number : 1);
}

// A block a class: what reaches its pixels through the prototype, and the inverse of its norm.
template <typename A>
__global__ void __launch_bounds__(class_threads)
    rest_kernel(const ClassMap map, const double* slots, const A* means, const int64_t* counts, A* rest, A* inverses) {
  const A* const prototype = means + blockIdx.x * map.channels;
  double square = 0;
  for (int64_t c = threadIdx.x; c < map.channels; c += class_threads)
    square += static_cast<double>(prototype[c]) * static_cast<double>(prototype[c]);
  const double own = inverse_norm(block_sum(square, shared_memory<double>()));
  const double along = has_norm(own) ? own * own * add_slots(map, slots, map.channels + 1) : 0.0;
  const double number = static_cast<double>(counts[blockIdx.x]) + prototype_epsilon;
  for (int64_t c = threadIdx.x; c < map.channels; c += class_threads)
    rest[blockIdx.x * map.channels + c] =
        static_cast<A>((own * add_slots(map, slots, c) - along * static_cast<double>(prototype[c])) / number);
  if (threadIdx.x == 0) inverses[blockIdx.x] = static_cast<A>(own);
}

// ---- Pixels. A warp's lanes have packs of pixels and a block's warps share out the channels; or a warp has a pixel.

template <typename A>
struct PackOfPixels {
  int64_t image, pixel;
  int count;
  int label[lanes<A>];

  __device__ explicit PackOfPixels(const ClassMap& map) {
    const int64_t packs = ceil_div(map.pixels, lanes<A>), blocks = ceil_div(packs, warp_size);
    image = blockIdx.x / blocks;
    pixel = (blockIdx.x % blocks * warp_size + lane_index()) * lanes<A>;
    count = pixels_in_pack<A>(pixel, map.pixels);
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) label[k] = k < count ? map.class_of(image * map.pixels + pixel + k) : nothing;
  }

  __device__ __forceinline__ int64_t at(const ClassMap& map, int k) const { return image * map.pixels + pixel + k; }
  __device__ __forceinline__ int64_t row(const ClassMap& map, int k) const { return image * map.classes + row_of(label[k]); }

  // The features of a channel, 0 where a pixel does not count.
  __device__ __forceinline__ Pack<A, lanes<A>> features(const ClassMap& map, const Raw& raw) const {
    Pack<A, lanes<A>> x = widen_raw<A>(map.x.planes.type, raw);
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k)
      x.value[k] = label[k] == nothing ? A(0) : label[k] == no_class ? not_a_number<A>() : x.value[k];
    return x;
  }
};

template <typename A>
__device__ __forceinline__ A element(const Planes& x, int64_t offset) {
  A value = A(0);
  with_type<A>(x.type, [&](auto zero) { value = static_cast<A>(widen(static_cast<const decltype(zero)*>(x.data)[offset])); });
  return value;
}

// What class_similarity keeps of a pixel.
template <typename A>
struct SimilarityOut {
  A *similarity, *inverse;  // [B, N]

  __device__ __forceinline__ void put(int64_t i, int label, A product, A square, A of_class) const {
    const A own = inverse_norm(square);
    inverse[i] = own;
    similarity[i] = label == nothing ? A(0) : product * own * of_class;
  }
};

template <typename A>
__global__ void __launch_bounds__(class_threads, least_blocks)
    similarity_packs_kernel(const ClassMap map, const A* means, const A* inverses, const SimilarityOut<A> out) {
  constexpr int width = lanes<A>, batch = 4;
  A* const shared = shared_memory<A>();  // [warps, 2 width, 32]
  const PackOfPixels<A> own(map);
  A product[width] = {}, square[width] = {};
  for (int64_t c = warp_index() * batch; c < map.channels; c += class_warps * batch) {
    Raw raw[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j) raw[j] = fetch<A>(map.x, own.image, c + j, own.pixel, c + j < map.channels ? own.count : 0);
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (c + j >= map.channels) break;
      const Pack<A, width> x = own.features(map, raw[j]);
#pragma unroll
      for (int k = 0; k < width; ++k) {
        const A of_class = own.label[k] == nothing ? A(0) : means[own.row(map, k) * map.channels + c + j];
        product[k] += x.value[k] * of_class;
        square[k] += x.value[k] * x.value[k];
      }
    }
  }
#pragma unroll
  for (int k = 0; k < width; ++k) {
    shared[(warp_index() * 2 * width + k) * warp_size + lane_index()] = product[k];
    shared[(warp_index() * 2 * width + width + k) * warp_size + lane_index()] = square[k];
  }
  __syncthreads();
  if (warp_index() != 0) return;
#pragma unroll
  for (int k = 0; k < width; ++k) {
    if (k >= own.count) break;
    for (int warp = 1; warp < class_warps; ++warp) {
      product[k] += shared[(warp * 2 * width + k) * warp_size + lane_index()];
      square[k] += shared[(warp * 2 * width + width + k) * warp_size + lane_index()];
    }
    out.put(own.at(map, k), own.label[k], product[k], square[k],
            own.label[k] == nothing ? A(0) : inverses[own.row(map, k)]);
  }
}

template <typename A>
__global__ void __launch_bounds__(class_threads)
    similarity_pixels_kernel(const ClassMap map, const A* means, const A* inverses, const SimilarityOut<A> out) {
  const int64_t i = blockIdx.x * int64_t{class_warps} + warp_index();
  if (i >= map.images * map.pixels) return;
  const int64_t image = i / map.pixels, offset = offset_of(map.x.planes, image, i % map.pixels);
  const int label = map.class_of(i);
  const int64_t row = image * map.classes + row_of(label);
  A product = A(0), square = A(0);
  if (label != nothing)
    for (int64_t c = lane_index(); c < map.channels; c += warp_size) {
      const A x = label == no_class ? not_a_number<A>() : element<A>(map.x.planes, offset + c * map.x.planes.stride_c);
      product += x * means[row * map.channels + c];
      square += x * x;
    }
  product = warp_sum(product);
  square = warp_sum(square);
  if (lane_index() == 0) out.put(i, label, product, square, label == nothing ? A(0) : inverses[row]);
}

// gradient = of_prototype * prototype + of_feature * feature + rest; without prototypes, rest alone.
template <typename A>
struct Combination {
  const A *prototypes, *inverses, *rest;  // [B, K, C], [B, K], [B, K, C]
  PixelWeights<A> pixels;

  __device__ __forceinline__ SimilarityGradient<A> factors(int64_t i, int label, int64_t row) const {
    if (prototypes == nullptr || label == nothing) return {A(0), A(0)};
    return similarity_gradient(pixels.upstream[i], pixels.similarity[i], pixels.inverse[i], inverses[row]);
  }

  __device__ __forceinline__ A operator()(const SimilarityGradient<A>& of, int label, A x, int64_t at) const {
    if (label == nothing) return A(0);
    if (label == no_class) return not_a_number<A>();
    return prototypes == nullptr ? rest[at] : of.of_prototype * prototypes[at] + of.of_feature * x + rest[at];
  }
};

template <typename A>
__global__ void __launch_bounds__(class_threads, least_blocks) combine_packs_kernel(const ClassMap map, const Combination<A> combine) {
  constexpr int width = lanes<A>, batch = 4;
  const PackOfPixels<A> own(map);
  SimilarityGradient<A> of[width];
#pragma unroll
  for (int k = 0; k < width; ++k) of[k] = combine.factors(own.at(map, k), own.label[k], own.row(map, k));
  const bool reads = combine.prototypes != nullptr;
  for (int64_t c = warp_index() * batch; c < map.channels; c += class_warps * batch) {
    Raw raw[batch];
#pragma unroll
    for (int j = 0; j < batch; ++j)
      raw[j] = fetch<A>(map.x, own.image, c + j, own.pixel, reads && c + j < map.channels ? own.count : 0);
#pragma unroll
    for (int j = 0; j < batch; ++j) {
      if (c + j >= map.channels) break;
      const Pack<A, width> x = own.features(map, raw[j]);
      Pack<A, width> out;
#pragma unroll
      for (int k = 0; k < width; ++k)
        out.value[k] = combine(of[k], own.label[k], x.value[k], own.row(map, k) * map.channels + c + j);
      put<A>(map.gradient, own.image, c + j, own.pixel, own.count, out);
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(class_threads) combine_pixels_kernel(const ClassMap map, const Combination<A> combine) {
  const int64_t i = blockIdx.x * int64_t{class_warps} + warp_index();
  if (i >= map.images * map.pixels) return;
  const int64_t image = i / map.pixels, from = offset_of(map.x.planes, image, i % map.pixels);
  const int64_t to = offset_of(map.gradient.planes, image, i % map.pixels);
  const int label = map.class_of(i);
  const int64_t row = image * map.classes + row_of(label);
  const SimilarityGradient<A> of = combine.factors(i, label, row);
  const bool reads = combine.prototypes != nullptr && label != nothing;
  for (int64_t c = lane_index(); c < map.channels; c += warp_size) {
    const A x = reads ? element<A>(map.x.planes, from + c * map.x.planes.stride_c) : A(0);
    store_element(map.gradient.planes, to + c * map.gradient.planes.stride_c,
                  combine(of, label, x, row * map.channels + c));
  }
}

// ---- Launches.

struct ClassCall {
  OnDevice device;
  cudaStream_t stream;
  ClassMap map{};
  ScalarType type;  // of the arithmetic
  std::vector<Tensor> holder;
  Room room;

  ClassCall(const Tensor& x, const Tensor& target, int64_t classes, int64_t ignore_index)
      : device(x), stream(device.stream()), type(arithmetic_type(x, x)) {
    holder.reserve(2);
    map.x = PackedPlanes(planes_of(x, holder), width());
    static_cast<Labels&>(map) = labels_of(target, classes, ignore_index);
    map.images = x.size(0);
    map.channels = x.size(1);
    map.pixels = pixels_of(x);
    const int64_t stretch = std::max({least_stretch, 16 * classes, ceil_div(map.pixels, most_slots)});
    map.stretch = ceil_div(stretch, 64) * 64;
    map.slots = ceil_div(map.pixels, map.stretch);
  }

  int64_t width() const { return type == ScalarType::Double ? lanes<double> : lanes<float>; }

  Gradient into_gradient(const Tensor& x) {
    Gradient gradient(x);
    map.gradient = PackedPlanes(planes_of(gradient.written, holder), width());
    return gradient;
  }

  int64_t slots_size() const { return map.images * map.slots * map.classes * (map.channels + more_sums); }
  bool empty() const { return map.images * map.pixels == 0; }

  template <typename A>
  void sums(const PixelWeights<A>& weights, double* slots) const {
    const int64_t groups = ceil_div(map.channels + more_sums, warp_size);
    launch<class_sums_kernel<A>>({map.images * map.slots, groups * ceil_div(map.classes, most_classes)},
                                 class_threads, sums_bytes<A>(map.classes), stream, map, weights, groups, slots);
  }

  template <typename A>
  int64_t blocks_of_packs() const {
    return map.images * ceil_div(ceil_div(map.pixels, lanes<A>), warp_size);
  }
  int64_t blocks_of_pixels() const { return ceil_div(map.images * map.pixels, class_warps); }

  template <typename A>
  void combine(const Combination<A>& combination) const {
    if (map.gradient.channels_inside())
      launch<combine_pixels_kernel<A>>({blocks_of_pixels()}, class_threads, 0, stream, map, combination);
    else
      launch<combine_packs_kernel<A>>({blocks_of_packs<A>()}, class_threads, 0, stream, map, combination);
  }
};

constexpr std::size_t block_sum_bytes = class_warps * sizeof(double);

template <typename A>
static void make_means(ClassCall& call, const Tensor& x, const Tensor& means, const Tensor& counts, A* inverses) {
  double* slots;
  call.room.ask(slots, call.slots_size());
  call.room.take(x);
  call.sums<A>({}, slots);
  launch<finish_means_kernel<A>>({call.map.images * call.map.classes}, class_threads, block_sum_bytes, call.stream,
                                 call.map, slots, means.size(2), static_cast<A*>(means.data_ptr()),
                                 static_cast<int64_t*>(counts.data_ptr()), inverses);
}

template <typename A>
void share_out(const A* upstream, const A* factor, const int64_t* counts, int64_t rows, int64_t channels, A* shares,
               cudaStream_t stream) {
  launch<shares_kernel<A>>({rows}, class_threads, 0, stream, upstream, factor, counts, channels, shares);
}
template void share_out(const float*, const float*, const int64_t*, int64_t, int64_t, float*, cudaStream_t);
template void share_out(const double*, const double*, const int64_t*, int64_t, int64_t, double*, cudaStream_t);

std::tuple<Tensor, Tensor> wide_class_means(const Tensor& x, const Tensor& target, int64_t num_classes, int64_t ignore_index,
                                            int64_t width) {
  ClassCall call(x, target, num_classes, ignore_index);
  Tensor means = new_like(x, {call.map.images, num_classes, width}, call.type);
  Tensor counts = new_like(x, {call.map.images, num_classes}, ScalarType::Long);
  if (call.type == ScalarType::Double)
    make_means<double>(call, x, means, counts, nullptr);
  else
    make_means<float>(call, x, means, counts, nullptr);
  return {means, counts};
}

static std::tuple<Tensor, Tensor> class_means(
    const Tensor& x,       // [B, C, *S]
    const Tensor& target,  // [B, *S], contiguous
    int64_t num_classes, int64_t ignore_index) {
  return wide_class_means(x, target, num_classes, ignore_index, x.size(1));
}

template <typename A>
static void means_backward(ClassCall& call, const Tensor& x, const Tensor& counts, const Tensor& upstream) {
  A* rest;
  call.room.ask(rest, call.map.images * call.map.classes * call.map.channels);
  call.room.take(x);
  share_out<A>(static_cast<const A*>(upstream.data_ptr()), nullptr, static_cast<const int64_t*>(counts.data_ptr()),
               call.map.images * call.map.classes, call.map.channels, rest, call.stream);
  call.combine<A>({nullptr, nullptr, rest, {}});
}

static Tensor class_means_backward(
    const Tensor& x,         // [B, C, *S]
    const Tensor& target,    // [B, *S], contiguous
    const Tensor& counts,    // [B, K], int64, contiguous
    const Tensor& upstream,  // [B, K, C], in the type of the arithmetic
    int64_t ignore_index) {
  ClassCall call(x, target, counts.size(1), ignore_index);
  const Gradient gradient = call.into_gradient(x);
  const Tensor dense = as_contiguous(upstream);
  if (!call.empty()) (call.type == ScalarType::Double ? means_backward<double> : means_backward<float>)(call, x, counts, dense);
  return gradient.finish();
}

template <typename A>
static void similarity_forward(ClassCall& call, const Tensor& x, const Tensor& means, const Tensor& counts,
                               const Tensor& similarity, const Tensor& inverse) {
  A* inverses;
  Room room;
  room.ask(inverses, call.map.images * call.map.classes);
  room.take(x);
  make_means<A>(call, x, means, counts, inverses);
  const SimilarityOut<A> out{static_cast<A*>(similarity.data_ptr()), static_cast<A*>(inverse.data_ptr())};
  const A* const prototypes = static_cast<const A*>(means.data_ptr());
  if (call.map.x.channels_inside())
    launch<similarity_pixels_kernel<A>>({call.blocks_of_pixels()}, class_threads, 0, call.stream, call.map,
                                        prototypes, static_cast<const A*>(inverses), out);
  else
    launch<similarity_packs_kernel<A>>({call.blocks_of_packs<A>()}, class_threads,
                                       class_warps * 2 * lanes<A> * warp_size * sizeof(A), call.stream, call.map,
                                       prototypes, static_cast<const A*>(inverses), out);
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> class_similarity(
    const Tensor& x,       // [B, C, *S]
    const Tensor& target,  // [B, *S], contiguous
    int64_t num_classes, int64_t ignore_index) {
  ClassCall call(x, target, num_classes, ignore_index);
  const std::vector<int64_t> size = sizes_of(target);
  Tensor similarity = new_like(x, size, call.type), inverse = new_like(x, size, call.type);
  Tensor means = new_like(x, {call.map.images, num_classes, call.map.channels}, call.type);
  Tensor counts = new_like(x, {call.map.images, num_classes}, ScalarType::Long);
  (call.type == ScalarType::Double ? similarity_forward<double> : similarity_forward<float>)(call, x, means, counts,
                                                                                             similarity, inverse);
  return {similarity, means, counts, inverse};
}

template <typename A>
static void similarity_backward(ClassCall& call, const Tensor& x, const Tensor& means, const Tensor& counts,
                                const PixelWeights<A>& weights) {
  double* slots;
  A *rest, *inverses;
  call.room.ask(slots, call.slots_size());
  call.room.ask(rest, call.map.images * call.map.classes * call.map.channels);
  call.room.ask(inverses, call.map.images * call.map.classes);
  call.room.take(x);
  const A* const prototypes = static_cast<const A*>(means.data_ptr());
  call.sums<A>(weights, slots);
  launch<rest_kernel<A>>({call.map.images * call.map.classes}, class_threads, block_sum_bytes, call.stream, call.map,
                         static_cast<const double*>(slots), prototypes, static_cast<const int64_t*>(counts.data_ptr()), rest,
                         inverses);
  call.combine<A>({prototypes, inverses, rest, weights});
}

static Tensor class_similarity_backward(
    const Tensor& x,           // [B, C, *S]
    const Tensor& target,      // [B, *S], contiguous
    const Tensor& similarity,  // [B, *S], contiguous, this and all that follow in the type of the arithmetic
    const Tensor& means,       // [B, K, C], contiguous
    const Tensor& counts,      // [B, K], int64, contiguous
    const Tensor& inverse,     // [B, *S], contiguous
    const Tensor& upstream,    // [B, *S]
    int64_t ignore_index) {
  ClassCall call(x, target, counts.size(1), ignore_index);
  const Gradient gradient = call.into_gradient(x);
  const Tensor dense = as_contiguous(upstream);
  const auto run = [&](auto zero) {
    using A = decltype(zero);
    similarity_backward<A>(call, x, means, counts,
                           {static_cast<const A*>(dense.data_ptr()), static_cast<const A*>(inverse.data_ptr()),
                            static_cast<const A*>(similarity.data_ptr())});
  };
  if (!call.empty()) call.type == ScalarType::Double ? run(double()) : run(float());
  return gradient.finish();
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("class_means_cuda", TORCH_BOX(&medkd::class_means));
  m.impl("class_means_backward_cuda", TORCH_BOX(&medkd::class_means_backward));
  m.impl("class_similarity_cuda", TORCH_BOX(&medkd::class_similarity));
  m.impl("class_similarity_backward_cuda", TORCH_BOX(&medkd::class_similarity_backward));
}
