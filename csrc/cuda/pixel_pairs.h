// Pairs of pixels, a tile at a time: pixel_relation with divergence "kl", and pixel_affinity.
//
// Every pixel's channels are divided by their norm once, and lie side by side in memory of the call's own, O(N C), in the
// type of the arithmetic; a tile is made of such rows. A block keeps its pixels (a tile's rows) and passes over the others.
#pragma once

#include "copy.h"
#include "pixel_norms.h"

namespace medkd {

// Two groups of 64 threads; each makes a tile's columns for half of its rows.
constexpr int pair_threads = 2 * tile_side * tile_side;
template <typename A>
constexpr int pair_columns = tile_columns<A>;
template <typename A>
constexpr int pair_rows = 2 * tile_columns<A>;
constexpr int pair_bands = 2 * tile_side;
constexpr int pair_packs = 6;  // of the channels, in a step: with more the gradient's memory is not on every GPU

// One network's pixels: [B, padded, depth], zeros where a channel or a pixel is not there or does not count.
template <typename A>
struct UnitRows {
  const A* values;
  int64_t padded;
  int depth;

  __device__ __forceinline__ const A* of(int64_t image) const { return values + image * padded * depth; }
};

// One network or two.
template <typename A>
struct PairNetworks {
  UnitRows<A> rows[2];
  int count;
};

template <typename A>
int row_depth(int64_t channels) {
  return static_cast<int>(ceil_div(channels, lanes<A>) * lanes<A>);
}

// rows: [B, padded, row_depth].
template <typename A>
UnitRows<A> make_rows(const Normalised<A>& x, A* rows, cudaStream_t stream);

// A block's way over the tiles of its rows with all columns of images [begin, end). The chunks of the channels that the
// tiles are made of come one step ahead.
template <typename A>
class PairTiles {
 public:
  static constexpr int stride = band_stride<A>(pair_packs);
  static constexpr int stage = (pair_bands + tile_side) * stride;
  static constexpr int elements = 2 * stage;  // of shared memory

  // networks: an argument of the kernel, which stays where it is.
  __device__ __forceinline__ PairTiles(const PairNetworks<A>& networks, int64_t image, int64_t first, int64_t begin,
                                       int64_t end, A* shared, int64_t first_column = 0)
      : networks_(networks), image_(image), first_(first), end_(end), shared_(shared), next_image_(begin),
        next_column_(first_column) {
    start();
  }

  // The relations of the block's rows with the columns of the next tile, for the next network. Ends behind a barrier.
  __device__ __forceinline__ void relations(int network, Square<A>& sum) {
    clear<A>(sum);
    const int band = static_cast<int>(threadIdx.x) / tile_side, column = static_cast<int>(threadIdx.x) % tile_side;
    const int depth = networks_.rows[network].depth;
    for (int at = 0; at < depth; at += pair_packs * lanes<A>) {
      const A* const now = shared_ + turn_ * stage;
      turn_ ^= 1;
      start();
      wait_for_copies<1>();
      __syncthreads();
      const A *a = now + band * stride, *b = now + (pair_bands + column) * stride;
      const int packs = min((depth - at) / lanes<A>, pair_packs);
#pragma unroll 1
      for (int pack = 0; pack < packs; ++pack, a += pack_stride<A>, b += pack_stride<A>) add_dots(a, b, sum);
      __syncthreads();
    }
  }

 private:
  // Starts the next copy, if there is one, and goes one step on.
  __device__ __forceinline__ void start() {
    if (next_image_ < end_) {
      const UnitRows<A>& rows = networks_.rows[next_network_];
      A* const to = shared_ + turn_ * stage;
      const int packs = min((rows.depth - next_channel_) / lanes<A>, pair_packs);
#pragma unroll 2
      for (int k = static_cast<int>(threadIdx.x); k < (pair_rows<A> + pair_columns<A>) * pair_packs; k += pair_threads) {
        const int row = k / pair_packs, pack = k % pair_packs;
        const bool column = row >= pair_rows<A>;
        const int64_t wanted = column ? next_column_ + row - pair_rows<A> : first_ + row;
        const int64_t pixel = wanted < rows.padded ? wanted : rows.padded - 1;  // anything finite: it is not used
        if (pack < packs)
          copy_pack(to + in_bands<A>(row, pack, stride), rows.of(column ? next_image_ : image_) + pixel * rows.depth +
                                                             next_channel_ + pack * lanes<A>);
      }
      next_channel_ += pair_packs * lanes<A>;
      if (next_channel_ >= rows.depth) {
        next_channel_ = 0;
        if (++next_network_ == networks_.count) {
          next_network_ = 0;
          next_column_ += pair_columns<A>;
          if (next_column_ >= rows.padded) {
            next_column_ = 0;
            ++next_image_;
          }
        }
      }
    }
    commit_copies();
  }

  const PairNetworks<A>& networks_;
  int64_t image_, first_, end_;
  A* shared_;
  int turn_ = 0, next_network_ = 0, next_channel_ = 0;
  int64_t next_image_, next_column_;
};

// A tile of numbers for pairs, in shared memory as bands: for products with the columns' pixels. Every thread has the
// square that PairTiles made it.
template <typename A>
struct PairMatrix {
  static constexpr int packs = pair_columns<A> / lanes<A>;
  static constexpr int stride = band_stride<A>(packs);
  static constexpr int elements = pair_bands * stride;
  A* shared;

  // Pack v of row m of the thread's square.
  __device__ __forceinline__ A* at(int m, int v) const {
    const int band = static_cast<int>(threadIdx.x) / tile_side, column = static_cast<int>(threadIdx.x) % tile_side;
    return shared + band * stride + (column * (reach<A> / lanes<A>) + v) * pack_stride<A> + m * lanes<A>;
  }

  // Any thread's.
  __device__ __forceinline__ A& entry(int row, int column) const {
    return shared[in_bands<A>(row, column / lanes<A>, stride) + column % lanes<A>];
  }

  // The thread's square.
  __device__ __forceinline__ void put(const Square<A>& values) const {
#pragma unroll
    for (int m = 0; m < reach<A>; ++m)
#pragma unroll
      for (int v = 0; v < reach<A> / lanes<A>; ++v) {
        Pack<A, lanes<A>> pack;
#pragma unroll
        for (int k = 0; k < lanes<A>; ++k) pack.value[k] = values[m][v * lanes<A> + k];
        store_pack(at(m, v), pack);
      }
  }
};

// g[pixel, channel] += the sum over a tile's columns of matrix[pixel, column] * row[column, channel]: the gradient for the
// block's normalised pixels. It stays in registers where these hold all channels.
template <typename A>
class PairGradient {
 public:
  static constexpr int elements = pair_columns<A> * line_stride<A>;  // of shared memory

  // g: [B, channels, padded]
  __device__ __forceinline__ PairGradient(const UnitRows<A>& rows, int channels, int64_t image, int64_t first, A* g,
                                          A* shared)
      : rows_(rows), channels_(channels), first_(first), g_(g + image * channels * rows.padded), shared_(shared) {
    clear<A>(sum_);
  }

  // Starts to copy the columns' first channels, when no thread needs the former ones any more.
  __device__ __forceinline__ void start(int64_t image, int64_t first_column, int channel = 0) {
    constexpr int packs = tile_columns<A> / lanes<A>;
#pragma unroll 2
    for (int k = static_cast<int>(threadIdx.x); k < pair_columns<A> * packs; k += pair_threads) {
      const int row = k / packs, at = k % packs * lanes<A>;
      A* const to = shared_ + row * line_stride<A> + at;
      if (channel + at < rows_.depth)
        copy_pack(to, rows_.of(image) + (first_column + row) * rows_.depth + channel + at);
      else
        store_pack(to, Pack<A, lanes<A>>{});
    }
  }

  // When the copies are there and all threads have written the matrix. Ends behind a barrier.
  __device__ __forceinline__ void add(const PairMatrix<A>& matrix, int64_t image, int64_t first_column) {
    const int band = static_cast<int>(threadIdx.x) / tile_side, column = static_cast<int>(threadIdx.x) % tile_side;
    for (int channel = 0; channel < channels_; channel += tile_columns<A>) {
      if (channel > 0) {
        start(image, first_column, channel);
        commit_copies();
        wait_for_copies<0>();
        __syncthreads();
      }
      if (channels_ > tile_columns<A>) load(channel);
      const A *a = matrix.shared + band * PairMatrix<A>::stride, *b = shared_ + column * lanes<A>;
#pragma unroll 1
      for (int pack = 0; pack < PairMatrix<A>::packs; ++pack, a += pack_stride<A>, b += lanes<A> * line_stride<A>)
        add_products(a, b, sum_);
      if (channels_ > tile_columns<A>) store(channel);
      __syncthreads();
    }
    begun_ = true;
  }

  __device__ __forceinline__ void finish() const {
    if (channels_ <= tile_columns<A>) store(0);
  }

 private:
  // Column n of the square as packs along the pixels, which are its rows.
  __device__ __forceinline__ A* place(int channel, int n) const {
    const int c = channel + column_of<A>(static_cast<int>(threadIdx.x) % tile_side, n);
    const int64_t pixel = first_ + static_cast<int>(threadIdx.x) / tile_side * reach<A>;
    return c < channels_ && pixel < rows_.padded ? g_ + c * rows_.padded + pixel : nullptr;
  }

  __device__ __forceinline__ void load(int channel) {
    if (!begun_) return clear<A>(sum_);
#pragma unroll
    for (int n = 0; n < reach<A>; ++n) {
      const A* const from = place(channel, n);
#pragma unroll
      for (int v = 0; v < reach<A> / lanes<A>; ++v) {
        const Pack<A, lanes<A>> pack = from == nullptr ? Pack<A, lanes<A>>{} : load_pack<lanes<A>>(from + v * lanes<A>);
#pragma unroll
        for (int k = 0; k < lanes<A>; ++k) sum_[v * lanes<A> + k][n] = pack.value[k];
      }
    }
  }

  __device__ __forceinline__ void store(int channel) const {
#pragma unroll
    for (int n = 0; n < reach<A>; ++n) {
      A* const to = place(channel, n);
#pragma unroll
      for (int v = 0; v < reach<A> / lanes<A>; ++v) {
        Pack<A, lanes<A>> pack;
#pragma unroll
        for (int k = 0; k < lanes<A>; ++k) pack.value[k] = sum_[v * lanes<A> + k][n];
        if (to != nullptr) store_pack(to + v * lanes<A>, pack);
      }
    }
  }

  const UnitRows<A>& rows_;
  int channels_;
  int64_t first_;
  A* g_;
  A* shared_;
  bool begun_ = false;
  Square<A> sum_;
};

}  // namespace medkd
