#include "apply.h"
#include "pixel_call.h"
#include "products.h"
#include "team.h"

namespace medkd {

// For products.h: a set is an image, a unit is a channel, its rows are A = S - T and B = S + T.
template <typename A>
struct PixelRowsOfBoth {
  static constexpr int fetches = 2;
  static constexpr bool plain = false;
  Normalised<A> student, teacher;
  int64_t widest;

  __device__ __forceinline__ bool rows_inside(int64_t) const { return student.x.channels_inside(); }

  __device__ __forceinline__ void fetch(int64_t set, int64_t channel, int64_t pixel, int count, Raw (&raw)[2]) const {
    raw[0] = student.fetch(set, channel, pixel, count);
    raw[1] = teacher.fetch(set, channel, pixel, count);
  }

  template <typename To>
  __device__ __forceinline__ void stash(int64_t set, int64_t channel, int64_t pixel, int count, const Raw (&raw)[2],
                                        const To& to) const {
    const Pack<A, lanes<A>> s = student.made(set, channel, pixel, count, raw[0]);
    const Pack<A, lanes<A>> t = teacher.made(set, channel, pixel, count, raw[1]);
    Pack<A, lanes<A>> difference, sum;
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) {
      difference.value[k] = s.value[k] - t.value[k];
      sum.value[k] = s.value[k] + t.value[k];
    }
    store_pack(to(0), difference);
    store_pack(to(1), sum);
  }

  __device__ __forceinline__ int64_t row(const ProductPlan& plan, int tile, int r) const {
    const int64_t channel = int64_t{tile} * plan.tile_units + r % plan.tile_units;
    return r < plan.tile_rows && channel < widest ? r / plan.tile_units * widest + channel : -1;
  }
};

// For apply.h: the matrix [C, 2 widest] times [A; B], the rows of which are taken in turn, because both come from the same
// memory; then through the division by the norm.
template <typename A>
struct PixelGradient {
  static constexpr bool plain = false;
  Normalised<A> student, teacher;
  int64_t widest;
  PackedPlanes gradient;
  A* rest;           // [B, C, padded] for the gradient of the normalised student, where no block has all channels
  const A* factors;  // or nullptr
  int64_t factor_stride;

  __device__ __forceinline__ bool rows_inside() const { return student.x.channels_inside(); }
  __device__ __forceinline__ int64_t column(int64_t k) const { return k % 2 * widest + k / 2; }

  __device__ __forceinline__ Pack<A, lanes<A>> line(int64_t image, int64_t k, int64_t pixel, int count) const {
    Pack<A, lanes<A>> s = student.load(image, k / 2, pixel, count);
    const Pack<A, lanes<A>> t = teacher.load(image, k / 2, pixel, count);
#pragma unroll
    for (int i = 0; i < lanes<A>; ++i) s.value[i] = k % 2 == 0 ? s.value[i] - t.value[i] : s.value[i] + t.value[i];
    return s;
  }

  __device__ __forceinline__ void finish(int64_t image, int64_t first, int some, int64_t pixel, int length, A* tile,
                                         int stride) const {
    const A factor = factors == nullptr ? A(1) : factors[image * factor_stride];
    const auto times_factor = [&](int, int, Pack<A, lanes<A>>& pack) {
#pragma unroll
      for (int k = 0; k < lanes<A>; ++k) pack.value[k] *= factor;
    };
    if (rest != nullptr) {
      const PackedPlanes to({rest, sizeof(A) == 8 ? Type::float64 : Type::float32, student.channels * student.padded,
                             student.padded, 1}, lanes<A>);
      put_tile(to, image, first, some, pixel, length, tile, stride, times_factor);
      return;
    }
    through_norms(student, image, pixel, length, tile, stride);
    __syncthreads();
    put_tile(gradient, image, first, some, pixel, length, tile, stride, times_factor);
  }
};

constexpr int row_threads = 512, rows_per_block = 64;

// An image's weight in the loss over its pixels, for pairs of images.
__device__ __forceinline__ double share_of(const Images& counts, int64_t image, double weight) {
  return counts.pixels_of(image) > 0 ? weight / counts.at_least_one(image) : 0.0;
}

// A block takes 64 rows of an image's matrices. Across images the matrices are the images' own; the backward mixes them.
template <typename A>
__global__ void pixel_rows_kernel(const double* products,  // [B, 2 widest, 2 widest]
                                  Images counts, bool across_images, int64_t channels, int64_t widest,
                                  A* matrices,       // [B, channels, 2 widest]
                                  double* values) {  // [B, blocks of an image]
  double* const scratch = shared_memory<double>();
  const int64_t image = blockIdx.x, depth = 2 * widest;
  const BlockTeam team;
  const double weight = counts.weight(reinterpret_cast<int64_t*>(scratch));
  const double share = share_of(counts, image, weight);
  const double scale = across_images ? share : share / counts.at_least_one(image);
  const int64_t begin = blockIdx.y * int64_t{rows_per_block};
  const int64_t end = begin + rows_per_block < widest ? begin + rows_per_block : widest;
  double value = 0;
  for (int64_t i = begin + team.first_row; i < end; i += team.row_step)
    value += pixel_row(products + image * depth * depth, widest, i, scale,
                       i < channels ? matrices + (image * channels + i) * depth : nullptr, team);
  value = block_sum(value, scratch);
  if (threadIdx.x == 0) values[image * gridDim.y + blockIdx.y] = value * scale;
}

// total = the sum of the images' products, each times its share.
__global__ void shared_products_kernel(const double* products, Images counts, int64_t size, double* total) {
  const double weight = counts.weight(shared_memory<int64_t>());
  const int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (at >= size) return;
  double sum = 0;
  for (int64_t image = 0; image < counts.images; ++image) sum += share_of(counts, image, weight) * products[image * size + at];
  total[at] = sum;
}

// A block takes 64 rows of a pair of images; with `images` = 0, of the total with itself.
__global__ void pixel_pairs_kernel(const double* products, Images counts, int64_t images, int64_t widest, double* values) {
  double* const scratch = shared_memory<double>();
  const BlockTeam team;
  const int64_t pair = blockIdx.x / gridDim.y, size = 4 * widest * widest;
  double scale = 1;
  int64_t a = 0, b = 0;
  if (images > 0) {
    const double weight = counts.weight(reinterpret_cast<int64_t*>(scratch));
    a = pair / images;
    b = pair % images;
    scale = share_of(counts, a, weight) * share_of(counts, b, weight);
  }
  const int64_t begin = blockIdx.y * int64_t{rows_per_block};
  const int64_t end = begin + rows_per_block < widest ? begin + rows_per_block : widest;
  double value = 0;
  for (int64_t i = begin + team.first_row; i < end; i += team.row_step)
    value += pixel_pair_row(products + a * size, products + b * size, widest, i, team);
  value = block_sum(value, scratch);
  if (threadIdx.x == 0) values[pair * gridDim.y + blockIdx.y] = value * scale;
}

template <typename A>
static std::tuple<Tensor, Tensor> forward(const PixelCall& call, const Tensor& student, bool across_images,
                                          const std::string& reduction, cudaStream_t stream) {
  const int64_t images = call.images, depth = 2 * call.widest;
  const bool pairs = across_images && reduction == "none";
  const int64_t blocks = ceil_div(call.widest, rows_per_block);
  Tensor matrix = new_like(student, {images, call.channels, depth}, call.type);
  std::vector<int64_t> size;
  if (reduction == "none") size.assign(across_images ? 2 : 1, images);
  Tensor loss = new_like(student, size, call.type);

  const ProductPlan plan = product_plan<A>(images, call.pixels, call.widest, 2);
  NormMemory<A> norms;
  Room room;
  double *products = nullptr, *total = nullptr, *values = nullptr;
  A* partials = nullptr;
  norms.ask(room, call);
  room.ask(products, images * depth * depth);
  if (across_images) room.ask(total, depth * depth);
  room.ask(values, (pairs ? images * images : images + 1) * blocks);
  room.ask(partials, partial_size<A>(plan));
  room.take(student);

  const Images counts = norms.count(call, reduction == "mean", stream);
  const PixelRowsOfBoth<A> rows{norms.student(call, stream), norms.teacher(call, stream), call.widest};
  sum_products<A>(rows, plan, partials, products, stream);
  constexpr std::size_t shared = row_threads / warp_size * sizeof(double);
  launch<pixel_rows_kernel<A>>({images, blocks}, row_threads, shared, stream, products, counts,
                               across_images, call.channels, call.widest, static_cast<A*>(matrix.data_ptr()), values);
  if (!across_images) {
    reduce_values(values, images, blocks, reduction, loss, stream);
  } else if (pairs) {
    launch<pixel_pairs_kernel>({images * images, blocks}, row_threads, shared, stream, products,
                               counts, images, call.widest, values);
    reduce_values(values, images * images, blocks, reduction, loss, stream);
  } else {  // the value is quadratic in the sums: that of the images' weighted sum is the sum over all pairs
    launch<shared_products_kernel>({ceil_div(depth * depth, row_threads)},
                                   row_threads, shared, stream, products, counts, depth * depth, total);
    launch<pixel_pairs_kernel>({1, blocks}, row_threads, shared, stream, total, counts, int64_t{0}, call.widest,
                               values);
    reduce_values(values, 1, blocks, reduction, loss, stream);
  }
  return {loss, matrix};
}

// What each image's pixels are multiplied with: the sum over the images that it is related to.
template <typename A>
__global__ void mix_kernel(const A* in, Images counts, int64_t size, const A* upstream, int64_t stride_a, int64_t stride_b,
                           A* out) {
  const double weight = counts.weight(shared_memory<int64_t>());
  const int64_t at = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, a = blockIdx.y;
  if (at >= size) return;
  double sum = 0;
  for (int64_t b = 0; b < counts.images; ++b) {
    const double both_ways = static_cast<double>(upstream[a * stride_a + b * stride_b]) +
                             static_cast<double>(upstream[b * stride_a + a * stride_b]);
    sum += both_ways / 2 * static_cast<double>(in[b * size + at]);
  }
  out[a * size + at] = static_cast<A>(share_of(counts, a, weight) * sum);
}

template <typename A>
static Tensor backward(PixelCall& call, const Tensor& student, const Tensor& matrix, const Tensor& upstream,
                       bool across_images, const std::string& reduction, cudaStream_t stream) {
  const int64_t images = call.images, depth = 2 * call.widest, size = call.channels * depth;
  const A* matrices = static_cast<const A*>(matrix.data_ptr());
  const A* factors = static_cast<const A*>(upstream.data_ptr());
  const ApplyPlan plan = apply_plan<A>(images, call.pixels, call.channels, depth, matrices, size);
  NormMemory<A> norms;
  Room room;
  A *mixed = nullptr, *rest = nullptr;
  norms.ask(room, call);
  if (across_images) room.ask(mixed, images * size);
  if (plan.tiles > 1) room.ask(rest, images * call.channels * padded_pixels(call.pixels));
  room.take(student);

  const Images counts = norms.count(call, reduction == "mean", stream);
  if (across_images) {
    const int64_t stride_a = upstream.dim() > 0 ? upstream.stride(0) : 0;
    const int64_t stride_b = upstream.dim() > 0 ? upstream.stride(1) : 0;
    launch<mix_kernel<A>>({ceil_div(size, row_threads), images},
                          row_threads, row_threads / warp_size * sizeof(int64_t), stream, matrices, counts, size, factors,
                          stride_a, stride_b, mixed);
  }
  const Gradient gradient(student);
  const Planes written = planes_of(gradient.written, call.holder);
  const PixelGradient<A> source{norms.student(call, stream),
                                norms.teacher(call, stream),
                                call.widest,
                                {written, lanes<A>},
                                rest,
                                across_images ? nullptr : factors,
                                !across_images && upstream.dim() > 0 ? upstream.stride(0) : 0};
  ApplyPlan with = plan;
  if (across_images) with.matrices = mixed;
  apply_matrix<A>(source, with, stream);
  if (rest != nullptr) store_through_norms(source.student, rest, written, stream);
  return gradient.finish();
}

static std::tuple<Tensor, Tensor> pixel_relation(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::string& relation, bool across_images, const std::string& reduction) {
  const OnDevice device(student);
  const PixelCall call(student, teacher, mask, relation);
  return call.type == ScalarType::Double ? forward<double>(call, student, across_images, reduction, device.stream())
                                         : forward<float>(call, student, across_images, reduction, device.stream());
}

static Tensor pixel_relation_backward(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& matrix,               // [B, C, 2 * the larger C], contiguous, in the type of the arithmetic
    const Tensor& upstream,             // [], [B] or [B, B], in the type of the arithmetic
    const std::string& relation, bool across_images, const std::string& reduction) {
  const OnDevice device(student);
  PixelCall call(student, teacher, mask, relation);
  return call.type == ScalarType::Double
             ? backward<double>(call, student, matrix, upstream, across_images, reduction, device.stream())
             : backward<float>(call, student, matrix, upstream, across_images, reduction, device.stream());
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("pixel_relation_cuda", TORCH_BOX(&medkd::pixel_relation));
  m.impl("pixel_relation_backward_cuda", TORCH_BOX(&medkd::pixel_relation_backward));
}
