// spatial_kl: rows are channels over their pixels. One pass takes pieces of every row, a warp a row joins its pieces, and
// the rows' values are added up; the gradient is one more pass. Derivation: medkd_fast/reference/spatial_kl.py.
//
// Where a channel's pixels lie side by side a block takes a piece of one row, 16 pixels a thread, all in registers: first the
// piece's maxima, then the exponentials. Where channels lie side by side neighbouring threads take neighbouring channels,
// and each goes over its pixels with running maxima. Logits are in units of 1 / log2(e), see exp2_nonpositive.
#include "../math/spatial_kl.h"

#include <algorithm>
#include <type_traits>

#include "images.h"
#include "pixel_norms.h"
#include "pixels.h"
#include "planes.h"
#include "room.h"

namespace medkd {

constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;
constexpr int row_threads = 256, row_packs = 4;
// Where channels lie side by side: a thread's pixels in a piece, five or ten times what it loads at once.
constexpr int channel_pixels = 60;
template <typename A>
constexpr int channel_batch = 3 * lanes<A>;
// On a multiprocessor. Left alone, the compiler spills a few registers to fit one more.
template <typename A>
constexpr int least_blocks = sizeof(A) == sizeof(float) ? 2 : 1;

struct SpatialCall {
  PackedPlanes student, teacher;
  const uint8_t* mask;  // [B, N] or nullptr
  int64_t images, channels, pixels;
  double to_base_2;
  int threads;       // of a block
  int width;         // neighbouring threads with channels of their own: a power of two; 0: a block has one channel
  int64_t piece;     // pixels of a piece
  int64_t pieces;    // of a row
  int64_t groups;    // blocks for the channels of a piece, where they lie side by side

  int64_t rows() const { return images * channels; }
  Blocks grid() const { return {width == 0 ? rows() * pieces : images * pieces * groups}; }
};

// What of which row a block takes, or, where channels lie side by side, a thread.
struct Piece {
  int64_t image, channel, index, first, end;
  int step;  // from one of the thread's pixels to the next, where channels lie side by side

  __device__ explicit Piece(const SpatialCall& call) {
    int64_t rest = blockIdx.x;
    if (call.width == 0) {
      index = rest % call.pieces;
      rest /= call.pieces;
      channel = rest % call.channels;
      image = rest / call.channels;
      step = 0;
    } else {
      const int thread = static_cast<int>(threadIdx.x);
      channel = rest % call.groups * call.width + thread % call.width;
      rest /= call.groups;
      index = rest % call.pieces;
      image = rest / call.pieces;
      step = call.threads / call.width;
    }
    first = index * call.piece;
    end = call.pixels - first < call.piece ? call.pixels : first + call.piece;
  }

  __device__ __forceinline__ int64_t row(const SpatialCall& call) const { return image * call.channels + channel; }
};

// The first pixel of a thread's pack.
template <typename A>
__device__ __forceinline__ int64_t pixel_of_pack(const Piece& piece, int pack) {
  return piece.first + (pack * int64_t{blockDim.x} + threadIdx.x) * lanes<A>;
}

// A thread's pixels of a row whose pixels lie side by side, -infinity where they do not count.
template <typename A>
__device__ __forceinline__ void load_row(const SpatialCall& call, const Piece& piece, A (&s)[row_packs * lanes<A>],
                                         A (&t)[row_packs * lanes<A>]) {
  const A scale = static_cast<A>(call.to_base_2);
  Raw raw_s[row_packs], raw_t[row_packs];
#pragma unroll
  for (int pack = 0; pack < row_packs; ++pack) {
    const int64_t pixel = pixel_of_pack<A>(piece, pack);
    const int count = pixels_in_pack<A>(pixel, piece.end);
    raw_s[pack] = fetch<A>(call.student, piece.image, piece.channel, pixel, count);
    raw_t[pack] = fetch<A>(call.teacher, piece.image, piece.channel, pixel, count);
  }
#pragma unroll
  for (int pack = 0; pack < row_packs; ++pack) {
    const int64_t pixel = pixel_of_pack<A>(piece, pack);
    const uint8_t* const mask = call.mask == nullptr ? nullptr : call.mask + piece.image * call.pixels;
    const unsigned counts = counted(mask, pixel, pixels_in_pack<A>(pixel, piece.end));
    const Pack<A, lanes<A>> wide_s = widen_raw<A>(call.student.planes.type, raw_s[pack]);
    const Pack<A, lanes<A>> wide_t = widen_raw<A>(call.teacher.planes.type, raw_t[pack]);
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) {
      const bool there = counts >> k & 1;
      s[pack * lanes<A> + k] = there ? rounded_product(wide_s.value[k], scale) : -infinity<A>();
      t[pack * lanes<A> + k] = there ? rounded_product(wide_t.value[k], scale) : -infinity<A>();
    }
  }
}

// Pixels from, from + step, ... of a thread's channel: bit k where the k-th counts.
template <typename A>
__device__ __forceinline__ unsigned counted_in_channel(const SpatialCall& call, const Piece& piece, int64_t from) {
  unsigned counts = 0;
#pragma unroll
  for (int k = 0; k < channel_batch<A>; ++k) {
    const int64_t pixel = from + k * piece.step;
    const bool inside = piece.channel < call.channels && pixel < piece.end;
    if (inside && (call.mask == nullptr || call.mask[piece.image * call.pixels + pixel] != 0)) counts |= 1u << k;
  }
  return counts;
}

// An element as it lies in memory.
template <typename A>
using Bits = std::conditional_t<sizeof(A) == sizeof(double), uint64_t, uint32_t>;

// Both networks' are on their way before the first is waited for.
template <typename A>
__device__ __forceinline__ void fetch_channel(const Planes& x, const Piece& piece, int64_t from, unsigned counts,
                                              Bits<A> (&raw)[channel_batch<A>]) {
  const int64_t offset = offset_of(x, piece.image, from) + piece.channel * x.stride_c;
  with_type<A>(x.type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= sizeof(A)) {  // the arithmetic is never narrower than what it is made with
      const T* at = static_cast<const T*>(x.data) + offset;
#pragma unroll
      for (int k = 0; k < channel_batch<A>; ++k) {
        T value{};
        if (counts >> k & 1) value = at[k * piece.step * x.stride_n];
        Bits<A> bits = 0;
        memcpy(&bits, &value, sizeof value);
        raw[k] = bits;
      }
    }
  });
}

template <typename A>
__device__ __forceinline__ void widen_channel(Type type, A scale, unsigned counts,
                                              const Bits<A> (&raw)[channel_batch<A>], A (&u)[channel_batch<A>]) {
  with_type<A>(type, [&](auto zero) {
    using T = decltype(zero);
    if constexpr (sizeof(T) <= sizeof(A)) {
#pragma unroll
      for (int k = 0; k < channel_batch<A>; ++k) {
        const Bits<A> bits = raw[k];
        T value;
        memcpy(&value, &bits, sizeof value);
        u[k] = counts >> k & 1 ? rounded_product(static_cast<A>(widen(value)), scale) : -infinity<A>();
      }
    }
  });
}

// A thread's next pixels of its channel, -infinity where they do not count.
template <typename A>
__device__ __forceinline__ void load_channel(const SpatialCall& call, const Piece& piece, int64_t from,
                                             A (&s)[channel_batch<A>], A (&t)[channel_batch<A>]) {
  const A scale = static_cast<A>(call.to_base_2);
  const unsigned counts = counted_in_channel<A>(call, piece, from);
  Bits<A> raw_s[channel_batch<A>], raw_t[channel_batch<A>];
  fetch_channel<A>(call.student.planes, piece, from, counts, raw_s);
  fetch_channel<A>(call.teacher.planes, piece, from, counts, raw_t);
  widen_channel<A>(call.student.planes.type, scale, counts, raw_s, s);
  widen_channel<A>(call.teacher.planes.type, scale, counts, raw_t, t);
}

template <int count, typename A>
__device__ __forceinline__ A largest(const A (&u)[count], A most) {
#pragma unroll
  for (int k = 0; k < count; ++k) most = u[k] > most ? u[k] : most;
  return most;
}

// The sums of a RowPiece, relative to these maxima.
template <typename A>
struct Sums {
  A s = A(0), t = A(0), weighted = A(0);

  template <int count>
  __device__ __forceinline__ void add(const A (&u_s)[count], const A (&u_t)[count], A max_s, A max_t) {
    const A from_s = max_s == -infinity<A>() ? A(0) : max_s, from_t = max_t == -infinity<A>() ? A(0) : max_t;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const A x_s = u_s[k] - from_s, x_t = u_t[k] - from_t, e_t = exp2_nonpositive(x_t);
      s += exp2_nonpositive(x_s);
      t += e_t;
      weighted += weighted_difference(e_t, x_t, x_s);
    }
  }
};

__device__ __forceinline__ RowPiece nothing() { return {-infinity<double>(), 0, -infinity<double>(), 0, 0}; }

template <typename A>
__global__ void __launch_bounds__(row_threads) pieces_of_rows_kernel(const SpatialCall call,
                                                                     RowPiece* pieces) {  // [B, C, pieces]
  const int warps = static_cast<int>(blockDim.x) / warp_size;
  double* const scratch = shared_memory<double>();  // [3, warps], then the maxima [2, warps]
  A* const maxima = reinterpret_cast<A*>(scratch + 3 * warps);
  const Piece piece(call);
  A s[row_packs * lanes<A>], t[row_packs * lanes<A>];
  load_row(call, piece, s, t);
  A max_s = warp_max(largest(s, -infinity<A>())), max_t = warp_max(largest(t, -infinity<A>()));
  if (lane_index() == 0) {
    maxima[warp_index()] = max_s;
    maxima[warps + warp_index()] = max_t;
  }
  __syncthreads();
  for (int warp = 0; warp < warps; ++warp) {
    max_s = maxima[warp] > max_s ? maxima[warp] : max_s;
    max_t = maxima[warps + warp] > max_t ? maxima[warps + warp] : max_t;
  }
  Sums<A> sums;
  sums.add(s, t, max_s, max_t);
  const double sum_s = block_sum(static_cast<double>(sums.s), scratch);
  const double sum_t = block_sum(static_cast<double>(sums.t), scratch + warps);
  const double weighted = block_sum(static_cast<double>(sums.weighted), scratch + 2 * warps);
  if (threadIdx.x == 0)
    pieces[piece.row(call) * call.pieces + piece.index] = {static_cast<double>(max_s) * ln_2, sum_s,
                                                           static_cast<double>(max_t) * ln_2, sum_t, weighted * ln_2};
}

template <typename A>
__global__ void __launch_bounds__(row_threads, least_blocks<A>)
    pieces_of_channels_kernel(const SpatialCall call, RowPiece* pieces) {  // [B, C, pieces]
  RowPiece* const shared = shared_memory<RowPiece>();  // [members, width]
  const Piece piece(call);
  const int thread = static_cast<int>(threadIdx.x), member = thread / call.width;
  RowPiece own = nothing();
  A max_s = -infinity<A>(), max_t = -infinity<A>();
  for (int64_t n = piece.first + member; n < piece.end; n += channel_batch<A> * piece.step) {
    A s[channel_batch<A>], t[channel_batch<A>];
    load_channel(call, piece, n, s, t);
    const A most_s = largest(s, max_s), most_t = largest(t, max_t);
    if (most_s > max_s || most_t > max_t) {  // seldom after the first pixels
      raise_maxima(own, static_cast<double>(most_s) * ln_2, static_cast<double>(most_t) * ln_2);
      max_s = most_s;
      max_t = most_t;
    }
    Sums<A> sums;
    sums.add(s, t, max_s, max_t);
    own.sum_s += static_cast<double>(sums.s);
    own.sum_t += static_cast<double>(sums.t);
    own.weighted += static_cast<double>(sums.weighted) * ln_2;
  }
  shared[thread] = own;
  for (int half = piece.step / 2; half > 0; half /= 2) {
    __syncthreads();
    if (member < half) join(shared[thread], shared[thread + half * call.width]);
  }
  if (member == 0 && piece.channel < call.channels)
    pieces[piece.row(call) * call.pieces + piece.index] = shared[thread];
}

// A warp a row: every lane joins each 32nd piece, then the lanes are joined.
template <typename A>
__global__ void __launch_bounds__(row_threads)
    join_pieces_kernel(const RowPiece* pieces, int64_t count, int64_t channels, double temperature, Images counts,
                       A* rows,           // [B, C, 4]
                       double* values) {  // [B, C]
  const double image_weight = counts.weight(shared_memory<int64_t>());
  const int64_t k = blockIdx.x * int64_t{row_threads / warp_size} + warp_index();
  if (k >= counts.images * channels) return;
  RowPiece row = nothing();
  for (int64_t i = lane_index(); i < count; i += warp_size) join(row, pieces[k * count + i]);
#pragma unroll
  for (int distance = warp_size / 2; distance > 0; distance /= 2)
    join(row, {__shfl_xor_sync(all_lanes, row.max_s, distance), __shfl_xor_sync(all_lanes, row.sum_s, distance),
               __shfl_xor_sync(all_lanes, row.max_t, distance), __shfl_xor_sync(all_lanes, row.sum_t, distance),
               __shfl_xor_sync(all_lanes, row.weighted, distance)});
  if (lane_index() != 0) return;
  const double weight = counts.pixels_of(k / channels) == 0 ? 0.0
                        : counts.mean                       ? image_weight / static_cast<double>(channels)
                                                            : image_weight;
  values[k] = weight == 0 ? 0.0 : weight * temperature * temperature * divergence_of_row(row);
  A* const out = rows + 4 * k;
  out[0] = static_cast<A>(row.sum_s > 0 ? row.max_s * log2_e : 0.0);
  out[1] = static_cast<A>(row.sum_t * inverse_of_sum(row.sum_s));
  out[2] = static_cast<A>(row.sum_t > 0 ? row.max_t * log2_e : 0.0);
  // without a pixel in the teacher's row its value is constantly 0
  out[3] = static_cast<A>(weight * temperature * inverse_of_sum(row.sum_t));
}

// upstream[image * stride_b + channel * stride_c]
template <typename A>
struct Upstream {
  const A* values;
  int64_t stride_b, stride_c;
};

// Exactly 0 where both networks' rows are equal, whose ratio is 1.
template <typename A>
struct RowGradient {
  A max_s, ratio, max_t, scale;

  __device__ __forceinline__ RowGradient(const A* of, const Upstream<A>& upstream, const Piece& piece)
      : max_s(of[0]),
        ratio(of[1]),
        max_t(of[2]),
        scale(of[3] * upstream.values[piece.image * upstream.stride_b + piece.channel * upstream.stride_c]) {}

  __device__ __forceinline__ A operator()(A u_s, A u_t) const {
    return scale * (rounded_product(ratio, exp2_nonpositive(u_s - max_s)) - exp2_nonpositive(u_t - max_t));
  }
};

template <typename A>
__global__ void __launch_bounds__(row_threads)
    gradient_of_rows_kernel(const SpatialCall call, const A* rows, const Upstream<A> upstream, const PackedPlanes gradient) {
  const Piece piece(call);
  const RowGradient<A> of_row(rows + 4 * piece.row(call), upstream, piece);
  A s[row_packs * lanes<A>], t[row_packs * lanes<A>];
  load_row(call, piece, s, t);
#pragma unroll
  for (int pack = 0; pack < row_packs; ++pack) {
    const int64_t pixel = pixel_of_pack<A>(piece, pack);
    Pack<A, lanes<A>> out;
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) out.value[k] = of_row(s[pack * lanes<A> + k], t[pack * lanes<A> + k]);
    put<A>(gradient, piece.image, piece.channel, pixel, pixels_in_pack<A>(pixel, piece.end), out);
  }
}

template <typename A>
__global__ void __launch_bounds__(row_threads, least_blocks<A>)
    gradient_of_channels_kernel(const SpatialCall call, const A* rows, const Upstream<A> upstream, const Planes gradient) {
  const Piece piece(call);
  if (piece.channel >= call.channels) return;
  const RowGradient<A> of_row(rows + 4 * piece.row(call), upstream, piece);
  const int member = static_cast<int>(threadIdx.x) / call.width;
  for (int64_t n = piece.first + member; n < piece.end; n += channel_batch<A> * piece.step) {
    A s[channel_batch<A>], t[channel_batch<A>];
    load_channel(call, piece, n, s, t);
    const int64_t offset = offset_of(gradient, piece.image, n) + piece.channel * gradient.stride_c;
    with_type<A>(gradient.type, [&](auto zero) {
      auto* to = static_cast<decltype(zero)*>(gradient.data) + offset;
#pragma unroll
      for (int k = 0; k < channel_batch<A>; ++k)
        if (n + k * piece.step < piece.end) narrow(of_row(s[k], t[k]), to[k * piece.step * gradient.stride_n]);
    });
  }
}

template <typename A>
static SpatialCall spatial_call(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                double temperature, std::vector<Tensor>& holder) {
  SpatialCall call{};
  call.student = PackedPlanes(planes_of(student, holder), lanes<A>);
  call.teacher = PackedPlanes(planes_of(teacher, holder), lanes<A>);
  call.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  call.images = student.size(0);
  call.channels = student.size(1);
  call.pixels = pixels_of(student);
  call.to_base_2 = log2_e / temperature;
  if (call.student.channels_inside()) {
    call.threads = row_threads;
    for (call.width = 1; call.width < warp_size && call.width < call.channels;) call.width *= 2;
    call.groups = ceil_div(call.channels, call.width);
    call.piece = int64_t{row_threads / call.width} * channel_pixels;
  } else {
    constexpr int64_t own = row_packs * lanes<A>;
    const int64_t warps = ceil_div(call.pixels, own * warp_size);
    call.threads = static_cast<int>(std::clamp<int64_t>(warps, 1, row_threads / warp_size)) * warp_size;
    call.piece = call.threads * own;
  }
  call.pieces = ceil_div(call.pixels, call.piece);
  return call;
}

template <typename A>
static std::tuple<Tensor, Tensor> forward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask,
                                          double temperature, const std::string& reduction, ScalarType type,
                                          cudaStream_t stream) {
  std::vector<Tensor> holder;
  holder.reserve(2);
  const SpatialCall call = spatial_call<A>(student, teacher, mask, temperature, holder);
  Tensor rows = new_like(student, {call.images, call.channels, 4}, type);
  std::vector<int64_t> size;
  if (reduction == "none") size = {call.images, call.channels};
  Tensor loss = new_like(student, size, type);
  Room room;
  RowPiece* pieces = nullptr;
  double* values = nullptr;
  int64_t* valid = nullptr;
  room.ask(pieces, call.rows() * call.pieces);
  room.ask(values, call.rows());
  if (call.mask != nullptr) room.ask(valid, call.images);
  room.take(student);

  if (valid != nullptr) count_valid(call.mask, call.images, call.pixels, valid, stream);
  const int warps = call.threads / warp_size;
  if (call.width == 0)
    launch<pieces_of_rows_kernel<A>>(call.grid(), call.threads, warps * (3 * sizeof(double) + 2 * sizeof(A)), stream, call,
                                     pieces);
  else
    launch<pieces_of_channels_kernel<A>>(call.grid(), call.threads, row_threads * sizeof(RowPiece), stream, call, pieces);
  constexpr int rows_of_block = row_threads / warp_size;
  launch<join_pieces_kernel<A>>({ceil_div(call.rows(), rows_of_block)}, row_threads,
                                rows_of_block * sizeof(int64_t), stream, pieces, call.pieces, call.channels, temperature,
                                Images{valid, call.images, call.pixels, reduction == "mean"},
                                static_cast<A*>(rows.data_ptr()), values);
  reduce_values(values, call.rows(), 1, reduction, loss, stream);
  return {loss, rows};
}

template <typename A>
static Tensor backward(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask, const Tensor& rows,
                       const Tensor& upstream, double temperature, cudaStream_t stream) {
  std::vector<Tensor> holder;
  holder.reserve(3);
  const SpatialCall call = spatial_call<A>(student, teacher, mask, temperature, holder);
  const Gradient gradient(student);
  const Planes written = planes_of(gradient.written, holder);
  const A* const of_rows = static_cast<const A*>(rows.data_ptr());
  const bool each = upstream.dim() > 0;
  const Upstream<A> arriving{static_cast<const A*>(upstream.data_ptr()), each ? upstream.stride(0) : 0,
                             each ? upstream.stride(1) : 0};
  if (call.width == 0)
    launch<gradient_of_rows_kernel<A>>(call.grid(), call.threads, 0, stream, call, of_rows, arriving,
                                       PackedPlanes(written, lanes<A>));
  else
    launch<gradient_of_channels_kernel<A>>(call.grid(), call.threads, 0, stream, call, of_rows, arriving, written);
  return gradient.finish();
}

static std::tuple<Tensor, Tensor> spatial_kl(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    double temperature, const std::string& reduction) {
  const OnDevice device(student);
  const ScalarType type = arithmetic_type(student, teacher);
  return type == ScalarType::Double
             ? forward<double>(student, teacher, mask, temperature, reduction, type, device.stream())
             : forward<float>(student, teacher, mask, temperature, reduction, type, device.stream());
}

static Tensor spatial_kl_backward(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& rows,                 // [B, C, 4], contiguous, as the forward left them
    const Tensor& upstream,             // [] or [B, C], in the type of the arithmetic
    double temperature) {
  const OnDevice device(student);
  return arithmetic_type(student, teacher) == ScalarType::Double
             ? backward<double>(student, teacher, mask, rows, upstream, temperature, device.stream())
             : backward<float>(student, teacher, mask, rows, upstream, temperature, device.stream());
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("spatial_kl_cuda", TORCH_BOX(&medkd::spatial_kl));
  m.impl("spatial_kl_backward_cuda", TORCH_BOX(&medkd::spatial_kl_backward));
}
