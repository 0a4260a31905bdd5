// The per-pixel losses on the device: decoupled_kl, and class_kl, which is its non-target part over all classes.
//
// Up to 32 classes a thread holds its pixels' logits in registers, so each tensor is read once; with more, or in double, it
// goes over the classes twice, first for the sums of exponentials, then for value and gradient. A block leaves its sums in
// double; `finish` adds them up in the order of the blocks.
//
// Logits are multiplied by log2(e) / temperature in one instruction with the subtraction of their maximum, see exp2_nonpositive.
#pragma once

#include "../math/decoupled_kl.h"
#include "launch.h"
#include "planes.h"

namespace medkd {

// Classes that a kernel holds in registers: of these numbers the first that is enough, so that little is done for classes that
// are not there.
template <int... numbers>
struct ClassNumbers {};
using RegisterClasses = ClassNumbers<2, 3, 4, 5, 6, 8, 9, 10, 12, 14, 16, 24, 32>;
constexpr int most_register_classes = 32;

// One more than the number before.
template <int... numbers>
__host__ __device__ constexpr int fewest_classes(int max_classes, ClassNumbers<numbers...>) {
  int before = 0, fewest = 0;
  ((fewest = numbers == max_classes ? before + 1 : fewest, before = numbers), ...);
  return fewest;
}

// f(integral constant) with the first of the numbers that is enough.
template <int number, int... others, typename F>
void with_classes(int classes, ClassNumbers<number, others...>, const F& f) {
  if constexpr (sizeof...(others) > 0)
    if (classes > number) return with_classes(classes, ClassNumbers<others...>(), f);
  f(std::integral_constant<int, number>());
}

// Whether class c is there: a kernel for fewer classes would be asked where one of the fewest is not.
template <int max_classes>
__device__ __forceinline__ bool there(int c, int classes) {
  constexpr int fewest = fewest_classes(max_classes, RegisterClasses());
  return c < fewest || c < classes;
}

constexpr int terms = 3;           // loss, target part, non-target part; class_kl has the first alone
constexpr int sums = terms + 1;    // and the denominator
constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

// The call's numbers in the type of the arithmetic; on the device a conversion takes as long as an exponential.
template <typename A>
struct Numbers {
  A target_weight, nontarget_weight, temperature;
  A to_base_2;  // what logits are multiplied by; of the temperature
};

struct PixelLoss {
  Planes student;              // [B, C, N], or [B, C, low pixels] when it is upsampled
  Planes teacher;              // [B, C, N]
  Planes gradient;             // like the student; data == nullptr: only the value is wanted
  const void* target;          // [B, N] or nullptr
  Type target_type;
  const void* weight;          // [B, N] in the type of the arithmetic, or nullptr
  void* per_pixel[terms];      // [B, N] each, in the type of the arithmetic, or nullptr
  double* block_sums;          // [blocks, sums] or nullptr
  Numbers<float> single;
  Numbers<double> twice;
  int64_t ignore_index, images, pixels;
  int classes;

  template <typename A>
  __device__ __forceinline__ const Numbers<A>& numbers() const {
    if constexpr (std::is_same_v<A, double>)
      return twice;
    else
      return single;
  }
  void set_numbers(double target_weight, double nontarget_weight, double temperature) {
    twice = {target_weight, nontarget_weight, temperature, log2_e / temperature};
    single = {static_cast<float>(twice.target_weight), static_cast<float>(twice.nontarget_weight),
              static_cast<float>(twice.temperature), static_cast<float>(twice.to_base_2)};
  }
};

// A pixel's label, -1 where it is ignored, and weight, 0 there. A label that names no class makes the loss NaN.
template <bool decoupled, typename A>
__device__ __forceinline__ void load_label(const PixelLoss& loss, int64_t pixel, int& label, A& weight) {
  label = 0;
  weight = loss.weight == nullptr ? A(1) : static_cast<const A*>(loss.weight)[pixel];
  if (loss.target != nullptr) {
    int64_t y;
    switch (loss.target_type) {
      case Type::int64: y = static_cast<const int64_t*>(loss.target)[pixel]; break;
      case Type::int32: y = static_cast<const int32_t*>(loss.target)[pixel]; break;
      case Type::int16: y = static_cast<const int16_t*>(loss.target)[pixel]; break;
      case Type::int8: y = static_cast<const int8_t*>(loss.target)[pixel]; break;
      default: y = static_cast<const uint8_t*>(loss.target)[pixel];
    }
    const bool inside = y >= 0 && y < loss.classes;
    label = y == loss.ignore_index ? -1 : inside ? static_cast<int>(y) : 0;
    if (decoupled && label >= 0 && !inside && weight != A(0)) weight = A(NAN);
  }
  if (weight == A(0)) label = -1;  // weight 0 leaves the loss whatever the logits are
  if (label < 0) weight = A(0);
}

// What a pixel's exponentials leave behind, over all classes or, in decoupled_kl, those that are not the label's.
template <typename A>
struct PixelSums {
  A max_s = -infinity<A>(), max_t = -infinity<A>();
  A sum_s = A(0), sum_t = A(0);
  A own_s = A(0), own_t = A(0);  // the label's logits
  A weighted = A(0);             // sum of the teacher's exponentials times differences, see weighted_difference
};

// What is added to multiplied logits. Without any class the maximum counts as 0.
template <typename A>
__device__ __forceinline__ A shift_of(A max, A to_base_2) {
  return max == -infinity<A>() ? A(0) : -max * to_base_2;
}

// The value and what the gradient is made of. The label's logits are shifted like the others.
template <bool decoupled, typename A>
struct PixelTerms {
  TargetTerm<A> target;
  Coefficients<A> coefficient;
  A scale, inverse_t;

  __device__ __forceinline__ PixelTerms(const PixelLoss& loss, const PixelSums<A>& pixel, A weight, bool valid) {
    const Numbers<A>& numbers = loss.numbers<A>();
    scale = weight * numbers.temperature;
    target = {A(0), A(0)};
    if (decoupled) {
      // an error in these moves a network by as little, and what is made of both stays exact for equal ones
      const A d_s = pixel.own_s - near_log2(pixel.sum_s);
      const A d_t = pixel.own_t - near_log2(pixel.sum_t);
      target = target_term(d_s, d_t, A(ln_2), [](A x) { return exp2_nonpositive(x); });
    }
    inverse_t = inverse_of_sum(pixel.sum_t);
    coefficient = decoupled_coefficients(inverse_of_sum(pixel.sum_s), inverse_t, target.gradient, numbers.target_weight,
                                         numbers.nontarget_weight, scale);
    coefficient.target = valid ? coefficient.target : A(0);
  }

  __device__ __forceinline__ void values(const PixelLoss& loss, const PixelSums<A>& pixel, bool valid,
                                         A (&value)[terms]) const {
    const Numbers<A>& numbers = loss.numbers<A>();
    const A nontarget = divergence(pixel.sum_s, pixel.sum_t, inverse_t, pixel.weighted * A(ln_2));
    // a part of weight 0 is left out, even an infinite one
    const A total = (numbers.target_weight == A(0) ? A(0) : numbers.target_weight * target.value) +
                    (numbers.nontarget_weight == A(0) ? A(0) : numbers.nontarget_weight * nontarget);
    const A factor = scale * numbers.temperature;
    value[0] = valid ? factor * total : A(0);
    value[1] = valid ? factor * target.value : A(0);
    value[2] = valid ? factor * nontarget : A(0);
  }

  // from exponentials of the shifted logits
  __device__ __forceinline__ A gradient(A e_s, A e_t, bool own, bool valid) const {
    const A other = e_s * coefficient.student + e_t * coefficient.teacher;
    return (decoupled && own) || !valid ? coefficient.target : other;
  }
};

// The same number, of which the compiler does not know that it is: what it made of it before, it has to make again, where it
// would hold a comparison with every class from the first to the last.
template <typename A>
__device__ __forceinline__ A again(A x) {
#if MEDKD_DEVICE_CODE
  asm volatile("" : "+f"(x));
#endif
  return x;
}

// `count` pixels whose logits are in registers, -infinity in the place of a class that is not there; the student's become the
// gradient.
template <bool decoupled, int max_classes, int count>
__device__ __forceinline__ void pixels_in_registers(const PixelLoss& loss, const int (&label)[count],
                                                    const float (&weight)[count], float (&s)[max_classes][count],
                                                    float (&t)[max_classes][count], float (&value)[count][terms]) {
  const float to_base_2 = loss.single.to_base_2;
#pragma unroll
  for (int p = 0; p < count; ++p) {
    PixelSums<float> pixel;
    const float own_class = again(static_cast<float>(label[p]));  // of an integer the compiler would make an index into s and t
#pragma unroll
    for (int c = 0; c < max_classes; ++c) {
      if (decoupled) {  // from here on the label's class is absent: its exponentials are 0
        const bool own = own_class == static_cast<float>(c);
        pixel.own_s = own ? s[c][p] : pixel.own_s;
        pixel.own_t = own ? t[c][p] : pixel.own_t;
        s[c][p] = own ? -infinity<float>() : s[c][p];
        t[c][p] = own ? -infinity<float>() : t[c][p];
      }
      pixel.max_s = fmaxf(pixel.max_s, s[c][p]);  // one instruction, and NaN shows in the exponentials
      pixel.max_t = fmaxf(pixel.max_t, t[c][p]);
    }
    float shift_s = shift_of(pixel.max_s, to_base_2), shift_t = shift_of(pixel.max_t, to_base_2);
    if (fabsf(shift_s) > 1e6f || fabsf(shift_t) > 1e6f) {  // rounded, they leave the maxima far from 0
      const float max_s = shift_s == 0 ? 0.0f : pixel.max_s, max_t = shift_t == 0 ? 0.0f : pixel.max_t;
#pragma unroll
      for (int c = 0; c < max_classes; ++c) {
        s[c][p] -= max_s;
        t[c][p] -= max_t;
      }
      pixel.own_s -= max_s;
      pixel.own_t -= max_t;
      shift_s = shift_t = 0;
    }
    pixel.own_s = fmaf(pixel.own_s, to_base_2, shift_s);
    pixel.own_t = fmaf(pixel.own_t, to_base_2, shift_t);
#pragma unroll
    for (int c = 0; c < max_classes; ++c) {
      const float x_s = fmaf(s[c][p], to_base_2, shift_s), x_t = fmaf(t[c][p], to_base_2, shift_t);
      s[c][p] = exp2_nonpositive(x_s);
      t[c][p] = exp2_nonpositive(x_t);
      pixel.weighted += weighted_difference(t[c][p], x_t, x_s);
      pixel.sum_s += s[c][p];
      pixel.sum_t += t[c][p];
    }
    const bool valid = label[p] >= 0;
    const PixelTerms<decoupled, float> result(loss, pixel, weight[p], valid);
    result.values(loss, pixel, valid, value[p]);
    if (loss.gradient.data == nullptr) continue;
    const float own_again = again(own_class);
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
      s[c][p] = result.gradient(s[c][p], t[c][p], own_again == static_cast<float>(c), valid);
  }
}

// Adds one logit to a maximum and the sum of exponentials shifted by it.
template <typename A>
__device__ __forceinline__ void add_logit(A x, A& max, A& sum) {
  if (x > max) {
    sum = sum * exp2_nonpositive(max - x) + A(1);
    max = x;
  } else if (!(x == -infinity<A>())) {
    sum += exp2_nonpositive(x - max);
  }
}

// The same of the lanes of a warp together.
template <typename A>
__device__ __forceinline__ void join_lanes(A& max, A& sum) {
  const A all = warp_max(max);
  sum = warp_sum(max == -infinity<A>() ? A(0) : sum * exp2_nonpositive(max - all));
  max = all;
}

// A pixel with any number of classes, taken by one lane or by a warp, in two sweeps over the classes. load(first, s, t) fetches
// the logits of `batch` classes, first, first + lanes, ...; store(c, gradient) is called for each class of the lane's.
template <typename A>
constexpr int batch = sizeof(A) == sizeof(float) ? 4 : 1;

template <bool decoupled, int lanes, typename A, typename Load, typename Store>
__device__ __forceinline__ void pixel_in_sweeps(const PixelLoss& loss, int label, A weight, const Load& load,
                                                const Store& store, A (&value)[terms]) {
  const int first = lanes == 1 ? 0 : lane_index();
  PixelSums<A> pixel;
  for (int c = first; c < loss.classes; c += batch<A> * lanes) {
    A s[batch<A>], t[batch<A>];
    load(c, s, t);
#pragma unroll
    for (int i = 0; i < batch<A>; ++i) {
      if (c + i * lanes >= loss.classes) continue;
      if (decoupled && c + i * lanes == label) {
        pixel.own_s = s[i];
        pixel.own_t = t[i];
      } else {
        add_logit(s[i], pixel.max_s, pixel.sum_s);
        add_logit(t[i], pixel.max_t, pixel.sum_t);
      }
    }
  }
  if (lanes > 1) {
    join_lanes(pixel.max_s, pixel.sum_s);
    join_lanes(pixel.max_t, pixel.sum_t);
    if (decoupled && label >= 0) {
      pixel.own_s = __shfl_sync(all_lanes, pixel.own_s, label % warp_size);
      pixel.own_t = __shfl_sync(all_lanes, pixel.own_t, label % warp_size);
    }
  }
  pixel.max_s = pixel.max_s == -infinity<A>() ? A(0) : pixel.max_s;
  pixel.max_t = pixel.max_t == -infinity<A>() ? A(0) : pixel.max_t;
  pixel.own_s -= pixel.max_s;
  pixel.own_t -= pixel.max_t;
  const PixelTerms<decoupled, A> result(loss, pixel, weight, label >= 0);
  for (int c = first; c < loss.classes; c += batch<A> * lanes) {
    A s[batch<A>], t[batch<A>];
    load(c, s, t);
#pragma unroll
    for (int i = 0; i < batch<A>; ++i) {
      if (c + i * lanes >= loss.classes) continue;
      const bool own = decoupled && c + i * lanes == label;
      const A x_s = s[i] - pixel.max_s, x_t = t[i] - pixel.max_t;
      const A e_s = exp2_nonpositive(x_s), e_t = exp2_nonpositive(x_t);
      pixel.weighted += own ? A(0) : weighted_difference(e_t, x_t, x_s);
      store(c + i * lanes, result.gradient(e_s, e_t, own, label >= 0));
    }
  }
  if (lanes > 1) pixel.weighted = warp_sum(pixel.weighted);
  result.values(loss, pixel, label >= 0, value);
}

// A warp's sums of four numbers that each lane has: lane 8 k gets the k-th. At every step half of what is left goes to the other
// half of the lanes, so it takes six shuffles where warp_sum takes five for each number.
__device__ __forceinline__ double warp_sums(const double (&x)[sums]) {
  static_assert(sums == 4);
  const bool last_two = lane_index() & 16, second = lane_index() & 8;
  double pair[2];
#pragma unroll
  for (int k = 0; k < 2; ++k)
    pair[k] = (last_two ? x[k + 2] : x[k]) + __shfl_xor_sync(all_lanes, last_two ? x[k] : x[k + 2], 16);
  double sum = (second ? pair[1] : pair[0]) + __shfl_xor_sync(all_lanes, second ? pair[0] : pair[1], 8);
#pragma unroll
  for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(all_lanes, sum, distance);
  return sum;
}

// Writes a block's sums, the warps' in their order. `scratch` is shared memory for `sums` values a warp.
__device__ __forceinline__ void write_sums(const PixelLoss& loss, const double (&sum)[sums], double* scratch) {
  if (loss.block_sums == nullptr) return;
  const int warps = static_cast<int>(blockDim.x) / warp_size;
  const double of_warp = warp_sums(sum);
  if (lane_index() % 8 == 0) scratch[lane_index() / 8 * warps + warp_index()] = of_warp;
  __syncthreads();
  if (threadIdx.x >= sums) return;
  double total = 0;
  for (int warp = 0; warp < warps; ++warp) total += scratch[static_cast<int>(threadIdx.x) * warps + warp];
  loss.block_sums[int64_t{blockIdx.x} * sums + threadIdx.x] = total;
}

// `sum` may be of the arithmetic's type where it is over a few pixels.
template <bool decoupled, typename A, typename Sum>
__device__ __forceinline__ void add_pixel(const PixelLoss& loss, int64_t pixel, const A (&value)[terms], A weight,
                                          Sum (&sum)[sums]) {
#pragma unroll
  for (int i = 0; i < (decoupled ? terms : 1); ++i) {
    sum[i] += static_cast<Sum>(value[i]);
    if (loss.per_pixel[i] != nullptr) static_cast<A*>(loss.per_pixel[i])[pixel] = value[i];
  }
  sum[terms] += static_cast<Sum>(weight);
}

// Where the reduced loss goes, each [] in the type of the arithmetic, or nullptr.
struct PixelLossOutputs {
  void* term[terms];
  void* scale;  // 1 / denominator, or 1
  bool mean;
};

// One block adds up the sums of all blocks: every thread those of every blockDim-th block, then the threads.
template <typename A>
__device__ __forceinline__ void finish(const double* block_sums, int64_t blocks, const PixelLossOutputs& outputs,
                                       double* scratch) {
  double sum[sums] = {};
  constexpr int at_once = 4;  // blocks whose sums are on their way together
  for (int64_t first = threadIdx.x; first < blocks; first += at_once * static_cast<int64_t>(blockDim.x)) {
    Pack<double, 2> half[at_once][2] = {};
#pragma unroll
    for (int i = 0; i < at_once; ++i)
      if (const int64_t block = first + i * static_cast<int64_t>(blockDim.x); block < blocks) {
        half[i][0] = load_pack<2>(block_sums + block * sums);
        half[i][1] = load_pack<2>(block_sums + block * sums + 2);
      }
#pragma unroll
    for (int i = 0; i < at_once; ++i)
#pragma unroll
      for (int k = 0; k < sums; ++k) sum[k] += half[i][k / 2].value[k % 2];
  }
#pragma unroll
  for (int k = 0; k < sums; ++k) sum[k] = block_sum(sum[k], scratch + k * (blockDim.x / warp_size));
  if (threadIdx.x > 0) return;
  const double denominator = sum[terms];
  const double scale = !outputs.mean ? 1 : denominator == 0 ? 0 : 1 / denominator;
  *static_cast<A*>(outputs.scale) = static_cast<A>(scale);
#pragma unroll
  for (int k = 0; k < terms; ++k)
    if (outputs.term[k] != nullptr) *static_cast<A*>(outputs.term[k]) = static_cast<A>(scale == 0 ? 0 : sum[k] * scale);
}

template <typename A>
__global__ void finish_kernel(const double* block_sums, int64_t blocks, PixelLossOutputs outputs) {
  finish<A>(block_sums, blocks, outputs, shared_memory<double>());
}

}  // namespace medkd
