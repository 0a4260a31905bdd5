// A per-pixel loss whose student is upsampled (linear, align_corners=False) on the fly.
//
// A block takes a tile of pixels along the last axis, one a thread, through a strip of rows at one depth. Between two rows of
// the student a thread keeps both in shared memory, interpolated to its pixel, and two sums over the rows it passes: of its
// gradients, and of its gradients times the lower row's weight. That is the whole adjoint of the interpolation along the rows; when the
// student's next row is reached, the adjoint along the tile is gathered from shared memory. What a block leaves for each
// of the student's pixels that it touches goes to memory of its own, and `gather_kernel` adds up blocks and depths in a
// fixed order. The upsampled logits and their gradients are never in global memory.
#pragma once

#include "../math/interpolation.h"
#include "pixel_loss.h"

namespace medkd {

// An axis of an upsampled student, cut into tiles of `tile` pixels that touch up to `touched` of the student's.
struct Axis : Interpolated<int> {
  int tile, tiles, touched;

  // The first pixel whose lower neighbour is k or behind k.
  __host__ __device__ int begin(int k) const {
    if (k <= 0) return 0;
    if (k >= low) return full;
    return static_cast<int>(ceil_div((2 * int64_t{k} + 1) * full - low, 2 * int64_t{low}));
  }
};

struct LinesLoss {
  PixelLoss loss;
  Axis z, y, x;
  void* partial;  // [B, z.full, y.tiles, x.tiles, y.touched, C, x.touched] in the type of the arithmetic
  int chunk;      // classes whose gradient a block of the sweeping kernel makes
};

constexpr int most_line_threads = 256;

// A class at -infinity is interpolated as a number that no logit reaches (0 times -infinity is no number), and is -infinity
// again wherever a neighbour had it.
template <typename A>
__device__ __forceinline__ A finite_absent(A x) {
  return x < A(-1e30) ? A(-1e30) : x;
}
template <typename A>
__device__ __forceinline__ A absent_again(A x) {
  return x < A(-1e20) ? -infinity<A>() : x;
}

// Where a block and its threads are.
template <typename A>
struct LineTile {
  int64_t image, slot;  // slot: among the blocks of all images
  int z, first_y, last_y, first_x, length, x;
  int low_z, low_x, touched;         // of the first pixel; touched: of the student's pixels along the tile
  int low_y, last_low_y;             // the student's rows that the strip touches
  int own_low;                       // this thread's lower neighbour
  A upper_z, upper_x;
  bool inside;

  __device__ explicit LineTile(const LinesLoss& lines) {
    slot = blockIdx.x;
    int64_t rest = slot;
    first_x = static_cast<int>(rest % lines.x.tiles) * lines.x.tile;
    rest /= lines.x.tiles;
    first_y = static_cast<int>(rest % lines.y.tiles) * lines.y.tile;
    rest /= lines.y.tiles;
    z = static_cast<int>(rest % lines.z.full);
    image = rest / lines.z.full;
    last_y = min(first_y + lines.y.tile, lines.y.full);
    length = min(lines.x.tile, lines.x.full - first_x);
    x = min(first_x + static_cast<int>(threadIdx.x), first_x + length - 1);
    inside = static_cast<int>(threadIdx.x) < length;
    low_z = lines.z.lower(z);
    low_y = lines.y.lower(first_y);
    last_low_y = min(lines.y.lower(last_y - 1) + 1, lines.y.low - 1);
    low_x = lines.x.lower(first_x);
    touched = min(lines.x.lower(first_x + length - 1) + 2, lines.x.low) - low_x;
    own_low = lines.x.lower(x);
    upper_z = lines.z.upper_weight<A>(z);
    upper_x = lines.x.upper_weight<A>(x);
  }
};

// Shared memory of a block. Every `columns` array has a column a thread, [classes, pitch].
template <typename A>
struct LineMemory {
  double* scratch;
  A* upper;      // [threads], upper weights of the pixels
  A* columns[3];
  int* bounds;   // [touched + 1]: pixels bounds[k] to bounds[k + 1] of the tile lie between k and k + 1 of the student's
  int pitch;

  __device__ LineMemory(int classes, int arrays) {
    pitch = static_cast<int>(blockDim.x) + 1;  // threads that take the classes of one pixel meet no bank twice
    scratch = shared_memory<double>();
    upper = reinterpret_cast<A*>(scratch + sums * (blockDim.x / warp_size));
    A* next = upper + blockDim.x;
    for (int i = 0; i < 3; ++i, next += i <= arrays ? classes * pitch : 0) columns[i] = next;
    bounds = reinterpret_cast<int*>(next);
  }

  __device__ void prepare(const LinesLoss& lines, const LineTile<A>& tile) const {
    const int thread = static_cast<int>(threadIdx.x);
    upper[thread] = tile.upper_x;
    for (int k = thread; k <= tile.touched; k += static_cast<int>(blockDim.x))
      bounds[k] = min(max(lines.x.begin(tile.low_x + k) - tile.first_x, 0), tile.length);
    __syncthreads();
  }
};

inline std::size_t line_memory_bytes(const LinesLoss& lines, int threads, int classes, int arrays, std::size_t size) {
  return sums * (threads / warp_size) * sizeof(double) + threads * size +
         static_cast<std::size_t>(arrays) * classes * (threads + 1) * size + (lines.x.touched + 1) * sizeof(int);
}

// The adjoint along the tile of `columns`, into the block's part of lines.partial for the student's row `low_y`.
template <typename A>
__device__ __forceinline__ void gather_line(const LinesLoss& lines, const LineTile<A>& tile, const LineMemory<A>& memory,
                                            const A* columns, int low_y, int first_class, int classes) {
  A* out = static_cast<A*>(lines.partial) +
           (tile.slot * lines.y.touched + (low_y - tile.low_y)) * lines.loss.classes * lines.x.touched +
           static_cast<int64_t>(first_class) * lines.x.touched;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < classes * tile.touched; i += static_cast<int>(blockDim.x)) {
    const int c = i / tile.touched, k = i - c * tile.touched;
    const A* values = columns + c * memory.pitch;
    A total = A(0);
    if (k > 0)
      for (int p = memory.bounds[k - 1]; p < memory.bounds[k]; ++p) total += memory.upper[p] * values[p];
    for (int p = memory.bounds[k]; p < memory.bounds[k + 1]; ++p) total += (A(1) - memory.upper[p]) * values[p];
    out[c * lines.x.touched + k] = total;
  }
  __syncthreads();
}

// The student's row `low_y` at this thread's pixel and depth: `count` classes from `first` on.
template <int count, typename A>
__device__ __forceinline__ void load_row(const LinesLoss& lines, const LineTile<A>& tile, int low_y, int first, A scale,
                                         A (&out)[count]) {
  const Planes& student = lines.loss.student;
  const int classes = lines.loss.classes;
#pragma unroll
  for (int c = 0; c < count; ++c) out[c] = A(0);
  for (int dz = 0; dz < 2; ++dz) {
    const A weight_z = dz == 0 ? A(1) - tile.upper_z : tile.upper_z;
    if (weight_z == A(0)) continue;
    const int64_t line = static_cast<int64_t>(tile.low_z + dz) * lines.y.low + low_y;
    const int64_t offset = offset_of(student, tile.image, line * lines.x.low + tile.own_low);
    const int64_t next = tile.upper_x == A(0) ? 0 : student.stride_n;
    with_type<A>(student.type, [&](auto zero) {
      using T = decltype(zero);
      const T* from = static_cast<const T*>(student.data) + offset + first * student.stride_c;
      T left[count] = {}, right[count] = {};  // all on their way before the first is looked at
#pragma unroll
      for (int c = 0; c < count; ++c, from += student.stride_c)
        if (first + c < classes) {
          left[c] = from[0];
          right[c] = from[next];
        }
#pragma unroll
      for (int c = 0; c < count; ++c)
        out[c] += weight_z * ((A(1) - tile.upper_x) * finite_absent(static_cast<A>(widen(left[c])) * scale) +
                              tile.upper_x * finite_absent(static_cast<A>(widen(right[c])) * scale));
    });
  }
}

template <typename A>
__device__ __forceinline__ A between_rows(A above, A below, A upper) {
  return absent_again((A(1) - upper) * above + upper * below);
}

template <bool decoupled, int max_classes>
__global__ void __launch_bounds__(most_line_threads, max_classes <= 16 ? 2 : 1) line_register_kernel(LinesLoss lines) {
  const PixelLoss& loss = lines.loss;
  const LineTile<float> tile(lines);
  const LineMemory<float> memory(loss.classes, 3);
  const float scale = static_cast<float>(loss.to_base_2);
  const bool want_gradient = loss.gradient.data != nullptr;
  if (want_gradient) memory.prepare(lines, tile);
  // this thread's columns: the student's two rows; the sums of gradients times the lower row's weight, or what is gathered
  float* above = memory.columns[0] + threadIdx.x;
  float* below = memory.columns[1] + threadIdx.x;
  float* low = memory.columns[2] + threadIdx.x;
  float all[max_classes] = {};  // sums of gradients
  for (int c = 0; c < loss.classes; ++c) low[c * memory.pitch] = 0;
  const auto enter_row = [&](int low_y, float* row) {
    constexpr int at_once = 8;
    for (int c = 0; c < loss.classes; c += at_once) {
      float some[at_once];
      load_row(lines, tile, low_y, c, scale, some);
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        if (c + i < loss.classes) row[(c + i) * memory.pitch] = some[i];
    }
  };
  double sum[sums] = {};
  enter_row(tile.low_y, below);
  for (int low_y = tile.low_y; low_y <= tile.last_low_y; ++low_y) {
    const int first_y = max(lines.y.begin(low_y), tile.first_y), last_y = min(lines.y.begin(low_y + 1), tile.last_y);
    float* const free = above;
    above = below;
    below = free;
    if (first_y < last_y) enter_row(min(low_y + 1, lines.y.low - 1), below);
    for (int y = first_y; y < last_y; ++y) {
      const float upper = lines.y.upper_weight<float>(y, low_y);
      const int64_t pixel = (static_cast<int64_t>(tile.z) * lines.y.full + y) * lines.x.full + tile.x;
      int label[1];
      float weight[1], s[max_classes][1] = {}, t[max_classes][1], value[1][terms];
      load_label<decoupled>(loss, tile.image * loss.pixels + pixel, label[0], weight[0]);
      if (!tile.inside) {
        label[0] = -1;
        weight[0] = 0;
      }
      with_type<float>(loss.teacher.type, [&](auto zero) {
        using T = decltype(zero);
        const T* at = static_cast<const T*>(loss.teacher.data) + offset_of(loss.teacher, tile.image, pixel);
        T raw[max_classes] = {};  // all on their way before the first is looked at
#pragma unroll
        for (int c = 0; c < max_classes; ++c, at += loss.teacher.stride_c)
          if (c < loss.classes) raw[c] = *at;
#pragma unroll
        for (int c = 0; c < max_classes; ++c) t[c][0] = static_cast<float>(widen(raw[c])) * scale;
      });
#pragma unroll
      for (int c = 0; c < max_classes; ++c)
        if (c < loss.classes) s[c][0] = between_rows(above[c * memory.pitch], below[c * memory.pitch], upper);
      pixels_in_registers<decoupled, max_classes, 1>(loss, label, weight, s, t, value);
#pragma unroll
      for (int c = 0; c < max_classes; ++c)
        if (c < loss.classes && want_gradient) {
          all[c] += s[c][0];
          low[c * memory.pitch] += upper * s[c][0];
        }
      if (tile.inside) add_pixel(loss, tile.image * loss.pixels + pixel, value[0], weight[0], sum);
    }
    if (!want_gradient) continue;
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
      if (c < loss.classes) {
        const float next = low[c * memory.pitch];  // what belongs to the next row
        low[c * memory.pitch] = all[c] - next;
        all[c] = next;
      }
    gather_line(lines, tile, memory, memory.columns[2], low_y, 0, loss.classes);
    for (int c = 0; c < loss.classes; ++c) low[c * memory.pitch] = 0;
  }
  write_sums(loss, sum, memory.scratch);
}

// Any number of classes, in two sweeps; the sums over the rows are in shared memory. Where they have no room for all classes,
// blockIdx.y makes the gradients of some, and the first of them the value.
template <bool decoupled, typename A>
__global__ void __launch_bounds__(most_line_threads) line_sweep_kernel(LinesLoss lines) {
  const PixelLoss& loss = lines.loss;
  const LineTile<A> tile(lines);
  const int first_class = static_cast<int>(blockIdx.y) * lines.chunk;
  const int classes = min(lines.chunk, loss.classes - first_class);
  const LineMemory<A> memory(lines.chunk, 2);
  const A scale = static_cast<A>(loss.to_base_2);
  const bool want_gradient = loss.gradient.data != nullptr;
  A* all = memory.columns[0] + threadIdx.x;
  A* low = memory.columns[1] + threadIdx.x;
  if (want_gradient) {
    memory.prepare(lines, tile);
    for (int c = 0; c < classes; ++c) all[c * memory.pitch] = low[c * memory.pitch] = A(0);
  }
  double sum[sums] = {};
  for (int low_y = tile.low_y; low_y <= tile.last_low_y; ++low_y) {
    const int first_y = max(lines.y.begin(low_y), tile.first_y), last_y = min(lines.y.begin(low_y + 1), tile.last_y);
    for (int y = first_y; y < last_y; ++y) {
      const A upper = lines.y.upper_weight<A>(y, low_y);
      const int64_t pixel = (static_cast<int64_t>(tile.z) * lines.y.full + y) * lines.x.full + tile.x;
      int label;
      A weight, value[terms];
      load_label<decoupled>(loss, tile.image * loss.pixels + pixel, label, weight);
      if (!tile.inside) {
        label = -1;
        weight = A(0);
      }
      const auto load = [&](int first, A(&s)[batch<A>], A(&t)[batch<A>]) {
        A above[batch<A>], below[batch<A>];
        load_row(lines, tile, low_y, first, scale, above);
        load_row(lines, tile, min(low_y + 1, lines.y.low - 1), first, scale, below);
        with_type<A>(loss.teacher.type, [&](auto zero) {
          const auto* from =
              static_cast<const decltype(zero)*>(loss.teacher.data) + offset_of(loss.teacher, tile.image, pixel);
#pragma unroll
          for (int i = 0; i < batch<A>; ++i) {
            s[i] = between_rows(above[i], below[i], upper);
            t[i] = first + i < loss.classes ? static_cast<A>(widen(from[(first + i) * loss.teacher.stride_c])) * scale : A(0);
          }
        });
      };
      const auto store = [&](int c, A gradient) {
        const int own = c - first_class;
        if (!want_gradient || own < 0 || own >= classes) return;
        all[own * memory.pitch] += gradient;
        low[own * memory.pitch] += upper * gradient;
      };
      pixel_in_sweeps<decoupled, 1>(loss, label, weight, load, store, value);
      if (tile.inside && first_class == 0) add_pixel(loss, tile.image * loss.pixels + pixel, value, weight, sum);
    }
    if (!want_gradient) continue;
    for (int c = 0; c < classes; ++c) all[c * memory.pitch] -= low[c * memory.pitch];
    gather_line(lines, tile, memory, memory.columns[0], low_y, first_class, classes);
    for (int c = 0; c < classes; ++c) {
      all[c * memory.pitch] = low[c * memory.pitch];  // what belongs to the next row
      low[c * memory.pitch] = A(0);
    }
  }
  if (first_class == 0) write_sums(loss, sum, memory.scratch);
}

// The gradient of each of the student's pixels from the blocks that touched it, and in the first block the loss. A thread has some
// of a pixel's classes: where it lies takes more to find than its sums.
constexpr int gathered_classes = 8;

template <typename A>
__global__ void gather_kernel(LinesLoss lines, int64_t blocks, PixelLossOutputs outputs) {
  if (blockIdx.x == 0) {
    finish<A>(lines.loss.block_sums, blocks, outputs, shared_memory<double>());
    return;
  }
  const Axis &z = lines.z, &y = lines.y, &x = lines.x;
  const int classes = lines.loss.classes, groups = ceil_div(classes, gathered_classes);
  const int64_t low_pixels = int64_t{z.low} * y.low * x.low;
  const int64_t index = (int64_t{blockIdx.x} - 1) * blockDim.x + threadIdx.x;
  if (index >= lines.loss.images * groups * low_pixels) return;
  const int64_t pixel = index % low_pixels, image = index / low_pixels / groups;
  const int first = static_cast<int>(index / low_pixels % groups) * gathered_classes;
  const int low_x = static_cast<int>(pixel % x.low), low_y = static_cast<int>(pixel / x.low % y.low);
  const int low_z = static_cast<int>(pixel / x.low / y.low);
  const int first_z = z.begin(low_z - 1), last_z = z.begin(low_z + 1);
  const int first_y = y.begin(low_y - 1) / y.tile, last_y = (y.begin(low_y + 1) - 1) / y.tile;
  const int first_x = x.begin(low_x - 1) / x.tile, last_x = (x.begin(low_x + 1) - 1) / x.tile;
  A total[gathered_classes] = {};
  for (int i_z = first_z; i_z < last_z; ++i_z) {
    const A upper = z.upper_weight<A>(i_z);
    A plane[gathered_classes] = {};
    for (int i_y = first_y; i_y <= last_y; ++i_y)
      for (int i_x = first_x; i_x <= last_x; ++i_x) {
        const int64_t slot = ((image * z.full + i_z) * y.tiles + i_y) * x.tiles + i_x;
        const int row = low_y - y.lower(i_y * y.tile), column = low_x - x.lower(i_x * x.tile);
        const A* const from =
            static_cast<const A*>(lines.partial) + ((slot * y.touched + row) * classes + first) * x.touched + column;
        A touched[gathered_classes] = {};
#pragma unroll
        for (int c = 0; c < gathered_classes; ++c)
          if (first + c < classes) touched[c] = from[c * x.touched];
#pragma unroll
        for (int c = 0; c < gathered_classes; ++c) plane[c] += touched[c];
      }
    const A weight = z.lower(i_z) == low_z ? A(1) - upper : upper;
#pragma unroll
    for (int c = 0; c < gathered_classes; ++c) total[c] += weight * plane[c];
  }
  const Planes& gradient = lines.loss.gradient;
  const int64_t offset = offset_of(gradient, image, pixel) + first * gradient.stride_c;
#pragma unroll
  for (int c = 0; c < gathered_classes; ++c)
    if (first + c < classes) store_element(gradient, offset + c * gradient.stride_c, total[c]);
}

}  // namespace medkd
