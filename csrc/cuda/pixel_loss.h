// The per-pixel losses on the device: decoupled_kl, and class_kl, which is its non-target part over all classes.
//
// Up to 32 classes a thread holds its pixels' logits in registers, so each tensor is read once; with more, or in double, it
// goes over the classes twice, first for the sums of exponentials, then for value and gradient. A block leaves its sums in
// double; `finish` adds them up in the order of the blocks.
//
// Logits are in units of 1 / log2(e) here, see exp2_nonpositive.
#pragma once

#include "../math/decoupled_kl.h"
#include "launch.h"
#include "planes.h"

namespace medkd {

constexpr int terms = 3;           // loss, target part, non-target part; class_kl has the first alone
constexpr int sums = terms + 1;    // and the denominator
constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

struct PixelLoss {
  Planes student;              // [B, C, N], or [B, C, low pixels] when it is upsampled
  Planes teacher;              // [B, C, N]
  Planes gradient;             // like the student; data == nullptr: only the value is wanted
  const void* target;          // [B, N] or nullptr
  Type target_type;
  const void* weight;          // [B, N] in the type of the arithmetic, or nullptr
  void* per_pixel[terms];      // [B, N] each, in the type of the arithmetic, or nullptr
  double* block_sums;          // [blocks, sums] or nullptr
  double target_weight, nontarget_weight, temperature;
  double to_base_2;            // what logits are multiplied by when they are loaded; of the temperature
  int64_t ignore_index, images, pixels;
  int classes;

  void take_temperature(double of_both) {
    temperature = of_both;
    to_base_2 = log2_e / of_both;
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

// The value and what the gradient is made of. No class but the label's: the maxima count as 0.
template <bool decoupled, typename A>
struct PixelTerms {
  TargetTerm<A> target;
  Coefficients<A> coefficient;
  A scale, inverse_t;

  __device__ __forceinline__ PixelTerms(const PixelLoss& loss, const PixelSums<A>& pixel, A weight) {
    scale = weight * static_cast<A>(loss.temperature);
    target = {A(0), A(0)};
    if (decoupled) {
      // an error in these moves a network by as little, and what is made of both stays exact for equal ones
      const A d_s = (pixel.own_s - pixel.max_s - near_log2(pixel.sum_s)) * A(ln_2);
      const A d_t = (pixel.own_t - pixel.max_t - near_log2(pixel.sum_t)) * A(ln_2);
      target = target_term(d_s, d_t);
    }
    inverse_t = inverse_of_sum(pixel.sum_t);
    coefficient = decoupled_coefficients(inverse_of_sum(pixel.sum_s), inverse_t, target.gradient,
                                         static_cast<A>(loss.target_weight), static_cast<A>(loss.nontarget_weight), scale);
  }

  __device__ __forceinline__ void values(const PixelLoss& loss, const PixelSums<A>& pixel, bool valid,
                                         A (&value)[terms]) const {
    const A nontarget = divergence(pixel.sum_s, pixel.sum_t, inverse_t, pixel.weighted * A(ln_2));
    const A target_weight = static_cast<A>(loss.target_weight), nontarget_weight = static_cast<A>(loss.nontarget_weight);
    // a part of weight 0 is left out, even an infinite one
    const A total = (target_weight == A(0) ? A(0) : target_weight * target.value) +
                    (nontarget_weight == A(0) ? A(0) : nontarget_weight * nontarget);
    const A factor = scale * static_cast<A>(loss.temperature);
    value[0] = valid ? factor * total : A(0);
    value[1] = valid ? factor * target.value : A(0);
    value[2] = valid ? factor * nontarget : A(0);
  }

  // from exponentials of the shifted logits
  __device__ __forceinline__ A gradient(A e_s, A e_t, bool own, bool valid) const {
    const A other = e_s * coefficient.student + e_t * coefficient.teacher;
    return !valid ? A(0) : decoupled && own ? coefficient.target : other;
  }
};

// `count` pixels whose logits are in registers; the student's become the gradient.
template <bool decoupled, int max_classes, int count, typename A>
__device__ __forceinline__ void pixels_in_registers(const PixelLoss& loss, const int (&label)[count],
                                                    const A (&weight)[count], A (&s)[max_classes][count],
                                                    A (&t)[max_classes][count], A (&value)[count][terms]) {
  PixelSums<A> pixel[count];
  A own_class[count];  // not an integer, whose comparisons with every class the compiler would make an index into s and t of
#pragma unroll
  for (int p = 0; p < count; ++p) own_class[p] = static_cast<A>(label[p]);
#pragma unroll
  for (int c = 0; c < max_classes; ++c)
    if (c < loss.classes)
#pragma unroll
      for (int p = 0; p < count; ++p) {
        if (decoupled) {  // from here on the label's class is absent: its exponentials are 0
          const bool own = own_class[p] == A(c);
          pixel[p].own_s = own ? s[c][p] : pixel[p].own_s;
          pixel[p].own_t = own ? t[c][p] : pixel[p].own_t;
          s[c][p] = own ? -infinity<A>() : s[c][p];
          t[c][p] = own ? -infinity<A>() : t[c][p];
        }
        pixel[p].max_s = fmax(pixel[p].max_s, s[c][p]);  // one instruction, and NaN shows in the exponentials
        pixel[p].max_t = fmax(pixel[p].max_t, t[c][p]);
      }
#pragma unroll
  for (int p = 0; p < count; ++p) {
    pixel[p].max_s = pixel[p].max_s == -infinity<A>() ? A(0) : pixel[p].max_s;
    pixel[p].max_t = pixel[p].max_t == -infinity<A>() ? A(0) : pixel[p].max_t;
  }
#pragma unroll
  for (int c = 0; c < max_classes; ++c)
    if (c < loss.classes)
#pragma unroll
      for (int p = 0; p < count; ++p) {
        const A x_s = s[c][p] - pixel[p].max_s, x_t = t[c][p] - pixel[p].max_t;
        s[c][p] = exp2_nonpositive(x_s);
        t[c][p] = exp2_nonpositive(x_t);
        pixel[p].weighted += weighted_difference(t[c][p], x_t, x_s);
        pixel[p].sum_s += s[c][p];
        pixel[p].sum_t += t[c][p];
      }
#pragma unroll
  for (int p = 0; p < count; ++p) {
    const PixelTerms<decoupled, A> result(loss, pixel[p], weight[p]);
    result.values(loss, pixel[p], label[p] >= 0, value[p]);
    if (loss.gradient.data == nullptr) continue;
#pragma unroll
    for (int c = 0; c < max_classes; ++c)  // also for classes that are not there, for which nobody asks: cheaper than a condition
      s[c][p] = result.gradient(s[c][p], t[c][p], own_class[p] == A(c), label[p] >= 0);
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
  const PixelTerms<decoupled, A> result(loss, pixel, weight);
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

template <typename A>
__device__ __forceinline__ void add_pixel(const PixelLoss& loss, int64_t pixel, const A (&value)[terms], A weight,
                                          double (&sum)[sums]) {
#pragma unroll
  for (int i = 0; i < terms; ++i) {
    sum[i] += static_cast<double>(value[i]);
    if (loss.per_pixel[i] != nullptr) static_cast<A*>(loss.per_pixel[i])[pixel] = value[i];
  }
  sum[terms] += static_cast<double>(weight);
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
