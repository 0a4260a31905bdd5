#include "channel_pass.h"

#include "apply.h"
#include "products.h"

namespace medkd {

ChannelCall::ChannelCall(const Tensor& student, const Tensor* teacher, const std::optional<Tensor>& mask,
                         const std::string& relation, double temperature, ScalarType type)
    : kind(kind_named(relation)),
      images(student.size(0)),
      channels(student.size(1)),
      pixels(pixels_of(student)),
      networks(teacher == nullptr ? 1 : 2),
      rows(channels + (is_shifted(kind) ? 1 : 0)),
      temperature(temperature),
      mask(mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr),
      type(type) {
  holder.reserve(2);
  network[0] = planes_of(student, holder);
  network[1] = teacher == nullptr ? network[0] : planes_of(*teacher, holder);
}

// One network's channels as they are multiplied; 0 at pixels that do not count.
template <typename A>
struct ChannelValues {
  Features features;
  const uint8_t* mask;
  int64_t pixels;
  A inverse_temperature;

  __device__ __forceinline__ A ones(unsigned counts, int k) const { return counts >> k & 1 ? A(1) : A(0); }

  __device__ __forceinline__ A made(A x, A shift, unsigned counts, int k) const {
    const A value = features == Features::plain     ? x
                    : features == Features::centred ? x - shift
                                                    : exp_nonpositive((x - shift) * inverse_temperature);
    return counts >> k & 1 ? value : A(0);
  }

  __device__ __forceinline__ unsigned counts(int64_t image, int64_t pixel, int count) const {
    return counted(mask == nullptr ? nullptr : mask + image * pixels, pixel, count);
  }
};

template <typename A>
static ChannelValues<A> values_of(const ChannelCall& call) {
  const Features features = call.kind == ChannelKind::pearson   ? Features::centred
                            : call.kind == ChannelKind::softmax ? Features::exponential
                                                                : Features::plain;
  return {features, call.mask, call.pixels, static_cast<A>(1 / call.temperature)};
}

// A set's image; a division by a number that is not known would stand in the loop over the pixels.
__device__ __forceinline__ int64_t image_of_set(int64_t set, int64_t networks) { return networks == 2 ? set / 2 : set; }

// Where row r of a tile lies in the matrix of products.
__device__ __forceinline__ int64_t row_of_products(const ProductPlan& plan, int tile, int r) {
  const int64_t row = int64_t{tile} * plan.tile_rows + r;
  return r < plan.tile_rows && row < plan.rows ? row : -1;
}

// For products.h: a set is a network of an image, a unit is a channel or, behind the last, the row of ones.
template <typename A>
struct ChannelRows {
  static constexpr int fetches = 1;
  static constexpr bool plain = false;
  ChannelValues<A> values;
  PackedPlanes network[2];
  int64_t networks, channels, all_rows;
  const A* shifts;  // [images, networks, channels]

  __device__ __forceinline__ int64_t image(int64_t set) const { return image_of_set(set, networks); }
  __device__ __forceinline__ const PackedPlanes& planes(int64_t set) const { return network[networks == 2 ? set % 2 : 0]; }
  __device__ __forceinline__ bool rows_inside(int64_t set) const { return planes(set).channels_inside(); }

  __device__ __forceinline__ void fetch(int64_t set, int64_t channel, int64_t pixel, int count, Raw (&raw)[1]) const {
    raw[0] = medkd::fetch<A>(planes(set), image(set), channel, pixel, channel < channels ? count : 0);
  }

  template <typename To>
  __device__ __forceinline__ void stash(int64_t set, int64_t channel, int64_t pixel, int count, const Raw (&raw)[1],
                                        const To& to) const {
    Pack<A, lanes<A>> pack = widen_raw<A>(planes(set).planes.type, raw[0]);
    const unsigned counts = values.counts(image(set), pixel, channel < all_rows ? count : 0);
    const A shift = shifts != nullptr && channel < channels ? shifts[set * channels + channel] : A(0);
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k)
      pack.value[k] = channel < channels ? values.made(pack.value[k], shift, counts, k) : values.ones(counts, k);
    store_pack(to(0), pack);
  }

  __device__ __forceinline__ static int64_t row(const ProductPlan& plan, int tile, int r) {
    return row_of_products(plan, tile, r);
  }
};

// The same where channels are multiplied as they are.
template <typename A>
struct PlainRows {
  static constexpr int fetches = 1;
  static constexpr bool plain = true;
  Planes network[2];
  int64_t networks;
  int units;

  __device__ __forceinline__ int64_t image(int64_t set) const { return image_of_set(set, networks); }
  __device__ __forceinline__ Planes planes(int64_t set) const {  // no choice of a struct, whose pointer might lead anywhere
    const bool second = networks == 2 && set % 2 != 0;
    const Planes &s = network[0], &t = network[1];
    return {second ? t.data : s.data, second ? t.type : s.type, second ? t.stride_b : s.stride_b,
            second ? t.stride_c : s.stride_c, 1};
  }

  __device__ __forceinline__ static int64_t row(const ProductPlan& plan, int tile, int r) {
    return row_of_products(plan, tile, r);
  }
};

// Whether channels are multiplied as they are and lie in whole packs, whose places in an image 32 bits number.
template <typename A>
static bool is_plain(const ChannelCall& call, const PackedPlanes& x) {
  return !is_shifted(call.kind) && call.mask == nullptr && x.packed && call.pixels % lanes<A> == 0 &&
         call.channels * x.planes.stride_c <= 0x7fffffff;
}

// For apply.h. The matrix's last row is what the channels are shifted by.
template <typename A>
struct ChannelGradient {
  static constexpr bool plain = false;
  ChannelValues<A> values;
  PackedPlanes x, gradient;
  int64_t channels, rows;
  const A* matrices;  // [images, rows, rows]
  const A* factors;   // or nullptr
  int64_t factor_stride;

  __device__ __forceinline__ bool rows_inside() const { return x.channels_inside(); }

  __device__ __forceinline__ int64_t column(int64_t channel) const { return channel; }

  __device__ __forceinline__ Pack<A, lanes<A>> line(int64_t image, int64_t channel, int64_t pixel, int count) const {
    const unsigned counts = values.counts(image, pixel, count);
    Pack<A, lanes<A>> pack{};
    if (channel == channels) {
#pragma unroll
      for (int k = 0; k < lanes<A>; ++k) pack.value[k] = values.ones(counts, k);
      return pack;
    }
    pack = widen_raw<A>(x.planes.type, fetch<A>(x, image, channel, pixel, count));
    const A shift = rows > channels ? matrices[(image * rows + channels) * rows + channel] : A(0);
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) pack.value[k] = values.made(pack.value[k], shift, counts, k);
    return pack;
  }

  __device__ __forceinline__ void finish(int64_t image, int64_t first, int some, int64_t pixel, int length, const A* tile,
                                         int stride) const {
    const A factor = factors == nullptr ? A(1) : factors[image * factor_stride];
    put_tile(gradient, image, first, some, pixel, length, tile, stride,
             [&](int row, int column, Pack<A, lanes<A>>& pack) {
               Pack<A, lanes<A>> times{};
               if (values.features == Features::exponential)
                 times = line(image, first + row, pixel + column, pixels_in_pack<A>(column, length));
#pragma unroll
               for (int k = 0; k < lanes<A>; ++k)
                 pack.value[k] *= factor * (values.features == Features::exponential ? times.value[k] : A(1));
             });
  }
};

template <typename A>
struct PlainGradient {
  static constexpr bool plain = true;
  Planes x, gradient;  // in whole packs
  const A* factors;    // or nullptr
  int64_t factor_stride;

  __device__ __forceinline__ const Planes& planes() const { return x; }
  __device__ __forceinline__ static int64_t column(int64_t channel) { return channel; }

  __device__ __forceinline__ void finish(int64_t image, int64_t first, int some, int64_t pixel, int length, const A* tile,
                                         int stride) const {
    constexpr int width = lanes<A>;
    const A factor = factors == nullptr ? A(1) : factors[image * factor_stride];
    with_type<A>(gradient.type, [&](auto zero) {
      using T = decltype(zero);
      T* const to = static_cast<T*>(gradient.data) + image * gradient.stride_b + first * gradient.stride_c + pixel;
      Walk walk(some, length / width, false, static_cast<int>(threadIdx.x), apply_threads);
      for (; walk.inside(); walk.next()) {
        const Pack<A, width> values = load_pack<width>(tile + walk.row() * stride + walk.pack() * width);
        Pack<T, width> out;
#pragma unroll
        for (int k = 0; k < width; ++k) narrow(values.value[k] * factor, out.value[k]);
        store_whole(to + walk.row() * gradient.stride_c + walk.pack() * width, out);
      }
    });
  }
};

template <typename A>
__device__ __forceinline__ A value_at(const PackedPlanes& x, int64_t image, int64_t channel, int64_t pixel) {
  PackedPlanes single = x;
  single.packed = false;
  return widen_raw<A>(x.planes.type, fetch<A>(single, image, channel, pixel, 1)).value[0];
}

// Nearly the means, for channels that lose theirs: of the first pixel that counts in each of 64 parts of the image. It need
// only be near: what is left of the mean comes with the sums. A block a set.
constexpr int samples = 64, sample_threads = 512;

template <typename A>
__global__ void sample_means_kernel(const ChannelRows<A> rows, A* shifts) {
  int64_t* const chosen = shared_memory<int64_t>();  // [samples], -1 where no pixel counts
  const int64_t set = blockIdx.x, image = rows.image(set), pixels = rows.values.pixels;
  const uint8_t* const mask = rows.values.mask == nullptr ? nullptr : rows.values.mask + image * pixels;
  constexpr int warps = sample_threads / warp_size;
  for (int sample = warp_index(); sample < samples; sample += warps) {
    const int64_t begin = sample * pixels / samples, end = (sample + 1) * pixels / samples;
    int64_t found = -1;
    for (int64_t start = begin; start < end && found < 0; start += warp_size) {
      const int64_t pixel = start + lane_index();
      const unsigned votes = __ballot_sync(all_lanes, pixel < end && (mask == nullptr || mask[pixel] != 0));
      for (int lane = warp_size - 1; lane >= 0; --lane)
        if (votes >> lane & 1) found = start + lane;
    }
    if (lane_index() == 0) chosen[sample] = found;
  }
  __syncthreads();
  for (int64_t channel = warp_index(); channel < rows.channels; channel += warps) {
    double sum = 0, number = 0;
    for (int sample = lane_index(); sample < samples; sample += warp_size)
      if (chosen[sample] >= 0) {
        sum += static_cast<double>(value_at<A>(rows.planes(set), image, channel, chosen[sample]));
        number += 1;
      }
    sum = warp_sum(sum);
    number = warp_sum(number);
    if (lane_index() == 0) shifts[set * rows.channels + channel] = static_cast<A>(number > 0 ? sum / number : 0.0);
  }
}

// The largest value of every channel in a part of a set's pixels, -infinity where none counts: [sets, parts, channels].
constexpr int highest_threads = 256;

template <typename A>
__global__ void highest_kernel(const ChannelRows<A> rows, int64_t parts, int64_t part_pixels, A* highest) {
  const int64_t set = blockIdx.x / parts, image = rows.image(set), pixels = rows.values.pixels;
  const int64_t begin = blockIdx.x % parts * part_pixels;
  const int64_t end = begin + part_pixels < pixels ? begin + part_pixels : pixels;
  const PackedPlanes& x = rows.planes(set);
  // neighbouring threads read neighbouring elements: a warp a channel, or a thread
  const bool inside = x.channels_inside();
  const int group = inside ? 1 : warp_size, member = static_cast<int>(threadIdx.x) % group;
  const int groups = highest_threads / group;
  for (int64_t channel = static_cast<int>(threadIdx.x) / group; channel < rows.channels; channel += groups) {
    A most = -infinity<A>();
#pragma unroll 4
    for (int64_t pixel = begin + member * lanes<A>; pixel < end; pixel += group * lanes<A>) {
      const int count = pixels_in_pack<A>(pixel, end);
      const Pack<A, lanes<A>> pack = widen_raw<A>(x.planes.type, fetch<A>(x, image, channel, pixel, count));
      const unsigned counts = rows.values.counts(image, pixel, count);
#pragma unroll
      for (int k = 0; k < lanes<A>; ++k)
        most = (counts >> k & 1) && pack.value[k] > most ? pack.value[k] : most;
    }
    if (!inside) most = warp_max(most);
    if (member == 0) highest[blockIdx.x * rows.channels + channel] = most;
  }
}

template <typename A>
__global__ void highest_of_parts_kernel(const A* highest, int64_t sets, int64_t parts, int64_t channels, A* shifts) {
  const int64_t at = blockIdx.x * int64_t{highest_threads} + threadIdx.x;
  if (at >= sets * channels) return;
  const A* const from = highest + at / channels * parts * channels + at % channels;
  A most = -infinity<A>();
#pragma unroll 4
  for (int64_t part = 0; part < parts; ++part) most = from[part * channels] > most ? from[part * channels] : most;
  shifts[at] = most;
}

template <typename A>
static ChannelProducts products_as(const ChannelCall& call, bool mean, Room& room, const Tensor& like, cudaStream_t stream) {
  constexpr int64_t part_pixels = 4096;
  const int64_t sets = call.images * call.networks, channels = call.channels;
  const int64_t parts = std::max<int64_t>(ceil_div(call.pixels, part_pixels), 1);
  const ProductPlan plan = product_plan<A>(sets, call.pixels, call.rows, 1);
  int64_t* valid = nullptr;
  double* products = nullptr;
  A *partials = nullptr, *shifts = nullptr, *highest = nullptr;
  if (call.mask != nullptr) room.ask(valid, call.images);
  room.ask(products, sets * call.rows * call.rows);
  room.ask(partials, partial_size<A>(plan));
  if (is_shifted(call.kind)) room.ask(shifts, sets * channels);
  if (call.kind == ChannelKind::softmax) room.ask(highest, sets * parts * channels);
  room.take(like);

  if (call.mask != nullptr) count_valid(call.mask, call.images, call.pixels, valid, stream);
  const ChannelRows<A> rows{values_of<A>(call),
                            {{call.network[0], lanes<A>}, {call.network[1], lanes<A>}},
                            call.networks,
                            channels,
                            call.rows,
                            shifts};
  if (call.kind == ChannelKind::pearson)
    launch<sample_means_kernel<A>>({sets}, sample_threads, samples * sizeof(int64_t), stream,
                                   rows, shifts);
  if (call.kind == ChannelKind::softmax) {
    launch<highest_kernel<A>>({sets * parts}, highest_threads, 0, stream, rows, parts,
                              part_pixels, highest);
    launch<highest_of_parts_kernel<A>>(
        {ceil_div(sets * channels, highest_threads)}, highest_threads, 0, stream,
        highest, sets, parts, channels, shifts);
  }
  if (is_plain<A>(call, rows.network[0]) && is_plain<A>(call, rows.network[1]))
    sum_products<A>(PlainRows<A>{{call.network[0], call.network[1]}, call.networks, static_cast<int>(channels)}, plan, partials,
                    products, stream);
  else
    sum_products<A>(rows, plan, partials, products, stream);
  return {{valid, call.images, call.pixels, mean}, products, shifts};
}

ChannelProducts channel_products(const ChannelCall& call, bool mean, Room& room, const Tensor& like,
                                 cudaStream_t stream) {
  return call.type == ScalarType::Double ? products_as<double>(call, mean, room, like, stream)
                                         : products_as<float>(call, mean, room, like, stream);
}

template <typename A>
static void gradient_as(const ChannelCall& call, const Planes& gradient, const void* matrix, const void* factors,
                        int64_t factor_stride, cudaStream_t stream) {
  const ChannelGradient<A> source{values_of<A>(call),
                                  {call.network[0], lanes<A>},
                                  {gradient, lanes<A>},
                                  call.channels,
                                  call.rows,
                                  static_cast<const A*>(matrix),
                                  static_cast<const A*>(factors),
                                  factor_stride};
  const ApplyPlan plan =
      apply_plan<A>(call.images, call.pixels, call.channels, call.rows, matrix, call.rows * call.rows);
  if (is_plain<A>(call, source.x) && source.gradient.packed)
    apply_matrix<A>(PlainGradient<A>{call.network[0], gradient, source.factors, factor_stride}, plan, stream);
  else
    apply_matrix<A>(source, plan, stream);
}

void channel_gradient(const ChannelCall& call, const Planes& gradient, const void* matrix, const void* factors,
                      int64_t factor_stride, cudaStream_t stream) {
  if (call.type == ScalarType::Double)
    return gradient_as<double>(call, gradient, matrix, factors, factor_stride, stream);
  gradient_as<float>(call, gradient, matrix, factors, factor_stride, stream);
}

}  // namespace medkd
