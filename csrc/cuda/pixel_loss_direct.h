// A per-pixel loss whose student has the teacher's resolution: logits in registers, or in two sweeps.
#pragma once

#include "pixel_loss.h"

namespace medkd {

// How a block reads or writes the logits of its pixels.
enum class Access : int32_t {
  packed,   // pixels lie side by side and aligned: a thread's neighbours in one access
  strided,  // one at a time, lanes take neighbouring pixels
  rows,     // a pixel's classes lie side by side and then the next pixel's: through shared memory, 4 bytes a lane
};

struct DirectLoss {
  PixelLoss loss;
  Access student, teacher, gradient;
  bool neighbours;         // a thread's pixels lie side by side, or else a block's width apart
  int64_t tiles;           // of an image
  int64_t tiles_of_block;  // one behind another
};

// Blocks on a multiprocessor are asked for below: left alone, the compiler spills a few registers to fit one block more.
constexpr int direct_threads = 128;

// Pixels of a thread: as many as leave room for both networks' logits in 64 registers.
__host__ __device__ constexpr int pixels_per_thread(int max_classes) { return max_classes <= 6 ? 4 : max_classes <= 16 ? 2 : 1; }

// Rows in shared memory begin at an odd distance, so that the lanes that read one class of theirs meet no bank twice.
__host__ __device__ constexpr int row_pitch(int classes) { return classes % 2 ? classes : classes + 1; }

// The place in shared memory of element e of rows that lie without gaps in global memory.
struct RowPlaces {
  int gap;            // 0 or 1 behind every row
  unsigned multiple;  // e / classes is the upper half of e * multiple for e < 2^16 and classes <= 32

  __device__ explicit RowPlaces(int classes)
      : gap(row_pitch(classes) - classes), multiple(0xffffffffu / static_cast<unsigned>(classes) + 1) {}
  __device__ __forceinline__ int operator()(int e) const {
    return gap == 0 ? e : e + static_cast<int>(__umulhi(static_cast<unsigned>(e), multiple));
  }
};

// 4 bytes of T. With two elements in them the row has an even number, or no gap.
template <typename T>
constexpr int word = sizeof(T) < 4 ? 4 / static_cast<int>(sizeof(T)) : 1;

// Rows of `elements` elements from global to shared memory. What is left of the last word is moved by itself.
template <typename T>
__device__ __forceinline__ void load_rows(const T* from, int elements, const RowPlaces& place, float* rows) {
#pragma unroll 8
  for (int e = static_cast<int>(threadIdx.x) * word<T>; e + word<T> <= elements; e += direct_threads * word<T>) {
    const Pack<T, word<T>> pack = load_pack<word<T>>(from + e);
    const int to = place(e);
#pragma unroll
    for (int k = 0; k < word<T>; ++k) rows[to + k] = widen(pack.value[k]);
  }
  if (elements % word<T> != 0 && threadIdx.x == 0) rows[place(elements - 1)] = widen(from[elements - 1]);
}

template <typename T>
__device__ __forceinline__ void store_rows(const float* rows, int elements, const RowPlaces& place, T* to) {
#pragma unroll 4
  for (int e = static_cast<int>(threadIdx.x) * word<T>; e + word<T> <= elements; e += direct_threads * word<T>) {
    Pack<T, word<T>> pack;
    const int from = place(e);
#pragma unroll
    for (int k = 0; k < word<T>; ++k) narrow(rows[from + k], pack.value[k]);
    store_pack(to + e, pack);
  }
  if (elements % word<T> != 0 && threadIdx.x == 0) narrow(rows[place(elements - 1)], to[elements - 1]);
}

struct Range {
  int64_t begin, end;
};

// Counted over all images.
__device__ __forceinline__ Range tiles_of_this_block(const DirectLoss& direct) {
  const int64_t all = direct.loss.images * direct.tiles, begin = blockIdx.x * direct.tiles_of_block;
  return {begin, all - begin < direct.tiles_of_block ? all : begin + direct.tiles_of_block};
}

// A block's tile of pixels and this thread's among them.
template <int count>
struct Tile {
  int64_t image, first;
  int length;     // pixels of the tile within the image
  int own, step;  // this thread's pixels are own, own + step, ...

  // `index` counts the tiles of all images.
  __device__ Tile(const DirectLoss& direct, int64_t index) {
    image = index / direct.tiles;
    move_to((index - image * direct.tiles) * size, direct.loss.pixels);
    const int thread = static_cast<int>(threadIdx.x);
    own = direct.neighbours ? thread * count : thread;
    step = direct.neighbours ? 1 : direct_threads;
  }
  __device__ __forceinline__ void next(const DirectLoss& direct) {
    if (first + size < direct.loss.pixels) return move_to(first + size, direct.loss.pixels);
    ++image;
    move_to(0, direct.loss.pixels);
  }

 private:
  static constexpr int size = direct_threads * count;

  __device__ __forceinline__ void move_to(int64_t to, int64_t pixels) {
    first = to;
    length = static_cast<int>(pixels - to < size ? pixels - to : size);
  }
};

// A thread's logits as they lie in memory: a pack in a class's first words, or an element in each. Nobody looks at one before
// all of both networks are on their way: a load that is waited for where it stands leaves the memory idle.
template <int max_classes, int count>
using RawLogits = uint32_t[max_classes][count];

// An element's word, and a word's k-th element. No logits are double here.
template <typename T>
__device__ __forceinline__ uint32_t word_of(T x) {
  if constexpr (sizeof(T) == 2)
    return x.bits;
  else
    return __float_as_uint(static_cast<float>(x));
}
template <typename T>
__device__ __forceinline__ T element_of(uint32_t bits, int k) {
  if constexpr (sizeof(T) == 2)
    return T{static_cast<uint16_t>(bits >> 16 * k)};
  else
    return __uint_as_float(bits);
}

// A word of logits that are -infinity: those of a class that is not there.
template <typename T>
constexpr uint32_t absent_word = sizeof(T) >= 4 ? 0xff800000u : std::is_same_v<T, BFloat16> ? 0xff80ff80u : 0xfc00fc00u;

// Zeros stay where the pixel is not there, and where the logits are in shared memory.
template <int max_classes, int count>
__device__ __forceinline__ void fetch_logits(const Planes& x, Access access, const Tile<count>& tile, int classes,
                                             RawLogits<max_classes, count>& raw) {
  if (access == Access::rows) return;
  const int64_t offset = offset_of(x, tile.image, tile.first + tile.own);
  with_type<float>(x.type, [&](auto zero) {
    using T = decltype(zero);
    const T* from = static_cast<const T*>(x.data) + offset;  // moves on: a product for every class's address costs more
    if constexpr (constexpr int words = count / word<T>; words > 0)
      if (access == Access::packed) {
        if (tile.own >= tile.length) return;
#pragma unroll
        for (int c = 0; c < max_classes; ++c, from += x.stride_c) {
          Pack<uint32_t, words> pack;
#pragma unroll
          for (int k = 0; k < words; ++k) pack.value[k] = absent_word<T>;
          if (there<max_classes>(c, classes)) pack = load_pack<words>(reinterpret_cast<const uint32_t*>(from));
#pragma unroll
          for (int k = 0; k < words; ++k) raw[c][k] = pack.value[k];
        }
        return;
      }
#pragma unroll
    for (int c = 0; c < max_classes; ++c, from += x.stride_c)
#pragma unroll
      for (int p = 0; p < count; ++p) {
        if (tile.own + p * tile.step >= tile.length) continue;
        raw[c][p] = absent_word<T>;
        if (there<max_classes>(c, classes)) raw[c][p] = word_of(from[p * tile.step * x.stride_n]);
      }
  });
}

// All classes that there may be: a condition would come between the loads.
template <int max_classes, int count>
__device__ __forceinline__ void widen_logits(const Planes& x, Access access, const Tile<count>& tile, int classes,
                                             const float* rows, const RawLogits<max_classes, count>& raw,
                                             float (&out)[max_classes][count]) {
  if (access == Access::rows) {
    const int pitch = row_pitch(classes);
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
#pragma unroll
      for (int p = 0; p < count; ++p)
        out[c][p] = there<max_classes>(c, classes) ? rows[(tile.own + p * tile.step) * pitch + c] : -infinity<float>();
    return;
  }
  with_type<float>(x.type, [&](auto zero) {
    using T = decltype(zero);
    const bool packs = access == Access::packed && count % word<T> == 0;
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
#pragma unroll
      for (int p = 0; p < count; ++p)
        out[c][p] = widen(packs ? element_of<T>(raw[c][p / word<T>], p % word<T>) : element_of<T>(raw[c][p], 0));
  });
}

template <int max_classes, int count>
__device__ __forceinline__ void store_gradient(const Planes& x, Access access, const Tile<count>& tile, int classes,
                                               float* rows, const float (&in)[max_classes][count]) {
  if (access == Access::rows) {
    const int pitch = row_pitch(classes);
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
      if (there<max_classes>(c, classes))
#pragma unroll
        for (int p = 0; p < count; ++p) rows[(tile.own + p * tile.step) * pitch + c] = in[c][p];
    return;
  }
  const int64_t offset = offset_of(x, tile.image, tile.first + tile.own);
  with_type<float>(x.type, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(x.data) + offset;
    if (access == Access::packed) {
      if (tile.own >= tile.length) return;
#pragma unroll
      for (int c = 0; c < max_classes; ++c, to += x.stride_c)
        if (there<max_classes>(c, classes)) {
          Pack<T, count> pack;
#pragma unroll
          for (int p = 0; p < count; ++p) narrow(in[c][p], pack.value[p]);
          store_whole(to, pack);
        }
      return;
    }
#pragma unroll
    for (int c = 0; c < max_classes; ++c, to += x.stride_c)
      if (there<max_classes>(c, classes))
#pragma unroll
        for (int p = 0; p < count; ++p)
          if (tile.own + p * tile.step < tile.length) narrow(in[c][p], to[p * tile.step * x.stride_n]);
  });
}

// Shared memory: the block's sums, then the student's rows, which become the gradient's, then the teacher's.
template <bool decoupled, int max_classes>
__global__ void __launch_bounds__(direct_threads, max_classes == 16 ? 2 : 3) register_kernel(DirectLoss direct) {
  constexpr int count = pixels_per_thread(max_classes);
  const PixelLoss& loss = direct.loss;
  const int classes = loss.classes;
  double* scratch = shared_memory<double>();
  float* student_rows = reinterpret_cast<float*>(scratch + sums * (direct_threads / warp_size));
  float* teacher_rows = student_rows + (direct.student == Access::rows || direct.gradient == Access::rows
                                            ? direct_threads * count * row_pitch(classes)
                                            : 0);
  const RowPlaces place(classes);
  const Range range = tiles_of_this_block(direct);
  Tile<count> tile(direct, range.begin);
  float own_sum[sums] = {};
  for (int64_t index = range.begin; index < range.end; ++index, tile.next(direct)) {
    if (direct.student == Access::rows)
      with_type<float>(loss.student.type, [&](auto zero) {
        using T = decltype(zero);
        load_rows(static_cast<const T*>(loss.student.data) + offset_of(loss.student, tile.image, tile.first),
                  tile.length * classes, place, student_rows);
      });
    if (direct.teacher == Access::rows)
      with_type<float>(loss.teacher.type, [&](auto zero) {
        using T = decltype(zero);
        load_rows(static_cast<const T*>(loss.teacher.data) + offset_of(loss.teacher, tile.image, tile.first),
                  tile.length * classes, place, teacher_rows);
      });
    RawLogits<max_classes, count> raw_s = {}, raw_t = {};
    fetch_logits<max_classes>(loss.student, direct.student, tile, classes, raw_s);
    fetch_logits<max_classes>(loss.teacher, direct.teacher, tile, classes, raw_t);
    const int64_t first = tile.image * loss.pixels + tile.first + tile.own;  // this thread's first pixel
    int label[count];
    float weight[count];
#pragma unroll
    for (int p = 0; p < count; ++p) {
      label[p] = -1;
      weight[p] = 0;
      if (tile.own + p * tile.step < tile.length) load_label<decoupled>(loss, first + p * tile.step, label[p], weight[p]);
    }
    if (direct.student == Access::rows || direct.teacher == Access::rows) __syncthreads();
    float s[max_classes][count], t[max_classes][count], value[count][terms];
    widen_logits<max_classes>(loss.student, direct.student, tile, classes, student_rows, raw_s, s);
    widen_logits<max_classes>(loss.teacher, direct.teacher, tile, classes, teacher_rows, raw_t, t);
    pixels_in_registers<decoupled, max_classes, count>(loss, label, weight, s, t, value);
    if (loss.gradient.data != nullptr) {
      store_gradient(loss.gradient, direct.gradient, tile, classes, student_rows, s);
      if (direct.gradient == Access::rows) {
        __syncthreads();
        with_type<float>(loss.gradient.type, [&](auto zero) {
          using T = decltype(zero);
          store_rows(student_rows, tile.length * classes, place,
                     static_cast<T*>(loss.gradient.data) + offset_of(loss.gradient, tile.image, tile.first));
        });
      }
    }
#pragma unroll
    for (int p = 0; p < count; ++p)
      if (tile.own + p * tile.step < tile.length) add_pixel<decoupled>(loss, first + p * tile.step, value[p], weight[p], own_sum);
    if (direct.student == Access::rows || direct.teacher == Access::rows || direct.gradient == Access::rows) __syncthreads();
  }
  double sum[sums];
#pragma unroll
  for (int i = 0; i < sums; ++i) sum[i] = static_cast<double>(own_sum[i]);
  write_sums(loss, sum, scratch);
}

// A pixel a lane, or, where a pixel's classes lie side by side, a warp.
template <bool decoupled, int lanes, typename A>
__global__ void __launch_bounds__(direct_threads, 4) sweep_kernel(PixelLoss loss) {
  const int64_t index = (int64_t{blockIdx.x} * direct_threads + threadIdx.x) / lanes;  // over all images
  const A scale = loss.numbers<A>().to_base_2;
  double sum[sums] = {};
  if (index < loss.images * loss.pixels) {
    const int64_t image = index / loss.pixels, pixel = index - image * loss.pixels;
    int label;
    A weight, value[terms];
    load_label<decoupled>(loss, index, label, weight);
    const auto load_from = [&](const Planes& x, int first, A(&out)[batch<A>]) {
      const int64_t offset = offset_of(x, image, pixel);
      with_type<A>(x.type, [&](auto zero) {
        const auto* from = static_cast<const decltype(zero)*>(x.data) + offset;
#pragma unroll
        for (int i = 0; i < batch<A>; ++i)
          out[i] = first + i * lanes < loss.classes
                       ? rounded_product(static_cast<A>(widen(from[(first + i * lanes) * x.stride_c])), scale)
                       : A(0);
      });
    };
    const auto load = [&](int first, A(&s)[batch<A>], A(&t)[batch<A>]) {
      load_from(loss.student, first, s);
      load_from(loss.teacher, first, t);
    };
    const int64_t gradient_offset = offset_of(loss.gradient, image, pixel);
    const auto store = [&](int c, A gradient) {
      if (loss.gradient.data != nullptr)
        store_element(loss.gradient, gradient_offset + c * loss.gradient.stride_c, gradient);
    };
    pixel_in_sweeps<decoupled, lanes>(loss, label, weight, load, store, value);
    if (lanes == 1 || lane_index() == 0) add_pixel<decoupled>(loss, index, value, weight, sum);
  }
  write_sums(loss, sum, shared_memory<double>());
}

}  // namespace medkd
