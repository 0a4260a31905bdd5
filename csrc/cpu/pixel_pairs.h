// Pairs of pixels, a tile of 64 x 64 at a time: pixel_relation with divergence "kl", and pixel_affinity. The matrix of relations is
// symmetric: a tile's entries belong to the rows of one panel of pixels and, turned over, to those of the other.
// Derivation: medkd_fast/reference/pixel_relation.py. The order of the tiles is pixel_pairs_driver.h's.
#pragma once

#include "pixel_rows.h"

namespace medkd {
namespace MEDKD_ISA {

constexpr int64_t tile = panel_pixels, tile_size = tile * tile;
static_assert(tile == pixel_multiple, "a panel is one padded row");

template <typename A>
inline void load_panels(const Relation& relation, const Planes& x, const Panels<A>& panels, int64_t image,
                        int64_t first, int64_t last) {
  const int64_t per_image = (relation.pixels + tile - 1) / tile;
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t at = image * per_image + panel, begin = panel * tile;
    const int64_t length = relation.pixels - begin < tile ? relation.pixels - begin : tile;
    load_rows(relation, x, image, begin, panels.channels, length, tile, tile, panels.rows + at * panels.channels * tile,
              panels.inverse + at * tile, panels.turns + at * tile);
  }
}

template <typename A>
inline void store_panels(const Relation& relation, const Panels<A>& panels, int64_t image, int64_t first, int64_t last,
                         A* gradient) {
  const int64_t per_image = (relation.pixels + tile - 1) / tile;
  A along[tile];
  for (int64_t panel = first; panel < last; ++panel) {
    const int64_t at = image * per_image + panel, begin = panel * tile;
    const int64_t length = relation.pixels - begin < tile ? relation.pixels - begin : tile;
    const A* __restrict inverse = panels.inverse + at * tile;
    const A* __restrict turns = panels.turns + at * tile;
    A* of_panel = gradient + at * panels.channels * tile;
    for (int64_t p = 0; p < tile; ++p) along[p] = A(0);
    for (int64_t c = 0; c < panels.channels; ++c) {
      const A* __restrict s = panels.rows + (at * panels.channels + c) * tile;
      const A* __restrict g = of_panel + c * tile;
      for (int64_t p = 0; p < tile; ++p) along[p] += s[p] * g[p];
    }
    for (int64_t p = 0; p < tile; ++p) along[p] *= turns[p];
    for (int64_t c = 0; c < panels.channels; ++c) {
      const A* __restrict s = panels.rows + (at * panels.channels + c) * tile;
      A* __restrict g = of_panel + c * tile;
      for (int64_t p = 0; p < tile; ++p) g[p] = (g[p] - s[p] * along[p]) * inverse[p];
    }
    if (relation.rows == PixelRows::pearson) centre(of_panel, panels.channels, tile, tile, along);
    if (relation.mask != nullptr) {
      const uint8_t* mask = relation.mask + image * relation.pixels + begin;
      for (int64_t c = 0; c < panels.channels; ++c)
        for (int64_t p = 0; p < length; ++p) of_panel[c * tile + p] = mask[p] != 0 ? of_panel[c * tile + p] : A(0);
    }
    store_tile(relation.gradient, image, begin, panels.channels, length, tile, of_panel);
  }
}

// out[p, r] = in[r, p]
template <typename A>
inline void transpose_tile(const A* in, A* out) {
  constexpr int64_t lanes = vector_lanes<A>;
  for (int64_t r = 0; r < tile; r += lanes)
    for (int64_t p = 0; p < tile; p += lanes) {
      Vector<A> square[lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) square[i] = load(in + (r + i) * tile + p);
      transpose<A>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < lanes; ++i) *reinterpret_cast<Vector<A>*>(out + (p + i) * tile + r) = square[i];
    }
}

// Relations of two panels times `factor`.
template <typename A>
inline void relation_tile(const A* panels, int64_t channels, int64_t i, int64_t j, A factor, A* out) {
  tile_product<true, false>(panels + i * channels * tile, tile, channels, panels + j * channels * tile, out, factor);
}

// Sums with `scale` as every maximum, and s - 1 exact for the largest entries: an entry's exponentials serve its row and its column. Rows are added up in lanes, to
// be gathered when all their tiles are through; columns after every tile.
template <typename A>
inline void add_bounded(const A* s, const A* t, A scale, const A* valid_i, const A* valid_j, Vector<A>* rows,
                        A* __restrict columns) {
  constexpr int64_t lanes = vector_lanes<A>;
  alignas(64) A e_s[tile], e_t[tile], weighted[tile];
  A* __restrict column_s = columns;
  A* __restrict column_t = columns + tile;
  A* __restrict column_weighted = columns + 2 * tile;
  for (int64_t p = 0; p < 3 * tile; ++p) columns[p] = A(0);
  for (int64_t r = 0; r < tile; ++r) {
    const A* __restrict s_row = s + r * tile;
    const A* __restrict t_row = t + r * tile;
    const A counts = valid_i[r];
    for (int64_t p = 0; p < tile; ++p) {
      const A student = exp_nonpositive(scale * (s_row[p] - A(1)));
      const A teacher = exp_nonpositive(scale * (t_row[p] - A(1)));
      const A difference = teacher * (t_row[p] - s_row[p]);
      e_s[p] = student;
      e_t[p] = teacher;
      weighted[p] = difference;
      column_s[p] += counts * student;
      column_t[p] += counts * teacher;
      column_weighted[p] += counts * difference;
    }
#pragma GCC unroll 4
    for (int64_t p = 0; p < tile; p += lanes) {
      const Vector<A> weight = load(valid_j + p);
      rows[3 * r] += weight * load(e_s + p);
      rows[3 * r + 1] += weight * load(e_t + p);
      rows[3 * r + 2] += weight * load(weighted + p);
    }
  }
}

template <typename A>
MEDKD_INLINE double gather(const Vector<A>& x) {
  A lane[vector_lanes<A>];
  std::memcpy(lane, &x, sizeof x);
  double sum = 0;
  for (int k = 0; k < vector_lanes<A>; ++k) sum += static_cast<double>(lane[k]);
  return sum;
}

template <typename A>
inline void bounded_sums(const PixelPairs<A>& pairs, const PanelPair& range, const RowSums& rows_i,
                         const RowSums& rows_j) {
  const Scratch<A> scratch(2 * tile_size + 3 * tile + 3 * tile * vector_lanes<A>);
  A* s = scratch.get();
  A* t = s + tile_size;
  A* columns = t + tile_size;
  Vector<A>* rows = reinterpret_cast<Vector<A>*>(columns + 3 * tile);
  const double scale = static_cast<double>(pairs.scale);
  for (int64_t i = range.first_i; i < range.last_i; ++i) {
    for (int64_t r = 0; r < 3 * tile; ++r) rows[r] = Vector<A>{};
    for (int64_t j = range.first_i == range.first_j ? i : range.first_j; j < range.last_j; ++j) {
      relation_tile(pairs.student, pairs.student_channels, i, j, A(1), s);
      relation_tile(pairs.teacher, pairs.teacher_channels, i, j, A(1), t);
      add_bounded(s, t, pairs.scale, pairs.valid + i * tile, pairs.valid + j * tile, rows, columns);
      if (i == j) continue;
      const int64_t at = (j - range.first_j) * tile;
      for (int64_t p = 0; p < tile; ++p) {
        rows_j.sum_s[at + p] += static_cast<double>(columns[p]);
        rows_j.sum_t[at + p] += static_cast<double>(columns[tile + p]);
        rows_j.weighted[at + p] += scale * static_cast<double>(columns[2 * tile + p]);
      }
    }
    const int64_t at = (i - range.first_i) * tile;
    for (int64_t r = 0; r < tile; ++r) {
      rows_i.sum_s[at + r] += gather<A>(rows[3 * r]);
      rows_i.sum_t[at + r] += gather<A>(rows[3 * r + 1]);
      rows_i.weighted[at + r] += scale * gather<A>(rows[3 * r + 2]);
    }
  }
}

// The largest number of a row, in 16 interleaved lanes.
template <typename A>
inline A largest(const A* row) {
  A lane[16];
  for (int64_t k = 0; k < 16; ++k) lane[k] = row[k];
  for (int64_t p = 16; p < tile; p += 16)
    for (int64_t k = 0; k < 16; ++k) lane[k] = row[p + k] > lane[k] ? row[p + k] : lane[k];
  for (int64_t k = 1; k < 16; ++k) lane[0] = lane[k] > lane[0] ? lane[k] : lane[0];
  return lane[0];
}

// Logits of a row, -infinity in columns that do not count, for one network: the maximum so far, and the sums with respect
// to the one before brought to it. Returns what the earlier sums were multiplied by.
MEDKD_INLINE double raise_maximum(double& maximum, double largest_now, double& sum) {
  if (!(largest_now > maximum)) return 1;
  const double factor = maximum == -infinity<double>() ? 0 : exp(maximum - largest_now);
  maximum = largest_now;
  sum *= factor;
  return factor;
}

// The rows' sums with a running maximum each, from logits. These were rounded to memory, as in the backward: were they
// products in these loops, a fused multiply-subtract would see a large one above its own maximum.
template <typename A>
inline void add_running(const A* s, const A* t, const A* valid_j, const RowSums& rows, int64_t at) {
  alignas(64) A x_s[tile], x_t[tile], weighted[tile];
  for (int64_t r = 0; r < tile; ++r) {
    const A* __restrict s_row = s + r * tile;
    const A* __restrict t_row = t + r * tile;
    for (int64_t p = 0; p < tile; ++p) {
      x_s[p] = valid_j[p] != A(0) ? s_row[p] : -infinity<A>();
      x_t[p] = valid_j[p] != A(0) ? t_row[p] : -infinity<A>();
    }
    const A most_s = largest(x_s), most_t = largest(x_t);
    if (most_s == -infinity<A>()) continue;  // no column counts
    raise_maximum(rows.max_s[at + r], static_cast<double>(most_s), rows.sum_s[at + r]);
    rows.weighted[at + r] *= raise_maximum(rows.max_t[at + r], static_cast<double>(most_t), rows.sum_t[at + r]);
    const A max_s = static_cast<A>(rows.max_s[at + r]), max_t = static_cast<A>(rows.max_t[at + r]);
    for (int64_t p = 0; p < tile; ++p) {
      x_s[p] = exp_nonpositive(x_s[p] - max_s);
      x_t[p] = exp_nonpositive(x_t[p] - max_t);
      weighted[p] = x_t[p] * (t_row[p] - s_row[p]);
    }
    rows.sum_s[at + r] += sum_row(x_s, tile);
    rows.sum_t[at + r] += sum_row(x_t, tile);
    rows.weighted[at + r] += sum_row(weighted, tile);
  }
}

template <typename A>
inline void running_sums(const PixelPairs<A>& pairs, const PanelPair& range, const RowSums& rows_i,
                         const RowSums& rows_j) {
  const Scratch<A> scratch(4 * tile_size);
  A* s = scratch.get();
  A* t = s + tile_size;
  A* s_turned = t + tile_size;
  A* t_turned = s_turned + tile_size;
  for (int64_t i = range.first_i; i < range.last_i; ++i)
    for (int64_t j = range.first_i == range.first_j ? i : range.first_j; j < range.last_j; ++j) {
      relation_tile(pairs.student, pairs.student_channels, i, j, pairs.scale, s);
      relation_tile(pairs.teacher, pairs.teacher_channels, i, j, pairs.scale, t);
      add_running(s, t, pairs.valid + j * tile, rows_i, (i - range.first_i) * tile);
      if (i == j) continue;
      transpose_tile(s, s_turned);
      transpose_tile(t, t_turned);
      add_running(s_turned, t_turned, pairs.valid + i * tile, rows_j, (j - range.first_j) * tile);
    }
}

template <typename A>
inline void pair_sums(const PixelPairs<A>& pairs, const PanelPair& range, const RowSums& rows_i,
                      const RowSums& rows_j) {
  if (pairs.bounded) return bounded_sums(pairs, range, rows_i, rows_j);
  running_sums(pairs, range, rows_i, rows_j);
}

// From relations, or logits if the pairs are not bounded: s[i, j] becomes the gradient of the loss for <s_i, s_j> taken as
// row i's and as row j's entry together. Pixels that do not count have any number here: they are multiplied with zeros, and
// what comes out for them is not used.
template <typename A>
inline void difference_tile(const PixelPairs<A>& pairs, const RowFactors<A>& rows_i, int64_t at_i,
                            const RowFactors<A>& rows_j, int64_t at_j, A* s, const A* t) {
  alignas(64) A column_s[tile], column_t[tile];
  const A scale = pairs.scale;
  for (int64_t p = 0; p < tile; ++p) {
    column_s[p] = rows_j.factor * rows_j.inverse_s[at_j + p];
    column_t[p] = rows_j.factor * rows_j.inverse_t[at_j + p];
  }
  for (int64_t r = 0; r < tile; ++r) {
    A* __restrict s_row = s + r * tile;
    const A* __restrict t_row = t + r * tile;
    const A row_s = rows_i.factor * rows_i.inverse_s[at_i + r], row_t = rows_i.factor * rows_i.inverse_t[at_i + r];
    if (pairs.bounded) {
      for (int64_t p = 0; p < tile; ++p) {
        const A e_s = exp_nonpositive(scale * (s_row[p] - A(1))), e_t = exp_nonpositive(scale * (t_row[p] - A(1)));
        s_row[p] = difference_of_products(e_s, row_s + column_s[p], e_t, row_t + column_t[p]);
      }
    } else {
      const A max_s = rows_i.max_s[at_i + r], max_t = rows_i.max_t[at_i + r];
      const A* __restrict max_column_s = rows_j.max_s + at_j;
      const A* __restrict max_column_t = rows_j.max_t + at_j;
      for (int64_t p = 0; p < tile; ++p) {
        const A x_s = s_row[p], x_t = t_row[p];
        s_row[p] = difference_of_products(exp_below(x_s, max_s), row_s, exp_below(x_t, max_t), row_t) +
                   difference_of_products(exp_below(x_s, max_column_s[p]), column_s[p],
                                          exp_below(x_t, max_column_t[p]), column_t[p]);
      }
    }
  }
}

template <typename A>
inline void pair_gradient(const PixelPairs<A>& pairs, const PanelPair& range, const RowFactors<A>& rows_i,
                          const RowFactors<A>& rows_j, A* gradient) {
  const int64_t channels = pairs.student_channels, panel = channels * tile;
  const A factor = pairs.bounded ? A(1) : pairs.scale;
  const Scratch<A> scratch(2 * tile_size);
  A* s = scratch.get();
  A* t = s + tile_size;
  for (int64_t i = range.first_i; i < range.last_i; ++i)
    for (int64_t j = range.first_i == range.first_j ? i : range.first_j; j < range.last_j; ++j) {
      relation_tile(pairs.student, channels, i, j, factor, s);
      relation_tile(pairs.teacher, pairs.teacher_channels, i, j, factor, t);
      difference_tile(pairs, rows_i, (i - range.first_i) * tile, rows_j, (j - range.first_j) * tile, s, t);
      tile_product<false, true>(pairs.student + i * panel, channels, tile, s, gradient + j * panel);
      if (i == j) continue;
      transpose_tile(s, t);
      tile_product<false, true>(pairs.student + j * panel, channels, tile, t, gradient + i * panel);
    }
}

// A tile to rows i and columns j of a matrix of pixels x pixels, as far as there are pixels.
template <typename A>
inline void put_tile(const A* from, int64_t pixels, int64_t i, int64_t j, A* matrix) {
  const int64_t rows = pixels - i < tile ? pixels - i : tile, columns = pixels - j < tile ? pixels - j : tile;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t p = 0; p < columns; ++p) matrix[(i + r) * pixels + j + p] = from[r * tile + p];
}

// The same back; zeros where there are no pixels.
template <typename A>
inline void get_tile(const A* matrix, int64_t pixels, int64_t i, int64_t j, A* to) {
  const int64_t rows = pixels - i < tile ? pixels - i : tile, columns = pixels - j < tile ? pixels - j : tile;
  for (int64_t r = 0; r < tile; ++r)
    for (int64_t p = 0; p < tile; ++p) to[r * tile + p] = r < rows && p < columns ? matrix[(i + r) * pixels + j + p] : A(0);
}

template <typename A>
inline void pair_relations(const A* rows, int64_t channels, int64_t pixels, const PanelPair& range, A* out) {
  const Scratch<A> scratch(2 * tile_size);
  A* x = scratch.get();
  A* turned = x + tile_size;
  for (int64_t i = range.first_i; i < range.last_i; ++i)
    for (int64_t j = range.first_i == range.first_j ? i : range.first_j; j < range.last_j; ++j) {
      relation_tile(rows, channels, i, j, A(1), x);
      put_tile(x, pixels, i * tile, j * tile, out);
      if (i == j) continue;
      transpose_tile(x, turned);
      put_tile(turned, pixels, j * tile, i * tile, out);
    }
}

template <typename A>
inline void pair_relations_gradient(const A* rows, int64_t channels, int64_t pixels, const PanelPair& range,
                                    const A* v_relations, A* gradient) {
  const int64_t panel = channels * tile;
  const Scratch<A> scratch(3 * tile_size);
  A* both = scratch.get();  // what arrives for (i, j) and for (j, i)
  A* other = both + tile_size;
  A* turned = other + tile_size;
  for (int64_t i = range.first_i; i < range.last_i; ++i)
    for (int64_t j = range.first_i == range.first_j ? i : range.first_j; j < range.last_j; ++j) {
      get_tile(v_relations, pixels, i * tile, j * tile, both);
      get_tile(v_relations, pixels, j * tile, i * tile, other);
      transpose_tile(other, turned);
      for (int64_t k = 0; k < tile_size; ++k) both[k] += turned[k];
      tile_product<false, true>(rows + i * panel, channels, tile, both, gradient + j * panel);
      if (i == j) continue;
      transpose_tile(both, turned);
      tile_product<false, true>(rows + j * panel, channels, tile, turned, gradient + i * panel);
    }
}

}  // namespace MEDKD_ISA
}  // namespace medkd
