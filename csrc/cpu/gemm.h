// The register-blocked matrix products of the relation losses, over a block of pixels in scratch memory:
//   dot_products   sums[i, j] += sum over p of x[i, p] x[j, p]           both operands along the pixels
//   product        out[i, p]   = sum over k of m[i, k] x[k, p]           a small matrix times the block
//   tile_product   the same with m as it is or transposed, set or added  tiles of N x N and what they are multiplied with
// Vectors always lie along the pixels, so few channels waste no lanes and neither operand is transposed. Rows of x are
// aligned to a cache line and padded with zeros to a multiple of `pixel_multiple`.
#pragma once

#include "planes.h"
#include "vector.h"

namespace medkd {
namespace MEDKD_ISA {

// Accumulators, operands and one temporary fill the vector registers: 32 with AVX-512 and on aarch64, 16 elsewhere.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int dot_rows = 6, dot_columns = 4, product_rows = 6, product_vectors = 4;
#elif defined(__AVX__)
constexpr int dot_rows = 3, dot_columns = 4, product_rows = 6, product_vectors = 2;
#else
constexpr int dot_rows = 3, dot_columns = 3, product_rows = 4, product_vectors = 2;
#endif
constexpr int64_t pixel_multiple = 64;

// Sums of neighbouring lanes: those of a in the lower half, those of b in the upper one.
template <typename A>
MEDKD_INLINE Vector<A> add_neighbours(Vector<A> a, Vector<A> b) {
  return pick<A, 0, 2>(a, b) + pick<A, 1, 2>(a, b);
}

// sum[k] = sum of the lanes of x[k], for as many vectors as a vector has lanes.
template <int count, typename A>
MEDKD_INLINE Vector<A> sum_lanes(const Vector<A>* x) {
  if constexpr (count == 1) {
    return x[0];
  } else {
    Vector<A> half[count / 2];
#pragma GCC unroll 8
    for (int k = 0; k < count / 2; ++k) half[k] = add_neighbours<A>(x[2 * k], x[2 * k + 1]);
    return sum_lanes<count / 2, A>(half);
  }
}

template <int rows, int columns, typename A>
inline void dot_block(const A* a, const A* b, int64_t ld, int64_t padded, double* sums, int64_t sums_ld) {
  constexpr int lanes = vector_lanes<A>;
  Vector<A> total[(rows * columns + lanes - 1) / lanes * lanes] = {};
  for (int64_t p = 0; p < padded; p += lanes) {
    Vector<A> y[columns];
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) y[j] = load(b + j * ld + p);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const Vector<A> x = load(a + i * ld + p);
#pragma GCC unroll 8
      for (int j = 0; j < columns; ++j) total[i * columns + j] += x * y[j];
    }
  }
  A sum[(rows * columns + lanes - 1) / lanes * lanes];
#pragma GCC unroll 8
  for (int k = 0; k < rows * columns; k += lanes) {
    const Vector<A> some = sum_lanes<lanes, A>(total + k);
    std::memcpy(sum + k, &some, sizeof some);
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < columns; ++j) sums[i * sums_ld + j] += static_cast<double>(sum[i * columns + j]);
}

// dot_block for the rows and columns left at an edge.
template <int rows, int columns, typename A>
inline void dot_edge(int64_t some_rows, int64_t some_columns, const A* a, const A* b, int64_t ld, int64_t padded,
                     double* sums, int64_t sums_ld) {
  if constexpr (rows > 1) {
    if (some_rows < rows)
      return dot_edge<rows - 1, columns>(some_rows, some_columns, a, b, ld, padded, sums, sums_ld);
  }
  if constexpr (columns > 1) {
    if (some_columns < columns)
      return dot_edge<rows, columns - 1>(some_rows, some_columns, a, b, ld, padded, sums, sums_ld);
  }
  dot_block<rows, columns>(a, b, ld, padded, sums, sums_ld);
}

// sums[i, j] += sum over p of x[i, p] x[j, p] for the rows i in [begin, end) and all j in [i, rows); entries with j < i
// are left unfinished. The sum over a block's pixels is in the arithmetic's type, the one over blocks in double.
template <typename A>
inline void dot_products(const A* x, int64_t rows, int64_t ld, int64_t padded, int64_t begin, int64_t end,
                         double* sums) {
  for (int64_t i = begin; i < end; i += dot_rows) {
    const int64_t some_rows = end - i < dot_rows ? end - i : dot_rows;
    for (int64_t j = i; j < rows; j += dot_columns) {
      const int64_t some_columns = rows - j < dot_columns ? rows - j : dot_columns;
      dot_edge<dot_rows, dot_columns>(some_rows, some_columns, x + i * ld, x + j * ld, ld, padded, sums + i * rows + j,
                                      rows);
    }
  }
}

// m[i, k] is m[i * m_ld + k], or m[k * m_ld + i] when m is transposed.
template <int rows, bool transposed, bool add, typename A>
inline void product_block(const A* m, int64_t m_ld, int64_t depth, const A* x, int64_t ld, A factor, A* out,
                          int64_t out_ld) {
  Vector<A> total[rows][product_vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<A> y[product_vectors];
#pragma GCC unroll 8
    for (int v = 0; v < product_vectors; ++v) y[v] = load(x + k * ld + v * vector_lanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const A weight = transposed ? m[k * m_ld + i] : m[i * m_ld + k];
#pragma GCC unroll 8
      for (int v = 0; v < product_vectors; ++v) total[i][v] += weight * y[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < product_vectors; ++v) {
      Vector<A>& to = *reinterpret_cast<Vector<A>*>(out + i * out_ld + v * vector_lanes<A>);
      to = add ? to + total[i][v] : factor * total[i][v];
    }
}

template <int rows, bool transposed, bool add, typename A>
inline void product_edge(int64_t some_rows, const A* m, int64_t m_ld, int64_t depth, const A* x, int64_t ld, A factor,
                         A* out, int64_t out_ld) {
  if constexpr (rows > 1) {
    if (some_rows < rows)
      return product_edge<rows - 1, transposed, add>(some_rows, m, m_ld, depth, x, ld, factor, out, out_ld);
  }
  product_block<rows, transposed, add>(m, m_ld, depth, x, ld, factor, out, out_ld);
}

// out[i, p] = factor * sum over k of m[i, k] x[k, p]; m is [rows, depth], x [depth, ld] and out [rows, ld].
template <typename A>
inline void product(const A* m, int64_t rows, int64_t depth, const A* x, int64_t ld, int64_t padded, A factor, A* out) {
  for (int64_t p = 0; p < padded; p += product_vectors * vector_lanes<A>)
    for (int64_t i = 0; i < rows; i += product_rows) {
      const int64_t some_rows = rows - i < product_rows ? rows - i : product_rows;
      product_edge<product_rows, false, false>(some_rows, m + i * depth, depth, depth, x + p, ld, factor,
                                               out + i * ld + p, ld);
    }
}

// out[i, p] = factor * sum over k of m[i, k] x[k, p], or that without a factor added, over pixel_multiple pixels, which is
// also how long the rows of x, of out and of m in memory are.
template <bool transposed, bool add, typename A>
inline void tile_product(const A* m, int64_t rows, int64_t depth, const A* x, A* out, A factor = A(1)) {
  constexpr int64_t ld = pixel_multiple;
  for (int64_t p = 0; p < ld; p += product_vectors * vector_lanes<A>)
    for (int64_t i = 0; i < rows; i += product_rows) {
      const int64_t some_rows = rows - i < product_rows ? rows - i : product_rows;
      product_edge<product_rows, transposed, add>(some_rows, m + (transposed ? i : i * ld), ld, depth, x + p, ld, factor,
                                                  out + i * ld + p, ld);
    }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
