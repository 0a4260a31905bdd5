// The products of every two rows of a matrix [rows, N], summed over the pixels: symmetric, tiles (i, j) with j >= i alone.
//
// A block takes one pair of tiles over one part of the pixels. The threads share out the squares of the pair's products (a
// tile with itself: its upper triangle) and, in groups, the pixels, whose next chunk is on its way from memory meanwhile.
// The parts depend on the shape alone, and are added in order, in double, by a second kernel.
//
// A Source says what the rows are. It is plain data with
//   fetches                                        how many packs of memory make one of its units
//   rows_inside(set)                               how threads should lie over the units of a tile
//   fetch(set, unit, pixel, count, raw)            loads a pack of a unit, counted over all tiles
//   stash(set, unit, pixel, count, raw, to, at)    to[at(r)] = the r-th of a unit's rows, zeros behind `count` pixels
//   row(tile, r)                                   where row r of a tile lies in the matrix of products, negative: nowhere
// or, where the rows lie in memory as they are multiplied, in whole packs (`plain`: what finds that out for every pack is more
// instructions than the products), with
//   planes(set), image(set), units                 instead of rows_inside, fetch and stash
#pragma once

#include <algorithm>

#include "pixels.h"
#include "planes.h"

namespace medkd {

constexpr int product_threads = 256;
constexpr int packs_per_thread = 8;  // in registers, on their way
constexpr int packs_per_run = 8;     // summed before the sum is added to the thread's total: fewer roundings of a large number

struct ProductPlan {
  int64_t sets, pixels, rows;    // `rows` of the products of one set
  int tiles, bands, tile_rows;   // a tile's rows, rounded up to bands of `reach`
  int tile_units;
  int packs;                     // of a chunk
  int64_t parts, chunks_per_part;

  __host__ __device__ int pairs() const { return tiles * (tiles + 1) / 2; }
  __host__ __device__ int64_t blocks() const { return sets * parts * pairs(); }
};

// Squares of a pair of tiles.
__host__ __device__ inline int squares_of(int bands, bool diagonal) {
  return diagonal ? bands * (bands + 1) / 2 : bands * bands;
}

// units: what the rows are counted in, `rows_per_unit` of them each.
template <typename A>
ProductPlan product_plan(int64_t sets, int64_t pixels, int64_t units, int rows_per_unit) {
  const int64_t most_units = tile_side * reach<A> / rows_per_unit;
  ProductPlan plan{};
  plan.sets = sets;
  plan.pixels = pixels;
  plan.rows = units * rows_per_unit;
  // one unit more than fits is still one tile: a row of ones beside 64 channels
  plan.tiles = units <= most_units + 1 ? 1 : static_cast<int>(ceil_div(units, most_units));
  plan.tile_units = static_cast<int>(ceil_div(units, plan.tiles));
  plan.tile_rows = plan.tile_units * rows_per_unit;
  plan.bands = ceil_div(plan.tile_rows, reach<A>);
  // as many packs as the threads' registers hold, the same number for every group of threads
  const int rows = (plan.tiles > 1 ? 2 : 1) * plan.bands * reach<A>;
  const int groups = product_threads / squares_of(plan.bands, plan.tiles == 1);
  const int fitting = packs_per_thread * product_threads / rows;
  plan.packs = std::max(fitting / groups * groups, std::min(fitting, groups));
  const int64_t chunk = int64_t{plan.packs} * lanes<A>, chunks = std::max<int64_t>(ceil_div(pixels, chunk), 1);
  // about 2048 blocks of at least two chunks
  const int64_t wanted = 2048 / std::max<int64_t>(sets * plan.pairs(), 1);
  const int64_t parts = std::clamp<int64_t>(wanted, 1, (chunks + 1) / 2);
  plan.chunks_per_part = ceil_div(chunks, parts);
  plan.parts = ceil_div(chunks, plan.chunks_per_part);
  return plan;
}

// Entries that a block leaves behind, and those of a set's parts together.
template <typename A>
__host__ __device__ int64_t pair_size(const ProductPlan& plan) {
  return int64_t{squares_of(plan.bands, plan.tiles == 1)} * reach<A> * reach<A>;
}

template <typename A>
int64_t partial_size(const ProductPlan& plan) {
  return plan.blocks() * pair_size<A>(plan);
}

struct TilePair {
  int i, j;
};

// The pair with number `index` in the order (0, 0), (0, 1), ..., (1, 1), ...
__device__ __forceinline__ TilePair upper_pair(int index, int count) {
  int i = 0;
  for (; index >= count - i; ++i) index -= count - i;
  return {i, i + index};
}

template <typename A, typename Source>
__global__ void __launch_bounds__(product_threads, 1)
    products_kernel(const Source source, const ProductPlan plan, A* partials) {  // [sets, parts, pairs, entries, squares]
  constexpr int width = lanes<A>, fetches = Source::fetches, steps = packs_per_thread / fetches;
  const int stride = band_stride<A>(plan.packs), tile_size = plan.bands * stride;
  A* const shared = shared_memory<A>();  // 2 x [tiles of the pair, bands]
  const int64_t block = blockIdx.x;
  const int64_t part = block / plan.pairs() % plan.parts, set = block / plan.pairs() / plan.parts;
  const TilePair pair = upper_pair(static_cast<int>(block % plan.pairs()), plan.tiles);
  const bool diagonal = pair.i == pair.j;
  const int stage = (plan.tiles > 1 ? 2 : 1) * tile_size;

  const int squares = squares_of(plan.bands, diagonal), groups = product_threads / squares;
  const int thread = static_cast<int>(threadIdx.x), group = thread / squares, square = thread % squares;
  const TilePair bands = diagonal ? upper_pair(square, plan.bands) : TilePair{square / plan.bands, square % plan.bands};
  const int a_at = bands.i * stride, b_at = bands.j * stride + (diagonal ? 0 : tile_size);

  const int units = (diagonal ? 1 : 2) * plan.tile_units;
  using Place = std::conditional_t<Source::plain, int, int64_t>;  // of a pixel
  const int64_t part_pixels = plan.chunks_per_part * plan.packs * width, part_begin = part * part_pixels;
  const Place begin = static_cast<Place>(part_begin);
  const Place end = static_cast<Place>(part_begin + part_pixels < plan.pixels ? part_begin + part_pixels : plan.pixels);
  const auto unit_of = [&](int row) {
    return row < plan.tile_units ? pair.i * plan.tile_units + row : pair.j * plan.tile_units + row - plan.tile_units;
  };

  const Walk plain_walk(units, plan.packs, false, thread, product_threads);
  Raw raw[steps][fetches];
  const auto load = [&](Place first) {
    if constexpr (Source::plain) {
      Walk walk = plain_walk;
      const Planes x = source.planes(set);
      const int to_next = static_cast<int>(x.stride_c);
      const int packs = end - first < plan.packs * width ? static_cast<int>(end - first) / width : plan.packs;
      with_type<A>(x.type, [&](auto zero) {
        using T = decltype(zero);
        if constexpr (sizeof(T) <= sizeof(A)) {
          const T* const from = static_cast<const T*>(x.data) + source.image(set) * x.stride_b + first;
#pragma unroll
          for (int k = 0; k < steps; ++k, walk.next()) {
            const int unit = min(unit_of(walk.row()), source.units - 1);  // what the others make is nowhere in the products
            raw[k][0] = Raw{};
            if (walk.inside() && walk.pack() < packs)
              raw[k][0] = as_raw(load_pack<width>(from + unit * to_next + walk.pack() * width));
          }
        }
      });
    } else {
      Walk walk(units, plan.packs, source.rows_inside(set), thread, product_threads);
#pragma unroll
      for (int k = 0; k < steps; ++k, walk.next())
        if (walk.inside()) {
          const int64_t pixel = first + walk.pack() * width;
          source.fetch(set, unit_of(walk.row()), pixel, pixels_in_pack<A>(pixel, end), raw[k]);
        }
    }
  };
  const auto keep = [&](Place first, A* to) {
    if constexpr (Source::plain) {
      Walk walk = plain_walk;
      with_type<A>(source.planes(set).type, [&](auto zero) {
        using T = decltype(zero);
#pragma unroll
        for (int k = 0; k < steps; ++k, walk.next())
          if (walk.inside()) {
            const int row = walk.row() < plan.tile_units ? walk.row() : walk.row() - plan.tile_units;
            A* const tile = to + (walk.row() < plan.tile_units ? 0 : tile_size);
            store_pack(tile + in_bands<A>(row, walk.pack(), stride), widen_as<T, A>(raw[k][0]));
          }
      });
    } else {
      Walk walk(units, plan.packs, source.rows_inside(set), thread, product_threads);
#pragma unroll
      for (int k = 0; k < steps; ++k, walk.next())
        if (walk.inside()) {
          const int64_t pixel = first + walk.pack() * width;
          const bool second = walk.row() >= plan.tile_units;
          const int row = walk.row() - (second ? plan.tile_units : 0), pack = walk.pack();
          A* const tile = to + (second ? tile_size : 0);
          source.stash(set, unit_of(walk.row()), pixel, pixels_in_pack<A>(pixel, end), raw[k],
                       [&](int r) { return tile + in_bands<A>(row + r * plan.tile_units, pack, stride); });
        }
    }
  };

  // the rows that fill up the last band stay 0
  const int padding = plan.bands * reach<A> - plan.tile_rows;
  for (int k = thread; k < padding * plan.packs * (plan.tiles > 1 ? 4 : 2); k += product_threads) {
    const int tile = k / (padding * plan.packs), rest = k % (padding * plan.packs);
    A* const to = shared + tile * tile_size + in_bands<A>(plan.tile_rows + rest / plan.packs, rest % plan.packs, stride);
    store_pack(to, Pack<A, width>{});
  }

  Square<A> sum, total;
  clear<A>(sum);
  clear<A>(total);
  if (begin < end) {
    load(begin);
    keep(begin, shared);
  }
  __syncthreads();
  int turn = 0, run = 0;
  for (Place first = begin; first < end; first += plan.packs * width, turn ^= 1) {
    const Place next = first + plan.packs * width;
    if (next < end) load(next);
    if (group < groups) {
      const A* const x = shared + turn * stage;
      for (int pack = group; pack < plan.packs; pack += groups) {
        add_dots(x + a_at + pack * pack_stride<A>, x + b_at + pack * pack_stride<A>, sum);
        if (++run % packs_per_run == 0) {
#pragma unroll
          for (int m = 0; m < reach<A>; ++m)
#pragma unroll
            for (int n = 0; n < reach<A>; ++n) {
              total[m][n] += sum[m][n];
              sum[m][n] = A(0);
            }
        }
      }
    }
    if (next < end) keep(next, shared + (turn ^ 1) * stage);
    __syncthreads();
  }

  // the groups' shares in every entry, in their order
#pragma unroll
  for (int m = 0; m < reach<A>; ++m)
#pragma unroll
    for (int n = 0; n < reach<A>; ++n) shared[(m * reach<A> + n) * product_threads + thread] = total[m][n] + sum[m][n];
  __syncthreads();
  A* const mine = partials + block * pair_size<A>(plan);
  for (int k = thread; k < squares * reach<A> * reach<A>; k += product_threads) {
    const A* const from = shared + k / squares * product_threads + k % squares;
    double entry = 0;
    for (int g = 0; g < groups; ++g) entry += static_cast<double>(from[g * squares]);
    mine[k] = static_cast<A>(entry);
  }
}

constexpr int gather_threads = 256;

// products [sets, rows, rows]: the parts added in order, both triangles.
template <typename A, typename Source>
__global__ void gather_kernel(const Source source, const ProductPlan plan, const A* partials, double* products) {
  const int64_t size = pair_size<A>(plan);
  const int64_t at = blockIdx.x * int64_t{gather_threads} + threadIdx.x;
  if (at >= plan.sets * plan.pairs() * size) return;
  const int64_t set = at / size / plan.pairs();
  const int pair_index = static_cast<int>(at / size % plan.pairs());
  const TilePair pair = upper_pair(pair_index, plan.tiles);
  const int squares = squares_of(plan.bands, pair.i == pair.j), k = static_cast<int>(at % size);
  if (k >= squares * reach<A> * reach<A>) return;
  const int square = k % squares, m = k / squares / reach<A>, n = k / squares % reach<A>;
  const TilePair bands =
      pair.i == pair.j ? upper_pair(square, plan.bands) : TilePair{square / plan.bands, square % plan.bands};
  const int64_t row = source.row(plan, pair.i, bands.i * reach<A> + m);
  const int64_t column = source.row(plan, pair.j, bands.j * reach<A> + n);
  // a square on the diagonal has every entry twice
  if (row < 0 || column < 0 || (pair.i == pair.j && bands.i == bands.j && n < m)) return;
  const A* const from = partials + ((set * plan.parts) * plan.pairs() + pair_index) * size + k;
  double sum = 0;
#pragma unroll 8
  for (int64_t part = 0; part < plan.parts; ++part) sum += static_cast<double>(from[part * plan.pairs() * size]);
  double* const to = products + set * plan.rows * plan.rows;
  to[row * plan.rows + column] = sum;
  to[column * plan.rows + row] = sum;
}

template <typename A, typename Source>
void sum_products(const Source& source, const ProductPlan& plan, A* partials, double* products, cudaStream_t stream) {
  const std::size_t tiles = (plan.tiles > 1 ? 4 : 2) * static_cast<std::size_t>(plan.bands) * band_stride<A>(plan.packs);
  const std::size_t entries = std::size_t{product_threads} * reach<A> * reach<A>;
  launch<products_kernel<A, Source>>({plan.blocks()}, product_threads,
                                     std::max(tiles, entries) * sizeof(A), stream, source, plan, partials);
  const int64_t count = plan.sets * plan.pairs() * pair_size<A>(plan);
  launch<gather_kernel<A, Source>>({ceil_div(count, gather_threads)},
                                   gather_threads, 0, stream, source, plan, partials, products);
}

}  // namespace medkd
