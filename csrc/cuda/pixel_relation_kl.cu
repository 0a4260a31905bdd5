// pixel_relation with divergence "kl". A block keeps 128 pixels and passes over all columns, as flash attention does, for
// both networks at once: in the forward the sums of its rows' softmaxes, in the backward the gradient. A tile's numbers are
// made twice, once for its rows and once for its columns, and no block needs another's.
#include "pixel_call.h"
#include "pixel_pairs.h"

namespace medkd {

// The logits' maxima, 1 / the sums of e^(logit - maximum), for the student, then for the teacher.
enum RowState { max_s, inverse_s, max_t, inverse_t, row_states };

struct PairSettings {
  double scale;   // 1 / temperature
  bool bounded;   // logits are at most `scale`, and e^(-2 scale) is a normal number: `scale` serves as every maximum
  bool across_images;
  int64_t images, channels, pixels, padded;
  Images counts;

  __host__ __device__ int64_t columns() const { return across_images ? images : 1; }
  // The place of the rows of image a in their relations to image b.
  __device__ __forceinline__ int64_t rows_at(int64_t a, int64_t b) const { return across_images ? a * images + b : a; }
};

// e^(scale x - scale) for |x| <= 1.
__device__ __forceinline__ float bounded_exponential(float x, float scale) {
#if MEDKD_DEVICE_CODE
  const float of_two = scale * 1.44269504088896341f;
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(fmaf(x, of_two, -of_two)));
  return power;
#else
  return exp_nonpositive(scale * (x - 1));  // without a fused multiply-add, exact near 1
#endif
}
__device__ __forceinline__ double bounded_exponential(double x, double scale) { return exp(scale * (x - 1)); }

// x[m], summed over the eight threads of a row: each thread gets the total of one row (with double, two get the same). In
// double: a row that is nearly one-hot has a sum near 1, and a divergence far below.
template <typename A>
__device__ __forceinline__ double spread_sum(const A (&x)[reach<A>], int column) {
  double rest[reach<A>];
#pragma unroll
  for (int m = 0; m < reach<A>; ++m) rest[m] = static_cast<double>(x[m]);
#pragma unroll
  for (int distance = tile_side / 2; distance > 0; distance /= 2) {
    const int count = reach<A> * 2 * distance / tile_side;  // rows that are left
    if (count > 1) {
      const bool upper = (column & distance) != 0;
#pragma unroll
      for (int m = 0; m < reach<A> / 2; ++m)
        if (m < count / 2) {
          const double sent = upper ? rest[m] : rest[m + count / 2], kept = upper ? rest[m + count / 2] : rest[m];
          rest[m] = kept + __shfl_xor_sync(all_lanes, sent, distance);
        }
    } else {
      rest[0] += __shfl_xor_sync(all_lanes, rest[0], distance);
    }
  }
  return rest[0];
}

// The square's row whose total spread_sum gives a thread.
template <typename A>
__device__ __forceinline__ int own_row(int column) {
  return column * reach<A> / tile_side;
}

template <typename A>
__device__ __forceinline__ A row_most(A x) {
#pragma unroll
  for (int distance = tile_side / 2; distance > 0; distance /= 2) {
    const A other = __shfl_xor_sync(all_lanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// What a row's softmaxes leave behind, as far as the columns have been seen.
struct RowSums {
  double sum_s = 0, sum_t = 0, weighted = 0;
};

// With `scale` as every maximum.
template <typename A>
__device__ __forceinline__ void add_bounded(const PairMatrix<A>& student, const Square<A>& t, A scale, unsigned counts,
                                            int column, RowSums& own) {
  A sum_s[reach<A>], sum_t[reach<A>], weighted[reach<A>];
#pragma unroll
  for (int m = 0; m < reach<A>; ++m) {
    sum_s[m] = sum_t[m] = weighted[m] = A(0);
#pragma unroll
    for (int v = 0; v < reach<A> / lanes<A>; ++v) {
      const Pack<A, lanes<A>> s = load_pack<lanes<A>>(student.at(m, v));
#pragma unroll
      for (int k = 0; k < lanes<A>; ++k) {
        const int n = v * lanes<A> + k;
        const A e_s = bounded_exponential(s.value[k], scale), e_t = bounded_exponential(t[m][n], scale);
        const bool there = counts >> n & 1;
        sum_s[m] += there ? e_s : A(0);
        sum_t[m] += there ? e_t : A(0);
        weighted[m] += there ? e_t * (t[m][n] - s.value[k]) : A(0);
      }
    }
  }
  own.sum_s += spread_sum<A>(sum_s, column);
  own.sum_t += spread_sum<A>(sum_t, column);
  own.weighted += spread_sum<A>(weighted, column);
}

// e^(x - maximum), 0 where no logit has been seen.
template <typename A>
__device__ __forceinline__ A below(A x, A maximum) {
  return maximum == -infinity<A>() ? A(0) : exp_nonpositive(x - maximum);
}

// With running maxima, which all threads of a row know. Logits are rounded before they meet a maximum: a fused
// multiply-subtract would see a large one above its own.
template <typename A>
__device__ __forceinline__ void add_running(const PairMatrix<A>& student, const Square<A>& t, A scale, unsigned counts,
                                            int column, A (&most_s)[reach<A>], A (&most_t)[reach<A>], RowSums& own) {
  A sum_s[reach<A>], sum_t[reach<A>], weighted[reach<A>];
#pragma unroll
  for (int m = 0; m < reach<A>; ++m) {
    A s[reach<A>];
    A now_s = most_s[m], now_t = most_t[m];
#pragma unroll
    for (int n = 0; n < reach<A>; ++n) {
      const bool there = counts >> n & 1;
      s[n] = rounded_product(scale, student.at(m, n / lanes<A>)[n % lanes<A>]);
      const A x = rounded_product(scale, t[m][n]);
      now_s = there && s[n] > now_s ? s[n] : now_s;
      now_t = there && x > now_t ? x : now_t;
    }
    now_s = row_most(now_s);
    now_t = row_most(now_t);
    if (m == own_row<A>(column)) {  // the sums so far, brought to the new maxima
      own.sum_s *= static_cast<double>(below(most_s[m], now_s));
      const double factor = static_cast<double>(below(most_t[m], now_t));
      own.sum_t *= factor;
      own.weighted *= factor;
    }
    most_s[m] = now_s;
    most_t[m] = now_t;
    sum_s[m] = sum_t[m] = weighted[m] = A(0);
#pragma unroll
    for (int n = 0; n < reach<A>; ++n) {
      if (!(counts >> n & 1)) continue;
      const A x = rounded_product(scale, t[m][n]), e_t = below(x, now_t);
      sum_s[m] += below(s[n], now_s);
      sum_t[m] += e_t;
      weighted[m] += e_t * (x - s[n]);
    }
  }
  own.sum_s += spread_sum<A>(sum_s, column);
  own.sum_t += spread_sum<A>(sum_t, column);
  own.weighted += spread_sum<A>(weighted, column);
}

// Which of a square's columns count: bit n for column n.
template <typename A>
__device__ __forceinline__ unsigned counted_columns(const Normalised<A>& x, int64_t image, int64_t first) {
  unsigned counts = 0;
#pragma unroll
  for (int v = 0; v < reach<A> / lanes<A>; ++v) {
    const Pack<A, lanes<A>> inverse = load_pack<lanes<A>>(x.inverse + x.at(image, first + v * lanes<A>));
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k) counts |= (inverse.value[k] < A(0) ? 0u : 1u) << (v * lanes<A> + k);
  }
  return counts;
}

// A block takes the rows of image a from `first` on, in their relations to image b.
template <typename A, bool bounded>
__global__ void __launch_bounds__(pair_threads, 2)
    row_sums_kernel(const PairSettings settings, const __grid_constant__ PairNetworks<A> networks,
                    const Normalised<A> norms,  // the student's
                    A* rows,           // [B, columns, 4, padded]
                    double* values) {  // [B, columns, blocks of an image]
  A* const shared = shared_memory<A>();
  const int64_t blocks = ceil_div(settings.padded, pair_rows<A>), columns = settings.columns();
  const int64_t first = blockIdx.x % blocks * pair_rows<A>, pair = blockIdx.x / blocks;
  const int64_t a = pair / columns, b = settings.across_images ? pair % columns : a;
  const int column = static_cast<int>(threadIdx.x) % tile_side, band = static_cast<int>(threadIdx.x) / tile_side;
  const A scale = static_cast<A>(settings.scale);

  PairTiles<A> tiles(networks, a, first, b, b + 1, shared);
  const PairMatrix<A> parked{shared + PairTiles<A>::elements};  // the student's relations, while the teacher's are made
  A most_s[reach<A>], most_t[reach<A>];
#pragma unroll
  for (int m = 0; m < reach<A>; ++m) most_s[m] = most_t[m] = -infinity<A>();
  RowSums own;
  for (int64_t j = 0; j < settings.padded; j += pair_columns<A>) {
    const unsigned counts = counted_columns(norms, b, j + column * reach<A>);
    Square<A> sum;
    tiles.relations(0, sum);
    parked.put(sum);  // only this thread reads them
    tiles.relations(1, sum);
    if constexpr (bounded)
      add_bounded(parked, sum, scale, counts, column, own);
    else
      add_running(parked, sum, scale, counts, column, most_s, most_t, own);
  }

  const int row = own_row<A>(column);
  const int64_t pixel = first + band * reach<A> + row;
  double value = 0;
  if (pixel < settings.padded && column % (tile_side / reach<A>) == 0) {
    A own_most_s = scale, own_most_t = scale;
    if constexpr (!bounded) {
#pragma unroll
      for (int m = 0; m < reach<A>; ++m)
        if (m == row) {
          own_most_s = most_s[m];
          own_most_t = most_t[m];
        }
    }
    // the infinite maximum makes every exponential of a row that does not count 0
    const bool counts = settings.counts.pixels_of(b) > 0 && !(norms.inverse[norms.at(a, pixel)] < A(0));
    A* const out = rows + pair * row_states * settings.padded + pixel;
    out[max_s * settings.padded] = counts ? own_most_s : infinity<A>();
    out[inverse_s * settings.padded] = counts ? static_cast<A>(1 / own.sum_s) : A(0);
    out[max_t * settings.padded] = counts ? own_most_t : infinity<A>();
    out[inverse_t * settings.padded] = counts ? static_cast<A>(1 / own.sum_t) : A(0);
    const double weighted = bounded ? settings.scale * own.weighted : own.weighted;
    if (counts)
      value = row_divergence(static_cast<double>(own_most_s), own.sum_s, static_cast<double>(own_most_t), own.sum_t, weighted);
  }
  double* const scratch = reinterpret_cast<double*>(shared);
  value = block_sum(value, scratch);
  __syncthreads();
  double weight = settings.counts.weight(reinterpret_cast<int64_t*>(scratch));
  if (settings.across_images) weight *= weight;
  if (threadIdx.x == 0) values[blockIdx.x] = value * weight / settings.counts.at_least_one(a);
}

// A row's part in the gradient: the maxima, and (what arrives) / (the sums of exponentials).
template <typename A>
struct alignas(16) RowFactors {
  A most_s, student, most_t, teacher;
};

template <typename A>
__device__ __forceinline__ RowFactors<A> factors_of(const A* rows, int64_t padded, int64_t pixel, A factor) {
  if (pixel >= padded) return {infinity<A>(), A(0), infinity<A>(), A(0)};
  const A* const from = rows + pixel;
  return {from[max_s * padded], factor * from[inverse_s * padded], from[max_t * padded], factor * from[inverse_t * padded]};
}

// The gradient of the loss for <s_i, s_j>, taken as row i's and as row j's entry together.
template <typename A, bool bounded>
__device__ __forceinline__ A entry_gradient(A s, A t, A scale, const RowFactors<A>& i, const RowFactors<A>& j) {
  if constexpr (bounded) {
    return difference_of_products(bounded_exponential(s, scale), i.student + j.student, bounded_exponential(t, scale),
                                  i.teacher + j.teacher);
  } else {
    const A x_s = rounded_product(scale, s), x_t = rounded_product(scale, t);
    return difference_of_products(exp_below(x_s, i.most_s), i.student, exp_below(x_t, i.most_t), i.teacher) +
           difference_of_products(exp_below(x_s, j.most_s), j.student, exp_below(x_t, j.most_t), j.teacher);
  }
}

// A block makes the gradient for the normalised pixels of image a from `first` on. Pixels that do not count have anything
// in the matrix: they are multiplied with zeros, and what comes out for them is not used.
template <typename A, bool bounded>
__global__ void __launch_bounds__(pair_threads, 2)
    pair_gradient_kernel(const PairSettings settings, const __grid_constant__ PairNetworks<A> networks,
                         const A* rows,  // [B, columns, 4, padded]
                         const A* upstream, int64_t stride_a, int64_t stride_b,
                         A* g) {  // [B, channels, padded]
  A* const shared = shared_memory<A>();
  const int64_t padded = settings.padded, blocks = ceil_div(padded, pair_rows<A>);
  const int64_t first = blockIdx.x % blocks * pair_rows<A>, a = blockIdx.x / blocks;
  const int64_t begin = settings.across_images ? 0 : a, end = settings.across_images ? settings.images : a + 1;
  const int column = static_cast<int>(threadIdx.x) % tile_side, band = static_cast<int>(threadIdx.x) / tile_side;
  const A scale = static_cast<A>(settings.scale);
  double weight = settings.counts.weight(reinterpret_cast<int64_t*>(shared));
  __syncthreads();
  if (settings.across_images) weight *= weight;
  const auto factor = [&](int64_t x, int64_t y) {
    return static_cast<A>(static_cast<double>(upstream[x * stride_a + y * stride_b]) * settings.scale * weight /
                          settings.counts.at_least_one(x));
  };

  PairTiles<A> tiles(networks, a, first, begin, end, shared);
  const PairMatrix<A> matrix{shared + PairTiles<A>::elements};
  A* const columns = matrix.shared + PairMatrix<A>::elements;
  PairGradient<A> gradient(networks.rows[0], static_cast<int>(settings.channels), a, first, g, columns);
  RowFactors<A>* const of_rows = reinterpret_cast<RowFactors<A>*>(columns + PairGradient<A>::elements);  // [pair_rows]
  for (int64_t b = begin; b < end; ++b) {
    const A* const rows_i = rows + settings.rows_at(a, b) * row_states * padded;
    const A* const rows_j = rows + settings.rows_at(b, a) * row_states * padded;
    const A factor_j = factor(b, a);
    for (int row = static_cast<int>(threadIdx.x); row < pair_rows<A>; row += pair_threads)
      of_rows[row] = factors_of(rows_i, padded, first + row, factor(a, b));
    for (int64_t j = 0; j < padded; j += pair_columns<A>) {
      gradient.start(b, j);
      Square<A> sum;
      tiles.relations(0, sum);
      matrix.put(sum);
      tiles.relations(1, sum);
#pragma unroll
      for (int v = 0; v < reach<A> / lanes<A>; ++v) {
        RowFactors<A> of_column[lanes<A>];
#pragma unroll
        for (int k = 0; k < lanes<A>; ++k)
          of_column[k] = factors_of(rows_j, padded, j + column * reach<A> + v * lanes<A> + k, factor_j);
#pragma unroll
        for (int m = 0; m < reach<A>; ++m) {
          const RowFactors<A> of_row = of_rows[band * reach<A> + m];
          Pack<A, lanes<A>> pack = load_pack<lanes<A>>(matrix.at(m, v));
#pragma unroll
          for (int k = 0; k < lanes<A>; ++k)
            pack.value[k] = entry_gradient<A, bounded>(pack.value[k], sum[m][v * lanes<A> + k], scale, of_row, of_column[k]);
          store_pack(matrix.at(m, v), pack);
        }
      }
      __syncthreads();
      gradient.add(matrix, b, j);
    }
  }
  gradient.finish();
}

// What forward and backward of one call share, when its memory has been taken.
template <typename A>
struct PairCall {
  PixelCall call;
  PairSettings settings{};
  NormMemory<A> memory;
  A *student_rows = nullptr, *teacher_rows = nullptr;

  PairCall(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& mask, const std::string& relation,
           double temperature, bool across_images)
      : call(student, teacher, mask, relation) {
    // e^(-2 / 0.05) is far from the smallest float
    const bool bounded = call.kind != PixelRows::gram && temperature >= 0.05;
    settings = {1 / temperature, bounded, across_images, call.images, call.channels, call.pixels,
                padded_pixels(call.pixels), {}};
  }

  void ask(Room& room) {
    memory.ask(room, call);
    room.ask(student_rows, call.images * settings.padded * row_depth<A>(call.channels));
    room.ask(teacher_rows, call.images * settings.padded * row_depth<A>(call.teacher_channels));
  }

  int64_t blocks() const { return ceil_div(settings.padded, pair_rows<A>); }
};

template <typename A>
static std::tuple<Tensor, Tensor> forward(PairCall<A> call, const Tensor& student, const std::string& reduction,
                                          cudaStream_t stream) {
  PairSettings& settings = call.settings;
  const int64_t images = settings.images, columns = settings.columns(), blocks = call.blocks();
  Tensor rows = new_like(student, {images, columns, row_states, settings.padded}, call.call.type);
  std::vector<int64_t> size;
  if (reduction == "none") size.assign(settings.across_images ? 2 : 1, images);
  Tensor loss = new_like(student, size, call.call.type);
  Room room;
  double* values = nullptr;
  call.ask(room);
  room.ask(values, images * columns * blocks);
  room.take(student);

  settings.counts = call.memory.count(call.call, reduction == "mean", stream);
  const Normalised<A> s = call.memory.student(call.call, stream), t = call.memory.teacher(call.call, stream);
  const PairNetworks<A> networks{{make_rows(s, call.student_rows, stream), make_rows(t, call.teacher_rows, stream)}, 2};
  const Blocks grid{images * columns * blocks};
  constexpr std::size_t shared = (PairTiles<A>::elements + PairMatrix<A>::elements) * sizeof(A);
  A* const out = static_cast<A*>(rows.data_ptr());
  if (settings.bounded)
    launch<row_sums_kernel<A, true>>(grid, pair_threads, shared, stream, settings, networks, s, out, values);
  else
    launch<row_sums_kernel<A, false>>(grid, pair_threads, shared, stream, settings, networks, s, out, values);
  reduce_values(values, images * columns, blocks, reduction, loss, stream);
  return {loss, rows};
}

template <typename A>
static Tensor backward(PairCall<A> call, const Tensor& student, const Tensor& rows, const Tensor& upstream,
                       const std::string& reduction, cudaStream_t stream) {
  PairSettings& settings = call.settings;
  Room room;
  A* g = nullptr;
  call.ask(room);
  room.ask(g, settings.images * settings.channels * settings.padded);
  room.take(student);

  settings.counts = call.memory.count(call.call, reduction == "mean", stream);
  const Normalised<A> s = call.memory.student(call.call, stream), t = call.memory.teacher(call.call, stream);
  const PairNetworks<A> networks{{make_rows(s, call.student_rows, stream), make_rows(t, call.teacher_rows, stream)}, 2};
  const int64_t stride_a = upstream.dim() > 0 ? upstream.stride(0) : 0;
  const int64_t stride_b = upstream.dim() > 1 ? upstream.stride(1) : 0;
  const Blocks grid{settings.images * call.blocks()};
  constexpr std::size_t shared =
      (PairTiles<A>::elements + PairMatrix<A>::elements + PairGradient<A>::elements) * sizeof(A) +
      pair_rows<A> * sizeof(RowFactors<A>);
  static_assert(shared <= most_shared_bytes);
  const A* const kept = static_cast<const A*>(rows.data_ptr());
  const A* const arriving = static_cast<const A*>(upstream.data_ptr());
  if (settings.bounded)
    launch<pair_gradient_kernel<A, true>>(grid, pair_threads, shared, stream, settings, networks, kept, arriving,
                                          stride_a, stride_b, g);
  else
    launch<pair_gradient_kernel<A, false>>(grid, pair_threads, shared, stream, settings, networks, kept, arriving,
                                           stride_a, stride_b, g);
  const Gradient gradient(student);
  store_through_norms(s, g, planes_of(gradient.written, call.call.holder), stream);
  return gradient.finish();
}

static std::tuple<Tensor, Tensor> pixel_relation_kl(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const std::string& relation, double temperature, bool across_images, const std::string& reduction) {
  const OnDevice device(student);
  if (arithmetic_type(student, teacher) == ScalarType::Double)
    return forward(PairCall<double>(student, teacher, mask, relation, temperature, across_images), student, reduction,
                   device.stream());
  return forward(PairCall<float>(student, teacher, mask, relation, temperature, across_images), student, reduction,
                 device.stream());
}

static Tensor pixel_relation_kl_backward(
    const Tensor& student,              // [B, C, *S]
    const Tensor& teacher,              // [B, other C, *S]
    const std::optional<Tensor>& mask,  // [B, *S], boolean, contiguous
    const Tensor& rows,                 // what the forward left, contiguous, in the type of the arithmetic
    const Tensor& upstream,             // [], [B] or [B, B], in the type of the arithmetic
    const std::string& relation, double temperature, bool across_images, const std::string& reduction) {
  const OnDevice device(student);
  if (arithmetic_type(student, teacher) == ScalarType::Double)
    return backward(PairCall<double>(student, teacher, mask, relation, temperature, across_images), student, rows,
                    upstream, reduction, device.stream());
  return backward(PairCall<float>(student, teacher, mask, relation, temperature, across_images), student, rows, upstream,
                  reduction, device.stream());
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("pixel_relation_kl_cuda", TORCH_BOX(&medkd::pixel_relation_kl));
  m.impl("pixel_relation_kl_backward_cuda", TORCH_BOX(&medkd::pixel_relation_kl_backward));
}
