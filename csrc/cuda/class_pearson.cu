// class_pearson: sums over all pixels in one pass, the terms that they give, and the gradient in another pass.
// Derivation: medkd_fast/reference/class_pearson.py.
//
// Up to 32 classes a thread holds its pixels' logits in registers; with more, or in double, it goes over the classes again
// and again. Either way a block leaves q of its pixels in shared memory, and there eight threads add up a class in double.
#include "../math/class_pearson.h"
#include "pixel_loss_driver.h"
#include "room.h"

namespace medkd {

constexpr int class_threads = 8, staged_classes = direct_threads / class_threads;
constexpr int most_slots = 2048, adding_threads = 1024, terms_threads = 256;
constexpr int coefficients_of_class = 4, sums_of_class = 5;

// q of a tile [classes, pixels] of the student, then of the teacher. Between classes lie eight more, so that the threads of
// four classes meet no bank twice.
__host__ __device__ constexpr int staged_pitch(int pixels) { return pixels + class_threads; }

constexpr std::size_t staged_bytes(int classes, int pixels, std::size_t size) {
  return 2 * static_cast<std::size_t>(classes) * staged_pitch(pixels) * size;
}

// Adds (or puts, at the first time) the sums of `classes` classes to the block's, of which the first class's five begin at
// `slot` and lie `all_classes` apart. It is always the same thread that has a class.
template <typename A>
__device__ __forceinline__ void add_staged(const A* staged, int classes, int pixels, int64_t all_classes, bool first_time,
                                           double* slot) {
  const int member = static_cast<int>(threadIdx.x) % class_threads, pitch = staged_pitch(pixels);
  for (int from = 0; from < classes; from += staged_classes) {
    const int c = from + static_cast<int>(threadIdx.x) / class_threads;
    double sum[sums_of_class] = {};
    if (c < classes) {
      const A* const s = staged + c * pitch;
      const A* const t = s + classes * pitch;
#pragma unroll 4
      for (int p = member; p < pixels; p += class_threads) {
        const double a = static_cast<double>(s[p]), b = static_cast<double>(t[p]);
        sum[0] += a;
        sum[1] += b;
        sum[2] += a * a;
        sum[3] += b * b;
        sum[4] += a * b;
      }
    }
#pragma unroll
    for (int k = 0; k < sums_of_class; ++k)
#pragma unroll
      for (int distance = class_threads / 2; distance > 0; distance /= 2)
        sum[k] += __shfl_xor_sync(all_lanes, sum[k], distance);
    if (member == 0 && c < classes)
#pragma unroll
      for (int k = 0; k < sums_of_class; ++k) {
        double* const at = slot + k * all_classes + c;
        *at = first_time ? sum[k] : *at + sum[k];
      }
  }
}

// The products of a pixel's q over its classes.
template <typename A>
struct Products {
  A st = A(0), ss = A(0), tt = A(0);
  __device__ __forceinline__ void add(A q_s, A q_t) {
    st += q_s * q_t;
    ss += q_s * q_s;
    tt += q_t * q_t;
  }
  __device__ __forceinline__ Correlation<A> get() const { return correlation(st, ss, tt); }
};

// A pixel's correlation times its coefficient in the loss.
template <typename A>
__device__ __forceinline__ Correlation<A> weighed(Correlation<A> k, const double* coefficients) {
  const A share = static_cast<A>(coefficients[0]);
  return {k.value, share * k.along_t, share * k.along_s};
}

// A class's part of the coefficients [1 + 4C].
template <typename A>
struct alignas(16) ClassPart {
  A of_t, of_s, mean_s, mean_t;

  ClassPart() = default;
  __device__ __forceinline__ ClassPart(const double* coefficients, int classes, int c)
      : of_t(static_cast<A>(coefficients[1 + c])),
        of_s(static_cast<A>(coefficients[1 + classes + c])),
        mean_s(static_cast<A>(coefficients[1 + 2 * classes + c])),
        mean_t(static_cast<A>(coefficients[1 + 3 * classes + c])) {}

  __device__ __forceinline__ A gradient(const Correlation<A>& k, A q_s, A q_t) const {
    return k.along_t * q_t + k.along_s * q_s + (of_t * (q_t - mean_t) + of_s * (q_s - mean_s));
  }
};

// ---- In registers.

template <int max_classes, int count>
__device__ __forceinline__ void centre(int classes, float to_base_2, const bool (&counts)[count],
                                       float (&x)[max_classes][count]) {
  const float mean = 1.0f / static_cast<float>(classes);
#pragma unroll
  for (int p = 0; p < count; ++p) {
    float most = -infinity<float>(), sum = 0;
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
      if (c < classes) most = fmaxf(most, x[c][p]);
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
      if (c < classes) sum += x[c][p] = exp2_nonpositive((x[c][p] - most) * to_base_2);
    sum = 1.0f / sum;
#pragma unroll
    for (int c = 0; c < max_classes; ++c) x[c][p] = counts[p] && c < classes ? x[c][p] * sum - mean : 0.0f;
  }
}

// A thread's q of both networks, 0 at pixels that do not count. `memory` is for rows, and free behind the next barrier.
template <int max_classes, int count>
__device__ __forceinline__ void load_centred(const DirectLoss& direct, const Tile<count>& tile, float* memory,
                                             bool (&counts)[count], float (&s)[max_classes][count],
                                             float (&t)[max_classes][count]) {
  const PixelLoss& loss = direct.loss;
  float* const teacher_rows = memory + direct_threads * count * row_pitch(loss.classes);
  const RowPlaces place(loss.classes);
  const auto fill = [&](const Planes& x, float* rows) {
    with_type<float>(x.type, [&](auto zero) {
      load_rows(static_cast<const decltype(zero)*>(x.data) + offset_of(x, tile.image, tile.first),
                tile.length * loss.classes, place, rows);
    });
  };
  if (direct.student == Access::rows) fill(loss.student, memory);
  if (direct.teacher == Access::rows) fill(loss.teacher, teacher_rows);
  RawLogits<max_classes, count> raw_s = {}, raw_t = {};
  fetch_logits<max_classes>(loss.student, direct.student, tile, loss.classes, raw_s);
  fetch_logits<max_classes>(loss.teacher, direct.teacher, tile, loss.classes, raw_t);
#pragma unroll
  for (int p = 0; p < count; ++p) {
    int label = -1;
    float weight;
    const int pixel = tile.own + p * tile.step;
    if (pixel < tile.length) load_label<false>(loss, tile.image * loss.pixels + tile.first + pixel, label, weight);
    counts[p] = label >= 0;
  }
  if (direct.student == Access::rows || direct.teacher == Access::rows) __syncthreads();
  widen_logits<max_classes>(loss.student, direct.student, tile, loss.classes, memory, raw_s, s);
  widen_logits<max_classes>(loss.teacher, direct.teacher, tile, loss.classes, teacher_rows, raw_t, t);
  centre(loss.classes, loss.single.to_base_2, counts, s);
  centre(loss.classes, loss.single.to_base_2, counts, t);
}

template <int max_classes, int count>
__device__ __forceinline__ Correlation<float> correlation_of(const float (&s)[max_classes][count],
                                                             const float (&t)[max_classes][count], int p) {
  Products<float> products;
#pragma unroll
  for (int c = 0; c < max_classes; ++c) products.add(s[c][p], t[c][p]);
  return products.get();
}

__device__ __forceinline__ void write_pixel_sums(double number, double within, double* scratch, double* slot) {
  number = block_sum(number, scratch);
  within = block_sum(within, scratch + direct_threads / warp_size);
  if (threadIdx.x == 0) {
    slot[0] = number;
    slot[1] = within;
  }
}

template <int count>
__device__ __forceinline__ void stage(float* to, const Tile<count>& tile, const float (&q)[count]) {
  if (tile.step == 1) {
    Pack<float, count> pack;
#pragma unroll
    for (int p = 0; p < count; ++p) pack.value[p] = q[p];
    store_pack(to + tile.own, pack);
    return;
  }
#pragma unroll
  for (int p = 0; p < count; ++p) to[tile.own + p * tile.step] = q[p];
}

constexpr std::size_t pixel_sums_bytes = 2 * (direct_threads / warp_size) * sizeof(double);

template <int max_classes>
__global__ void __launch_bounds__(direct_threads, max_classes <= 8 ? 3 : 4)
    register_slots_kernel(const DirectLoss direct, double* slots) {  // [blocks, 2 + 5C]
  constexpr int count = pixels_per_thread(max_classes), pixels = direct_threads * count, pitch = staged_pitch(pixels);
  const int classes = direct.loss.classes;
  double* const scratch = shared_memory<double>();
  float* const memory = reinterpret_cast<float*>(scratch + 2 * (direct_threads / warp_size));  // rows, and then q
  double* const slot = slots + int64_t{blockIdx.x} * (2 + sums_of_class * classes);
  const Range range = tiles_of_this_block(direct);
  Tile<count> tile(direct, range.begin);
  double number = 0, within = 0;
  for (int64_t index = range.begin; index < range.end; ++index, tile.next(direct)) {
    bool counts[count];
    float s[max_classes][count] = {}, t[max_classes][count] = {};
    load_centred(direct, tile, memory, counts, s, t);
    __syncthreads();
#pragma unroll
    for (int p = 0; p < count; ++p) {
      number += counts[p] ? 1.0 : 0.0;
      within += static_cast<double>(correlation_of(s, t, p).value);
    }
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
      if (c < classes) {
        stage(memory + c * pitch, tile, s[c]);
        stage(memory + (classes + c) * pitch, tile, t[c]);
      }
    __syncthreads();
    add_staged(memory, classes, pixels, classes, index == range.begin, slot + 2);
    __syncthreads();
  }
  write_pixel_sums(number, within, scratch, slot);
}

template <int max_classes>
__global__ void __launch_bounds__(direct_threads, max_classes <= 8 ? 3 : 4)
    register_gradient_kernel(const DirectLoss direct, const double* coefficients, const float* upstream) {
  constexpr int count = pixels_per_thread(max_classes);
  const PixelLoss& loss = direct.loss;
  const int classes = loss.classes;
  ClassPart<float>* const parts = shared_memory<ClassPart<float>>();  // [C]
  float* const memory = reinterpret_cast<float*>(parts + classes);
  const Tile<count> tile(direct, blockIdx.x);
  if (threadIdx.x < static_cast<unsigned>(classes)) parts[threadIdx.x] = {coefficients, classes, static_cast<int>(threadIdx.x)};
  __syncthreads();
  bool counts[count];
  float s[max_classes][count] = {}, t[max_classes][count] = {};
  load_centred(direct, tile, memory, counts, s, t);
  const float factor = *upstream * static_cast<float>(1.0 / loss.twice.temperature), mean = 1.0f / static_cast<float>(classes);
  Correlation<float> k[count];
  float common[count] = {};
#pragma unroll
  for (int p = 0; p < count; ++p) k[p] = weighed(correlation_of(s, t, p), coefficients);
#pragma unroll
  for (int c = 0; c < max_classes; ++c)
    if (c < classes) {
      const ClassPart<float> part = parts[c];
#pragma unroll
      for (int p = 0; p < count; ++p) {
        const float g = part.gradient(k[p], s[c][p], t[c][p]);
        s[c][p] += mean;
        common[p] += s[c][p] * g;
        t[c][p] = g;
      }
    }
#pragma unroll
  for (int c = 0; c < max_classes; ++c)
#pragma unroll
    for (int p = 0; p < count; ++p) s[c][p] = counts[p] ? factor * (s[c][p] * (t[c][p] - common[p])) : 0.0f;
  // a thread's rows in shared memory are its own
  store_gradient(loss.gradient, direct.gradient, tile, classes, memory, s);
  if (direct.gradient == Access::rows) {
    __syncthreads();
    const RowPlaces place(classes);
    with_type<float>(loss.gradient.type, [&](auto zero) {
      store_rows(memory, tile.length * classes, place,
                 static_cast<decltype(zero)*>(loss.gradient.data) + offset_of(loss.gradient, tile.image, tile.first));
    });
  }
}

// ---- In sweeps: a pixel a thread.

// One network's logits of a pixel, and q from its maximum and sum of exponentials.
template <typename A>
struct Centred {
  const Planes& x;
  int64_t offset;
  A scale, mean;
  A most = -infinity<A>(), inverse = A(0);

  __device__ __forceinline__ Centred(const PixelLoss& loss, const Planes& x, int64_t image, int64_t pixel, bool counts)
      : x(x),
        offset(offset_of(x, image, pixel)),
        scale(loss.numbers<A>().to_base_2),
        mean(A(1) / static_cast<A>(loss.classes)) {
    if (!counts) return;
    A sum = A(0);
    for (int c = 0; c < loss.classes; c += batch<A>) {
      A u[batch<A>];
      load(c, loss.classes, u);
#pragma unroll
      for (int i = 0; i < batch<A>; ++i)
        if (c + i < loss.classes) add_logit(u[i], most, sum);
    }
    inverse = A(1) / sum;
  }

  __device__ __forceinline__ void load(int first, int classes, A (&out)[batch<A>]) const {
    with_type<A>(x.type, [&](auto zero) {
      const auto* from = static_cast<const decltype(zero)*>(x.data) + offset;
#pragma unroll
      for (int i = 0; i < batch<A>; ++i)
        out[i] = first + i < classes ? rounded_product(static_cast<A>(widen(from[(first + i) * x.stride_c])), scale) : A(0);
    });
  }

  __device__ __forceinline__ A q(A u) const { return exp2_nonpositive(u - most) * inverse - mean; }
};

// visit(class, q of the student, q of the teacher) for classes [first, last) of a pixel.
template <typename A, typename Visit>
__device__ __forceinline__ void over_classes(const Centred<A>& student, const Centred<A>& teacher, int first, int last,
                                             const Visit& visit) {
  for (int c = first; c < last; c += batch<A>) {
    A s[batch<A>], t[batch<A>];
    student.load(c, last, s);
    teacher.load(c, last, t);
#pragma unroll
    for (int i = 0; i < batch<A>; ++i)
      if (c + i < last) visit(c + i, student.q(s[i]), teacher.q(t[i]));
  }
}

// The pixel of a thread in its block's index-th tile of all images' pixels.
struct SweptPixel {
  int64_t image, pixel;
  bool inside, counts;

  template <typename A>
  __device__ __forceinline__ static SweptPixel at(const PixelLoss& loss, int64_t index) {
    const int64_t all = index * direct_threads + threadIdx.x;
    SweptPixel result{all / loss.pixels, all % loss.pixels, all < loss.images * loss.pixels, false};
    int label = -1;
    A weight;
    if (result.inside) load_label<false>(loss, all, label, weight);
    result.counts = label >= 0;
    return result;
  }
};

template <typename A>
__global__ void __launch_bounds__(direct_threads, 4)
    sweep_slots_kernel(const PixelLoss loss, int64_t tiles, int64_t tiles_of_block, double* slots) {  // [blocks, 2 + 5C]
  constexpr int pitch = staged_pitch(direct_threads);
  double* const scratch = shared_memory<double>();
  A* const staged = reinterpret_cast<A*>(scratch + 2 * (direct_threads / warp_size));
  double* const slot = slots + blockIdx.x * (2 + sums_of_class * int64_t{loss.classes});
  const int64_t begin = blockIdx.x * tiles_of_block;
  const int64_t end = tiles - begin < tiles_of_block ? tiles : begin + tiles_of_block;
  double number = 0, within = 0;
  for (int64_t index = begin; index < end; ++index) {
    const SweptPixel at = SweptPixel::at<A>(loss, index);
    const Centred<A> student(loss, loss.student, at.image, at.pixel, at.counts);
    const Centred<A> teacher(loss, loss.teacher, at.image, at.pixel, at.counts);
    Products<A> products;
    for (int first = 0; first < loss.classes; first += staged_classes) {
      const int last = loss.classes - first < staged_classes ? loss.classes : first + staged_classes;
      const auto put = [&](int c, A q_s, A q_t) {
        products.add(q_s, q_t);
        staged[(c - first) * pitch + threadIdx.x] = q_s;
        staged[(c - first + last - first) * pitch + threadIdx.x] = q_t;
      };
      if (at.counts)
        over_classes(student, teacher, first, last, put);
      else
        for (int c = first; c < last; ++c) put(c, A(0), A(0));
      __syncthreads();
      add_staged(staged, last - first, direct_threads, loss.classes, index == begin, slot + 2 + first);
      __syncthreads();
    }
    number += at.counts ? 1.0 : 0.0;
    within += static_cast<double>(products.get().value);
  }
  write_pixel_sums(number, within, scratch, slot);
}

template <typename A>
__global__ void __launch_bounds__(direct_threads, 4)
    sweep_gradient_kernel(const PixelLoss loss, const double* coefficients, const A* upstream) {
  const SweptPixel at = SweptPixel::at<A>(loss, blockIdx.x);
  if (!at.inside) return;
  const int64_t offset = offset_of(loss.gradient, at.image, at.pixel);
  if (!at.counts) {
    for (int c = 0; c < loss.classes; ++c) store_element(loss.gradient, offset + c * loss.gradient.stride_c, A(0));
    return;
  }
  const Centred<A> student(loss, loss.student, at.image, at.pixel, true);
  const Centred<A> teacher(loss, loss.teacher, at.image, at.pixel, true);
  const A factor = *upstream * static_cast<A>(1.0 / loss.twice.temperature);
  Products<A> products;
  over_classes(student, teacher, 0, loss.classes, [&](int, A q_s, A q_t) { products.add(q_s, q_t); });
  const Correlation<A> k = weighed(products.get(), coefficients);
  const auto gradient = [&](int c, A q_s, A q_t) {
    return ClassPart<A>(coefficients, loss.classes, c).gradient(k, q_s, q_t);
  };
  A common = A(0);
  over_classes(student, teacher, 0, loss.classes,
               [&](int c, A q_s, A q_t) { common += (q_s + student.mean) * gradient(c, q_s, q_t); });
  over_classes(student, teacher, 0, loss.classes, [&](int c, A q_s, A q_t) {
    const A g = gradient(c, q_s, q_t);
    store_element(loss.gradient, offset + c * loss.gradient.stride_c, factor * ((q_s + student.mean) * (g - common)));
  });
}

// ---- Between the passes.

// A lane a sum, the warps share out the slots.
__global__ void __launch_bounds__(adding_threads)
    add_slots_kernel(const double* slots, int64_t blocks, int64_t size, double* sums) {
  constexpr int warps = adding_threads / warp_size;
  double* const of_warps = shared_memory<double>();  // [warps, 32]
  const int64_t k = blockIdx.x * int64_t{warp_size} + lane_index();
  double sum = 0;
  if (k < size)
#pragma unroll 4
    for (int64_t block = warp_index(); block < blocks; block += warps) sum += slots[block * size + k];
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp_index() != 0 || k >= size) return;
  for (int warp = 1; warp < warps; ++warp) sum += of_warps[warp * warp_size + lane_index()];
  sums[k] = sum;
}

template <typename A>
__global__ void __launch_bounds__(terms_threads)
    terms_kernel(const double* sums, int64_t classes, double inter_weight, double intra_weight, double temperature, A* loss,
                 A* inter, A* intra, double* coefficients) {
  const double exists = sums[0] > 0 ? 1.0 : 0.0, number = sums[0] > 1 ? sums[0] : 1.0, square = temperature * temperature;
  const double share = -square * intra_weight / static_cast<double>(classes);
  double correlations = 0;
  for (int64_t c = threadIdx.x; c < classes; c += terms_threads) {
    const double* const of = sums + 2 + c;
    const ClassTerms k = class_terms(number, of[0], of[classes], of[2 * classes], of[3 * classes], of[4 * classes]);
    correlations += k.correlation;
    double* const out = coefficients + 1 + c;
    out[0] = share * k.of_t;
    out[classes] = share * k.of_s;
    out[2 * classes] = k.mean_s;
    out[3 * classes] = k.mean_t;
  }
  correlations = block_sum(correlations, shared_memory<double>());
  if (threadIdx.x != 0) return;
  coefficients[0] = -square * inter_weight * exists / number;
  const double value = exists - sums[1] / number, across = exists - correlations / static_cast<double>(classes);
  *loss = static_cast<A>(square * (inter_weight * value + intra_weight * across));
  *inter = static_cast<A>(value);
  *intra = static_cast<A>(across);
}

// ---- Launches.

struct PearsonCall {
  PixelLoss loss{};
  bool in_registers, twice;
  std::vector<Tensor> holder;

  PearsonCall(const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& target, double temperature,
              int64_t ignore_index) {
    holder.reserve(3);
    loss.images = teacher.size(0);
    loss.classes = static_cast<int>(teacher.size(1));
    loss.pixels = pixels_of(teacher);
    loss.student = planes_of(student, holder);
    loss.teacher = planes_of(teacher, holder);
    loss.target = target ? target->data_ptr() : nullptr;
    if (target) loss.target_type = type_of(*target);
    loss.set_numbers(0, 0, temperature);
    loss.ignore_index = ignore_index;
    twice = arithmetic_type(student, teacher) == ScalarType::Double;
    in_registers = !twice && loss.classes <= most_register_classes;
  }

  std::size_t rows_bytes(int count) const {
    return 2 * std::size_t{direct_threads} * count * row_pitch(loss.classes) * sizeof(float);
  }
};

template <typename A>
static void sweep_slots(const PearsonCall& call, int64_t tiles, int64_t tiles_of_block, int64_t blocks, double* slots,
                        cudaStream_t stream) {
  launch<sweep_slots_kernel<A>>({blocks}, direct_threads,
                                pixel_sums_bytes + staged_bytes(staged_classes, direct_threads, sizeof(A)), stream,
                                call.loss, tiles, tiles_of_block, slots);
}

static Tensor class_pearson(
    const Tensor& student,                // [B, C, *S]
    const Tensor& teacher,                // [B, C, *S]
    const std::optional<Tensor>& target,  // [B, *S], contiguous
    double temperature, int64_t ignore_index) {
  const OnDevice device(student);
  const cudaStream_t stream = device.stream();
  const PearsonCall call(student, teacher, target, temperature, ignore_index);
  const PixelLoss& loss = call.loss;
  const int64_t size = 2 + sums_of_class * int64_t{loss.classes};
  Tensor sums = new_like(student, {size}, ScalarType::Double);
  Room room;
  double* slots = nullptr;
  int64_t blocks = 0;
  // run(tiles, tiles of a block) with memory for the blocks' sums
  const auto over_tiles = [&](int64_t tiles, const auto& run) {
    if (tiles == 0) return;
    const int64_t tiles_of_block = ceil_div(tiles, most_slots);
    blocks = ceil_div(tiles, tiles_of_block);
    room.ask(slots, blocks * size);
    room.take(student);
    run(tiles, tiles_of_block);
  };
  if (call.in_registers) {
    with_classes(loss.classes, RegisterClasses(), [&](auto max_classes) {
      constexpr int most = decltype(max_classes)::value, count = pixels_per_thread(most);
      DirectLoss direct = direct_loss(loss, count);
      const std::size_t staged = staged_bytes(loss.classes, direct_threads * count, sizeof(float));
      over_tiles(loss.images * direct.tiles, [&](int64_t, int64_t tiles_of_block) {
        direct.tiles_of_block = tiles_of_block;
        launch<register_slots_kernel<most>>({blocks}, direct_threads,
                                            pixel_sums_bytes + std::max(staged, call.rows_bytes(count)), stream, direct, slots);
      });
    });
  } else {
    over_tiles(ceil_div(loss.images * loss.pixels, direct_threads), [&](int64_t tiles, int64_t tiles_of_block) {
      (call.twice ? sweep_slots<double> : sweep_slots<float>)(call, tiles, tiles_of_block, blocks, slots, stream);
    });
  }
  launch<add_slots_kernel>({ceil_div(size, warp_size)}, adding_threads, adding_threads * sizeof(double), stream,
                           slots, blocks, size, static_cast<double*>(sums.data_ptr()));
  return sums;
}

template <typename A>
static std::tuple<Tensor, Tensor, Tensor, Tensor> terms_of(const Tensor& sums, double inter_weight, double intra_weight,
                                                           double temperature, ScalarType type, cudaStream_t stream) {
  const int64_t classes = (sums.numel() - 2) / sums_of_class;
  Tensor loss = new_like(sums, {}, type), inter = new_like(sums, {}, type), intra = new_like(sums, {}, type);
  Tensor coefficients = new_like(sums, {1 + coefficients_of_class * classes}, ScalarType::Double);
  launch<terms_kernel<A>>({1}, terms_threads, terms_threads / warp_size * sizeof(double), stream,
                          static_cast<const double*>(sums.data_ptr()), classes, inter_weight, intra_weight, temperature,
                          static_cast<A*>(loss.data_ptr()), static_cast<A*>(inter.data_ptr()),
                          static_cast<A*>(intra.data_ptr()), static_cast<double*>(coefficients.data_ptr()));
  return {loss, inter, intra, coefficients};
}

static std::tuple<Tensor, Tensor, Tensor, Tensor> class_pearson_terms(
    const Tensor& sums,  // [2 + 5C], double, contiguous
    double inter_weight, double intra_weight, double temperature, bool single) {
  const OnDevice device(sums);
  return single ? terms_of<float>(sums, inter_weight, intra_weight, temperature, ScalarType::Float, device.stream())
                : terms_of<double>(sums, inter_weight, intra_weight, temperature, ScalarType::Double, device.stream());
}

template <typename A>
static void sweep_gradient(const PearsonCall& call, const double* coefficients, const void* upstream, cudaStream_t stream) {
  launch<sweep_gradient_kernel<A>>({ceil_div(call.loss.images * call.loss.pixels, direct_threads)}, direct_threads,
                                   0, stream, call.loss, coefficients, static_cast<const A*>(upstream));
}

static Tensor class_pearson_backward(
    const Tensor& student,                // [B, C, *S]
    const Tensor& teacher,                // [B, C, *S]
    const std::optional<Tensor>& target,  // [B, *S], contiguous
    const Tensor& coefficients,           // [1 + 4C], double, contiguous, as class_pearson_terms gives them
    const Tensor& upstream,               // [], in the type of the arithmetic
    double temperature, int64_t ignore_index) {
  const OnDevice device(student);
  const cudaStream_t stream = device.stream();
  PearsonCall call(student, teacher, target, temperature, ignore_index);
  const Gradient gradient(student);
  call.loss.gradient = planes_of(gradient.written, call.holder);
  const double* const of_classes = static_cast<const double*>(coefficients.data_ptr());
  if (call.in_registers) {
    with_classes(call.loss.classes, RegisterClasses(), [&](auto max_classes) {
      constexpr int most = decltype(max_classes)::value, count = pixels_per_thread(most);
      const DirectLoss direct = direct_loss(call.loss, count);
      launch<register_gradient_kernel<most>>({call.loss.images * direct.tiles}, direct_threads,
                                             call.loss.classes * sizeof(ClassPart<float>) + call.rows_bytes(count),
                                             stream, direct, of_classes,
                                             static_cast<const float*>(upstream.data_ptr()));
    });
  } else {
    (call.twice ? sweep_gradient<double> : sweep_gradient<float>)(call, of_classes, upstream.data_ptr(), stream);
  }
  return gradient.finish();
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("class_pearson_cuda", TORCH_BOX(&medkd::class_pearson));
  m.impl("class_pearson_terms_cuda", TORCH_BOX(&medkd::class_pearson_terms));
  m.impl("class_pearson_backward_cuda", TORCH_BOX(&medkd::class_pearson_backward));
}
