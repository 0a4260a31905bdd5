// A per-pixel loss whose student is upsampled (linear, align_corners=False) on the fly.
//
// A block takes a tile of pixels along the last axis, one a thread, through a strip of rows at one depth. Between two rows of
// the student a thread keeps both, interpolated to its pixel, and two sums over the rows it passes: of its gradients, and of
// its gradients times the lower row's weight. That is the whole adjoint of the interpolation along the rows; when the student's
// next row is reached, the adjoint along the tile is gathered from shared memory. What a block leaves for each
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

// Goes along an axis, from pixel to pixel and from one of the student's to the next, without a division.
class Walk {
 public:
  // from pixel `first`, which lies behind `below` of the student's
  __device__ Walk(const Axis& axis, int first, int below)
      : step_(2 * axis.low),
        whole_(2 * axis.full),
        place_(static_cast<int>((2 * int64_t{first} + 1) * axis.low - axis.full - int64_t{whole_} * below)),
        unit_(1.0f / static_cast<float>(whole_)) {}
  __device__ __forceinline__ bool before_next() const { return place_ < whole_; }
  __device__ __forceinline__ float upper_weight() const { return static_cast<float>(max(place_, 0)) * unit_; }
  __device__ __forceinline__ void next_pixel() { place_ += step_; }
  __device__ __forceinline__ void next_below() { place_ -= whole_; }

 private:
  int step_, whole_, place_;  // in steps of 1 / (2 full)
  float unit_;
};

struct LinesLoss {
  PixelLoss loss;
  Axis z, y, x;
  void* partial;  // [B, z.full, y.tiles, x.tiles, y.touched, C, x.touched] in the type of the arithmetic
  int chunk;      // classes whose gradient a block of the sweeping kernel makes
};

constexpr int most_line_threads = 256;
constexpr int most_kept_rows = 10, most_kept_sums = 16;  // classes whose student's rows, and sums, are kept in registers
// Of a block of the kernel in registers: with more classes, fewer that have more registers.
__host__ __device__ constexpr int line_threads(int max_classes) { return max_classes <= 10 ? 224 : 128; }
__host__ __device__ constexpr int line_blocks(int max_classes) { return max_classes <= 10 || max_classes > most_kept_sums ? 2 : 3; }

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
  A* columns[4];
  int* bounds;   // [touched + 1]: pixels bounds[k] to bounds[k + 1] of the tile lie between k and k + 1 of the student's
  int pitch;     // a thread's column to the next class; odd, so that threads that take the classes of one pixel meet no bank twice

  __device__ LineMemory(int classes, int arrays, int pitch) : pitch(pitch) {
    scratch = shared_memory<double>();
    upper = reinterpret_cast<A*>(scratch + sums * (blockDim.x / warp_size));
    A* next = upper + blockDim.x;
    for (int i = 0; i < 4; ++i, next += i <= arrays ? classes * pitch : 0) columns[i] = next;
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

inline std::size_t line_memory_bytes(const LinesLoss& lines, int threads, int classes, int arrays, int pitch, std::size_t size) {
  return sums * (threads / warp_size) * sizeof(double) + threads * size +
         static_cast<std::size_t>(arrays) * classes * pitch * size + (lines.x.touched + 1) * sizeof(int);
}

// The adjoint along the tile of `columns`, into the block's part of lines.partial for the student's row `low_y`. There is a
// barrier before it, and one behind it before the columns change.
template <typename A>
__device__ __forceinline__ void gather_line(const LinesLoss& lines, const LineTile<A>& tile, const LineMemory<A>& memory,
                                            const A* columns, int low_y, int first_class, int classes) {
  A* out = static_cast<A*>(lines.partial) +
           (tile.slot * lines.y.touched + (low_y - tile.low_y)) * lines.loss.classes * lines.x.touched +
           static_cast<int64_t>(first_class) * lines.x.touched;
  constexpr int at_once = 5;  // classes of a lane: a pixel's weight is the same for all
  const int blocks = ceil_div(tile.touched, warp_size), units = blocks * ceil_div(classes, at_once);
  for (int unit = warp_index(); unit < units; unit += static_cast<int>(blockDim.x) / warp_size) {
    const int first = unit / blocks * at_once, k = unit % blocks * warp_size + lane_index();
    if (k >= tile.touched) continue;
    const int begin = memory.bounds[max(k - 1, 0)], middle = memory.bounds[k], end = memory.bounds[k + 1];
    const A* const values = columns + first * memory.pitch;
    A total[at_once] = {};
    for (int p = begin; p < end; ++p) {
      const A upper = memory.upper[p], weight = p < middle ? upper : A(1) - upper;
#pragma unroll
      for (int i = 0; i < at_once; ++i)
        if (first + i < classes) total[i] += weight * values[i * memory.pitch + p];
    }
#pragma unroll
    for (int i = 0; i < at_once; ++i)
      if (first + i < classes) out[(first + i) * lines.x.touched + k] = total[i];
  }
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

// The student's row `low_y` at this depth, into rows [classes, pitch].
__device__ __forceinline__ void load_low_row(const LinesLoss& lines, const LineTile<float>& tile, int low_y, int pitch,
                                             float* rows) {
  const Planes& student = lines.loss.student;
  const int64_t line = static_cast<int64_t>(tile.low_z) * lines.y.low + low_y;
  const int64_t offset = offset_of(student, tile.image, line * lines.x.low + tile.low_x);
  const int64_t deeper = static_cast<int64_t>(lines.y.low) * lines.x.low * student.stride_n;
  with_type<float>(student.type, [&](auto zero) {
    const auto* const first = static_cast<const decltype(zero)*>(student.data) + offset;
    for (int k = lane_index(); k < tile.touched; k += warp_size) {
      const auto* from = first + k * student.stride_n + warp_index() * student.stride_c;
      for (int c = warp_index(); c < lines.loss.classes; c += static_cast<int>(blockDim.x) / warp_size) {
        float x = finite_absent(widen(from[0]));
        if (tile.upper_z > 0) x = (1.0f - tile.upper_z) * x + tile.upper_z * finite_absent(widen(from[deeper]));
        rows[c * pitch + k] = x;
        from += static_cast<int>(blockDim.x) / warp_size * student.stride_c;
      }
    }
  });
}

// A number for every class, in registers or in a thread's column of shared memory.
template <int max_classes, bool in_registers>
class PerClass {
 public:
  __device__ PerClass(const LineMemory<float>& memory, int array)
      : column_(memory.columns[in_registers ? 0 : array] + threadIdx.x), pitch_(memory.pitch) {}
  __device__ __forceinline__ float& operator[](int c) {
    if constexpr (in_registers)
      return number_[c];
    else
      return column_[c * pitch_];
  }

 private:
  float number_[in_registers ? max_classes : 1] = {};
  float* column_;
  int pitch_;
};

__host__ __device__ constexpr int line_pitch(int max_classes) { return line_threads(max_classes) + 1; }

// Arrays of shared memory: what is gathered, the student's row, and the rows around the pixel, unless registers have them.
__host__ __device__ constexpr int line_arrays(int classes) { return classes <= most_kept_rows ? 2 : 4; }

template <bool decoupled, int max_classes>
__global__ void __launch_bounds__(line_threads(max_classes), line_blocks(max_classes)) line_register_kernel(LinesLoss lines) {
  constexpr bool keeps_sums = max_classes <= most_kept_sums;
  const PixelLoss& loss = lines.loss;
  const int classes = loss.classes;
  const LineTile<float> tile(lines);
  const LineMemory<float> memory(classes, line_arrays(max_classes), line_pitch(max_classes));
  const bool want_gradient = loss.gradient.data != nullptr;
  float* const gathered = memory.columns[0] + threadIdx.x;
  float* const row = memory.columns[1];
  const float* const left = row + (tile.own_low - tile.low_x);
  const float* const right = left + (tile.upper_x > 0 ? 1 : 0);
  // the student's rows around the pixel; sums of gradients times the lower row's weight, and of gradients
  PerClass<max_classes, max_classes <= most_kept_rows> above(memory, 2), below(memory, 3);
  PerClass<max_classes, keeps_sums> low(memory, 0);
  float all[max_classes] = {};
  for (int c = 0; !keeps_sums && c < classes; ++c) low[c] = 0;
  bool absent_above, absent_below = false;  // a class is absent there
  const auto enter_row = [&] {
    absent_above = absent_below;
    absent_below = false;
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
      if (there<max_classes>(c, classes)) {
        above[c] = below[c];
        below[c] = (1.0f - tile.upper_x) * left[c * memory.pitch] + tile.upper_x * right[c * memory.pitch];
        absent_below |= below[c] < -1e20f;
      }
  };
  const auto load_next_row = [&](int low_y) { load_low_row(lines, tile, min(low_y, lines.y.low - 1), memory.pitch, row); };
  load_next_row(tile.low_y);
  if (want_gradient) memory.prepare(lines, tile);
  __syncthreads();
  enter_row();
  __syncthreads();
  load_next_row(tile.low_y + 1);
  __syncthreads();

  double sum[sums] = {};
  int y = tile.first_y;
  int64_t pixel = (static_cast<int64_t>(tile.z) * lines.y.full + y) * lines.x.full + tile.x;
  int64_t teacher = offset_of(loss.teacher, tile.image, pixel);
  pixel += tile.image * loss.pixels;  // from here on over all images
  Walk walk(lines.y, y, tile.low_y);
  for (int low_y = tile.low_y; low_y <= tile.last_low_y; ++low_y) {
    enter_row();
    const bool last = low_y == lines.y.low - 1;  // no row is below
    float cell_sum[sums] = {};
    for (; y < tile.last_y && (last || walk.before_next()); ++y) {
      const float upper = last ? 0.0f : walk.upper_weight();
      int label[1];
      float weight[1], s[max_classes][1], t[max_classes][1], value[1][terms];
      load_label<decoupled>(loss, pixel, label[0], weight[0]);
      if (!tile.inside) {
        label[0] = -1;
        weight[0] = 0;
      }
      with_type<float>(loss.teacher.type, [&](auto zero) {
        using T = decltype(zero);
        const T* at = static_cast<const T*>(loss.teacher.data) + teacher;
        T raw[max_classes] = {};  // all on their way before the first is looked at
#pragma unroll
        for (int c = 0; c < max_classes; ++c, at += loss.teacher.stride_c)
          if (there<max_classes>(c, classes)) raw[c] = *at;
#pragma unroll
        for (int c = 0; c < max_classes; ++c)
          t[c][0] = there<max_classes>(c, classes) ? static_cast<float>(widen(raw[c])) : -infinity<float>();
      });
#pragma unroll
      for (int c = 0; c < max_classes; ++c)
        s[c][0] = there<max_classes>(c, classes) ? (1.0f - upper) * above[c] + upper * below[c] : -infinity<float>();
      if (absent_above || absent_below)
#pragma unroll
        for (int c = 0; c < max_classes; ++c) s[c][0] = absent_again(s[c][0]);
      pixels_in_registers<decoupled, max_classes, 1>(loss, label, weight, s, t, value);
      if (want_gradient)
#pragma unroll
        for (int c = 0; c < max_classes; ++c)
          if (there<max_classes>(c, classes)) {
            all[c] += s[c][0];
            low[c] += upper * s[c][0];
          }
      if (tile.inside) add_pixel<decoupled>(loss, pixel, value[0], weight[0], cell_sum);
      walk.next_pixel();
      pixel += lines.x.full;
      teacher += lines.x.full * loss.teacher.stride_n;
    }
    walk.next_below();
#pragma unroll
    for (int i = 0; i < sums; ++i) sum[i] += static_cast<double>(cell_sum[i]);
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
      if (there<max_classes>(c, classes)) {
        const float next = low[c];  // what belongs to the next row
        gathered[c * memory.pitch] = all[c] - next;
        all[c] = next;
      }
    __syncthreads();
    if (want_gradient) gather_line(lines, tile, memory, memory.columns[0], low_y, 0, classes);
    load_next_row(low_y + 2);
    __syncthreads();
#pragma unroll
    for (int c = 0; c < max_classes; ++c)
      if (there<max_classes>(c, classes)) low[c] = 0;
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
  const LineMemory<A> memory(lines.chunk, 2, static_cast<int>(blockDim.x) + 1);
  const A scale = loss.numbers<A>().to_base_2;
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
            s[i] = absent_again((A(1) - upper) * above[i] + upper * below[i]);
            t[i] = first + i < loss.classes
                       ? rounded_product(static_cast<A>(widen(from[(first + i) * loss.teacher.stride_c])), scale)
                       : A(0);
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
      if (tile.inside && first_class == 0) add_pixel<decoupled>(loss, tile.image * loss.pixels + pixel, value, weight, sum);
    }
    if (!want_gradient) continue;
    for (int c = 0; c < classes; ++c) all[c * memory.pitch] -= low[c * memory.pitch];
    __syncthreads();
    gather_line(lines, tile, memory, memory.columns[0], low_y, first_class, classes);
    __syncthreads();
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
