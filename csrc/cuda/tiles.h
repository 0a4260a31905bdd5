// Matrix products by plain multiply-adds: a thread keeps a square of results in registers, and takes the operands from
// shared memory, 16 bytes at a time. The one engine of the relation losses.
//
// For float a square is 8 x 8: 16 loads from shared memory serve 256 multiply-adds. Two forms of operand:
//   bands   rows of a matrix along what is summed over (a "pack" is 16 bytes of it). Rows lie together by as many as a
//           square has, one band behind the other, and within a band pack after pack: so that all addresses of a square
//           are one register plus constants, and neither neighbouring rows, nor packs, nor bands share a bank.
//   lines   rows along what is not summed over, as wide as 8 squares.
#pragma once

#include "launch.h"

namespace medkd {

// Rows and columns of a thread's square. (With double it fits into the registers no larger.)
template <typename A>
constexpr int reach = sizeof(A) == 4 ? 8 : 4;

template <typename A>
constexpr int lanes = pack_of<A>;

// Elements from one pack of a band to the next, and from one band to the next.
template <typename A>
constexpr int pack_stride = (reach<A> + 1) * lanes<A>;

template <typename A>
__host__ __device__ constexpr int band_stride(int packs) {
  return (packs * (reach<A> + 1) | 1) * lanes<A>;
}

template <typename A>
__device__ __forceinline__ int in_bands(int row, int pack, int stride) {
  return row / reach<A> * stride + pack * pack_stride<A> + row % reach<A> * lanes<A>;
}

// Threads along an edge of a tile, and a tile's columns, when it is made of lines.
constexpr int tile_side = 8;
template <typename A>
constexpr int tile_columns = tile_side * reach<A>;

template <typename A>
constexpr int line_stride = tile_columns<A> + lanes<A>;

template <typename A>
using Square = A[reach<A>][reach<A>];

template <typename A>
__device__ __forceinline__ void clear(Square<A>& sum) {
#pragma unroll
  for (int m = 0; m < reach<A>; ++m)
#pragma unroll
    for (int n = 0; n < reach<A>; ++n) sum[m][n] = A(0);
}

// sum[m][n] += the product of row m of band a and row n of band b, over one pack.
template <typename A>
__device__ __forceinline__ void add_dots(const A* a, const A* b, Square<A>& sum) {
  Pack<A, lanes<A>> x[reach<A>];
#pragma unroll
  for (int m = 0; m < reach<A>; ++m) x[m] = load_pack<lanes<A>>(a + m * lanes<A>);
#pragma unroll
  for (int n = 0; n < reach<A>; ++n) {
    const Pack<A, lanes<A>> y = load_pack<lanes<A>>(b + n * lanes<A>);
#pragma unroll
    for (int k = 0; k < lanes<A>; ++k)
#pragma unroll
      for (int m = 0; m < reach<A>; ++m) sum[m][n] += x[m].value[k] * y.value[k];
  }
}

// sum[m][n] += row m of band a times column n of the thread's in lines b, over one pack. The thread's columns are packs at
// a distance of 8, so that neighbouring threads read neighbouring packs: see column_of.
template <typename A>
__device__ __forceinline__ void add_products(const A* a, const A* b, Square<A>& sum) {
  constexpr int width = lanes<A>;
  Pack<A, width> x[reach<A>];
#pragma unroll
  for (int m = 0; m < reach<A>; ++m) x[m] = load_pack<width>(a + m * width);
#pragma unroll
  for (int k = 0; k < width; ++k)
#pragma unroll
    for (int v = 0; v < reach<A> / width; ++v) {
      const Pack<A, width> y = load_pack<width>(b + k * line_stride<A> + v * tile_side * width);
#pragma unroll
      for (int n = 0; n < width; ++n)
#pragma unroll
        for (int m = 0; m < reach<A>; ++m) sum[m][v * width + n] += x[m].value[k] * y.value[n];
    }
}

// Where column n of a square of add_products lies in its lines, for thread `column` of 8.
template <typename A>
__device__ __forceinline__ int column_of(int column, int n) {
  return (n / lanes<A> * tile_side + column) * lanes<A> + n % lanes<A>;
}

}  // namespace medkd
