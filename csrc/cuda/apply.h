// A small matrix times rows of features, [rows, depth] times [depth, N], for every image: the backward of the relations
// that are made of products of channels.
//
// A block makes up to 8 bands of rows of the result for as many pixels as its threads have squares. The matrix comes in
// chunks as bands, the features as lines; the result goes through shared memory, where a Source has all of the block's
// rows side by side. A Source is plain data with
//   rows_inside()                                     how threads should lie over its rows
//   column(k)                                         the matrix's column for feature row k
//   line(image, k, pixel, count)                      a pack of feature row k, zeros behind `count` pixels
//   planes()                                          instead of rows_inside and line, where it is `plain`: see products.h
//   finish(image, first, rows, pixel, length, tile, stride)   the gradient from tile[row * stride + column]; all threads
#pragma once

#include <algorithm>

#include "pixels.h"
#include "planes.h"

namespace medkd {

constexpr int apply_threads = 192;  // two blocks of them share a multiprocessor's registers
constexpr int apply_packs = 8;  // of the depth, in a chunk

struct ApplyPlan {
  int64_t images, pixels, rows, depth;
  const void* matrices;       // [images, *, depth] of the arithmetic's type
  int64_t matrix_size;
  int tiles, bands, panels;   // panels of tile_columns pixels

  __host__ __device__ int tile_rows(int reach) const { return bands * reach; }
};

template <typename A>
ApplyPlan apply_plan(int64_t images, int64_t pixels, int64_t rows, int64_t depth, const void* matrices,
                     int64_t matrix_size) {
  const int64_t all = ceil_div(rows, reach<A>);
  const int64_t tiles = all <= tile_side + 1 ? 1 : ceil_div(all, tile_side);
  const int64_t bands = ceil_div(all, tiles);
  // few rows: more pixels, but no more than shared memory holds
  constexpr int64_t room = most_shared_bytes / sizeof(A), of_panel = apply_packs * lanes<A> * line_stride<A>;
  const int64_t fitting = (room - bands * band_stride<A>(apply_packs)) / of_panel;
  const int64_t panels = std::min({apply_threads / (bands * tile_side), fitting, int64_t{12}});
  return {images, pixels, rows, depth, matrices, matrix_size,
          static_cast<int>(tiles), static_cast<int>(bands), static_cast<int>(panels)};
}

// A pad of one pack: rows of the result begin in different banks.
template <typename A>
__host__ __device__ int result_stride(const ApplyPlan& plan) {
  return plan.panels * tile_columns<A> + lanes<A>;
}

template <typename A, typename Source>
__global__ void __launch_bounds__(apply_threads, 2) apply_kernel(const Source source, const ApplyPlan plan) {
  constexpr int width = lanes<A>, depth_step = apply_packs * width, panel_size = depth_step * line_stride<A>;
  const int stride = band_stride<A>(apply_packs), rows = plan.bands * reach<A>;
  A* const lines = shared_memory<A>();                    // [panels, depth_step, line_stride]
  A* const matrix = lines + plan.panels * panel_size;     // [bands]
  const int64_t row_tile = blockIdx.x % plan.tiles, span = int64_t{plan.panels} * tile_columns<A>;
  const int64_t spans = ceil_div(plan.pixels, span);
  const int64_t first = blockIdx.x / plan.tiles % spans * span, image = blockIdx.x / plan.tiles / spans;
  const int64_t first_row = row_tile * rows;
  const A* const from = static_cast<const A*>(plan.matrices) + image * plan.matrix_size;
  const int length = plan.pixels - first < span ? static_cast<int>(plan.pixels - first) : static_cast<int>(span);

  // neighbouring threads lie along the pixels
  const int thread = static_cast<int>(threadIdx.x), column = thread % tile_side;
  const int panel = thread / tile_side % plan.panels, band = thread / tile_side / plan.panels;
  const bool busy = band < plan.bands;

  Square<A> sum;
  clear<A>(sum);
  for (int64_t start = 0; start < plan.depth; start += depth_step) {
    const int64_t left = ceil_div(plan.depth - start, width) * width;
    const int some = left < depth_step ? static_cast<int>(left) : depth_step;
    constexpr int panel_packs = tile_columns<A> / width;
    const int line_packs = plan.panels * panel_packs;
    const auto place = [&](const Walk& walk) {
      return lines + walk.pack() / panel_packs * panel_size + walk.row() * line_stride<A> + walk.pack() % panel_packs * width;
    };
    if constexpr (Source::plain) {
      constexpr int at_once = 8;
      const Planes x = source.planes();
      const int there = static_cast<int>(plan.depth - start) < some ? static_cast<int>(plan.depth - start) : some;
      with_type<A>(x.type, [&](auto zero) {
        using T = decltype(zero);
        if constexpr (sizeof(T) <= sizeof(A)) {
          const T* const from = static_cast<const T*>(x.data) + image * x.stride_b + start * x.stride_c + first;
          for (Walk next(some, line_packs, false, thread, apply_threads); next.inside();) {
            Walk walk = next;
            Raw raw[at_once];
#pragma unroll
            for (int i = 0; i < at_once; ++i, next.next()) {
              raw[i] = Raw{};
              if (next.inside() && next.row() < there && next.pack() * width < length)
                raw[i] = as_raw(load_pack<width>(from + next.row() * x.stride_c + next.pack() * width));
            }
#pragma unroll
            for (int i = 0; i < at_once; ++i, walk.next())
              if (walk.inside()) store_pack(place(walk), widen_as<T, A>(raw[i]));
          }
        }
      });
    } else {
      Walk pixels(some, line_packs, source.rows_inside(), thread, apply_threads);
      for (; pixels.inside(); pixels.next()) {
        const int at = pixels.pack() * width;
        const int count = pixels_in_pack<A>(at, length);
        const int64_t k = start + pixels.row();
        const Pack<A, width> values = k < plan.depth ? source.line(image, k, first + at, count) : Pack<A, width>{};
        store_pack(place(pixels), values);
      }
    }
    for (int k = thread; k < rows * apply_packs; k += apply_threads) {
      const int row = k / apply_packs, pack = k % apply_packs;
      const int64_t at = start + pack * width;
      Pack<A, width> values{};
#pragma unroll
      for (int n = 0; n < width; ++n)
        if (first_row + row < plan.rows && at + n < plan.depth)
          values.value[n] = from[(first_row + row) * plan.depth + source.column(at + n)];
      store_pack(matrix + in_bands<A>(row, pack, stride), values);
    }
    __syncthreads();
    if (busy) {
      const A* const a = matrix + band * stride;
      const A* const b = lines + panel * panel_size + column * width;
      for (int pack = 0; pack < apply_packs && start + pack * width < plan.depth; ++pack)
        add_products(a + pack * pack_stride<A>, b + pack * width * line_stride<A>, sum);
    }
    __syncthreads();
  }

  const int tile_stride = result_stride<A>(plan);
  if (busy) {
#pragma unroll
    for (int m = 0; m < reach<A>; ++m)
#pragma unroll
      for (int v = 0; v < reach<A> / width; ++v) {
        Pack<A, width> pack;
#pragma unroll
        for (int n = 0; n < width; ++n) pack.value[n] = sum[m][v * width + n];
        store_pack(lines + (band * reach<A> + m) * tile_stride + panel * tile_columns<A> + column_of<A>(column, v * width), pack);
      }
  }
  __syncthreads();
  const int made = plan.rows - first_row < rows ? static_cast<int>(plan.rows - first_row) : rows;
  source.finish(image, first_row, made, first, length, lines, tile_stride);
}

template <typename A, typename Source>
void apply_matrix(const Source& source, const ApplyPlan& plan, cudaStream_t stream) {
  const std::size_t operands = std::size_t(plan.panels) * apply_packs * lanes<A> * line_stride<A> +
                               std::size_t(plan.bands) * band_stride<A>(apply_packs);
  const std::size_t result = std::size_t(plan.bands) * reach<A> * result_stride<A>(plan);
  const int64_t span = int64_t{plan.panels} * tile_columns<A>;
  const int64_t blocks = plan.images * ceil_div(plan.pixels, span) * plan.tiles;
  launch<apply_kernel<A, Source>>({blocks}, apply_threads,
                                  std::max(operands, result) * sizeof(A), stream, source, plan);
}

// Stores the tile as rows [first_row, first_row + rows) of `to`, after change(row of the tile, column, pack).
template <typename A, typename Change>
__device__ __forceinline__ void put_tile(const PackedPlanes& to, int64_t image, int64_t first_row, int rows, int64_t pixel,
                                         int length, const A* tile, int64_t stride, const Change& change) {
  constexpr int width = lanes<A>;
  Walk walk(rows, ceil_div(length, width), to.channels_inside(), static_cast<int>(threadIdx.x),
            static_cast<int>(blockDim.x));
  for (; walk.inside(); walk.next()) {
    const int column = walk.pack() * width;
    Pack<A, width> values = load_pack<width>(tile + walk.row() * stride + column);
    change(walk.row(), column, values);
    put<A>(to, image, first_row + walk.row(), pixel + column, pixels_in_pack<A>(column, length), values);
  }
}

}  // namespace medkd
