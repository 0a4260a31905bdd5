// Rows times a band matrix: linear interpolation along the last axis, and its adjoint. Every 16 outputs depend on a few
// neighbouring inputs, so an output vector is a short sum of broadcast inputs times vectors of weights.
#pragma once

#include "planes.h"

namespace medkd {
namespace MEDKD_ISA {

constexpr int band_rows = 6;

// The band's weights in the arithmetic's type, aligned: [chunks, depth, 16].
template <typename A>
class BandWeights {
 public:
  explicit BandWeights(const Band& band) : scratch_(band.chunks * band.depth * 16) {
    for (int64_t k = 0; k < band.chunks * band.depth * 16; ++k) scratch_.get()[k] = static_cast<A>(band.weight[k]);
  }
  const A* get() const { return scratch_.get(); }

 private:
  Scratch<A> scratch_;
};

template <int rows, typename A>
inline void band_block(const A* weight, int64_t depth, const A* in, int64_t in_ld, A* out, int64_t out_ld) {
  constexpr int vectors = 16 / vector_lanes<A>;
  Vector<A> total[rows][vectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector<A> w[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) w[v] = load(weight + k * 16 + v * vector_lanes<A>);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const A x = in[i * in_ld + k];
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) total[i][v] += x * w[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v)
      *reinterpret_cast<Vector<A>*>(out + i * out_ld + v * vector_lanes<A>) = total[i][v];
}

template <int rows, typename A>
inline void band_edge(int64_t some_rows, const A* weight, int64_t depth, const A* in, int64_t in_ld, A* out,
                      int64_t out_ld) {
  if constexpr (rows > 1) {
    if (some_rows < rows) return band_edge<rows - 1>(some_rows, weight, depth, in, in_ld, out, out_ld);
  }
  band_block<rows>(weight, depth, in, in_ld, out, out_ld);
}

// out[i, o] = sum over k of in[i, first + k] weight[k, o], first and weight those of o's 16 outputs. Rows of `out` are
// aligned and padded to 16; the padding becomes 0. Inputs of
// weight 0 are read too: 0 times infinity is no number.
template <typename A>
inline void band_product(const Band& band, const BandWeights<A>& weights, int64_t rows, const A* in, int64_t in_ld,
                         A* out, int64_t out_ld) {
  for (int64_t chunk = 0; chunk < band.chunks; ++chunk) {
    const A* weight = weights.get() + chunk * band.depth * 16;
    for (int64_t i = 0; i < rows; i += band_rows) {
      const int64_t some_rows = rows - i < band_rows ? rows - i : band_rows;
      band_edge<band_rows>(some_rows, weight, band.depth, in + i * in_ld + band.first[chunk], in_ld,
                           out + i * out_ld + chunk * 16, out_ld);
    }
  }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
