#include "pixel_call.h"
#include "pixel_pairs.h"

namespace medkd {

// A block makes the tiles of 128 pixels with the columns from the first of them on, and writes each twice: the matrix is
// symmetric. (Entries below the diagonal of the first tiles come from both.)
template <typename A>
__global__ void __launch_bounds__(pair_threads, 2)
    affinity_kernel(const __grid_constant__ PairNetworks<A> networks, int64_t pixels, A* affinity) {  // [B, N, N]
  A* const shared = shared_memory<A>();
  const int64_t padded = networks.rows[0].padded, blocks = ceil_div(padded, pair_rows<A>);
  const int64_t first = blockIdx.x % blocks * pair_rows<A>, image = blockIdx.x / blocks;
  A* const out = affinity + image * pixels * pixels;
  PairTiles<A> tiles(networks, image, first, image, image + 1, shared, first);
  const PairMatrix<A> matrix{shared + PairTiles<A>::elements};
  for (int64_t j = first; j < padded; j += pair_columns<A>) {
    Square<A> sum;
    tiles.relations(0, sum);
    matrix.put(sum);
    __syncthreads();
    // neighbouring threads write neighbouring columns, and then neighbouring rows of the transposed tile
    for (int k = static_cast<int>(threadIdx.x); k < pair_rows<A> * pair_columns<A>; k += pair_threads) {
      const int row = k / pair_columns<A>, column = k % pair_columns<A>;
      if (first + row < pixels && j + column < pixels)
        out[(first + row) * pixels + j + column] = matrix.entry(row, column);
    }
    for (int k = static_cast<int>(threadIdx.x); k < pair_rows<A> * pair_columns<A>; k += pair_threads) {
      const int row = k % pair_rows<A>, column = k / pair_rows<A>;
      if (first + row < pixels && j + column < pixels && j >= first + pair_rows<A>)
        out[(j + column) * pixels + first + row] = matrix.entry(row, column);
    }
    __syncthreads();
  }
}

// The gradient for the normalised pixels from `first` on: what arrives for (i, j) and for (j, i), times the columns'.
template <typename A>
__global__ void __launch_bounds__(pair_threads, 2)
    affinity_gradient_kernel(const __grid_constant__ PairNetworks<A> networks, int channels, int64_t pixels,
                             const A* upstream,  // [B, N, N]
                             A* g) {             // [B, channels, padded]
  A* const shared = shared_memory<A>();
  const int64_t padded = networks.rows[0].padded, blocks = ceil_div(padded, pair_rows<A>);
  const int64_t first = blockIdx.x % blocks * pair_rows<A>, image = blockIdx.x / blocks;
  const A* const arriving = upstream + image * pixels * pixels;
  const PairMatrix<A> matrix{shared};
  PairGradient<A> gradient(networks.rows[0], channels, image, first, g, shared + PairMatrix<A>::elements);
  for (int64_t j = 0; j < padded; j += pair_columns<A>) {
    gradient.start(image, j);
    commit_copies();
    for (int k = static_cast<int>(threadIdx.x); k < pair_rows<A> * pair_columns<A>; k += pair_threads) {
      const int row = k / pair_columns<A>, column = k % pair_columns<A>;
      const bool there = first + row < pixels && j + column < pixels;
      matrix.entry(row, column) = there ? arriving[(first + row) * pixels + j + column] : A(0);
    }
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.x); k < pair_rows<A> * pair_columns<A>; k += pair_threads) {
      const int row = k % pair_rows<A>, column = k / pair_rows<A>;
      if (first + row < pixels && j + column < pixels)
        matrix.entry(row, column) += arriving[(j + column) * pixels + first + row];
    }
    wait_for_copies<0>();
    __syncthreads();
    gradient.add(matrix, image, j);
  }
  gradient.finish();
}

// What forward and backward of one call share.
template <typename A>
struct AffinityCall {
  PixelCall call;
  A *mean = nullptr, *inverse = nullptr, *rows = nullptr;

  AffinityCall(const Tensor& x, const std::string& relation) : call(x, x, std::nullopt, relation) {}

  void ask(Room& room) {
    ask_norms(room, call.images, call.pixels, call.kind, mean, inverse);
    room.ask(rows, call.images * padded_pixels(call.pixels) * row_depth<A>(call.channels));
  }
  Normalised<A> norms(cudaStream_t stream) const {
    return find_norms(call.student, call.images, call.channels, call.pixels, nullptr, call.kind, mean, inverse, stream);
  }
  Blocks grid() const { return {call.images * ceil_div(padded_pixels(call.pixels), pair_rows<A>)}; }
};

template <typename A>
static Tensor forward(AffinityCall<A> call, const Tensor& x, cudaStream_t stream) {
  const int64_t images = call.call.images, pixels = call.call.pixels;
  Tensor affinity = new_like(x, {images, pixels, pixels}, call.call.type);
  Room room;
  call.ask(room);
  room.take(x);
  const PairNetworks<A> networks{{make_rows(call.norms(stream), call.rows, stream), {}}, 1};
  constexpr std::size_t shared = (PairTiles<A>::elements + PairMatrix<A>::elements) * sizeof(A);
  launch<affinity_kernel<A>>(call.grid(), pair_threads, shared, stream, networks, pixels,
                             static_cast<A*>(affinity.data_ptr()));
  return affinity;
}

template <typename A>
static Tensor backward(AffinityCall<A> call, const Tensor& x, const Tensor& upstream, cudaStream_t stream) {
  const int64_t images = call.call.images, pixels = call.call.pixels, channels = call.call.channels;
  Room room;
  A* g = nullptr;
  call.ask(room);
  room.ask(g, images * channels * padded_pixels(pixels));
  room.take(x);
  const Normalised<A> norms = call.norms(stream);
  const PairNetworks<A> networks{{make_rows(norms, call.rows, stream), {}}, 1};
  constexpr std::size_t shared = (PairMatrix<A>::elements + PairGradient<A>::elements) * sizeof(A);
  launch<affinity_gradient_kernel<A>>(call.grid(), pair_threads, shared, stream, networks, static_cast<int>(channels),
                                      pixels, static_cast<const A*>(upstream.data_ptr()), g);
  const Gradient gradient(x);
  store_through_norms(norms, g, planes_of(gradient.written, call.call.holder), stream);
  return gradient.finish();
}

static Tensor pixel_affinity(const Tensor& x,  // [B, C, *S]
                             const std::string& relation) {
  const OnDevice device(x);
  return arithmetic_type(x, x) == ScalarType::Double ? forward(AffinityCall<double>(x, relation), x, device.stream())
                                                     : forward(AffinityCall<float>(x, relation), x, device.stream());
}

static Tensor pixel_affinity_backward(
    const Tensor& x,         // [B, C, *S]
    const Tensor& upstream,  // [B, N, N], contiguous, in the type of the arithmetic
    const std::string& relation) {
  const OnDevice device(x);
  return arithmetic_type(x, x) == ScalarType::Double
             ? backward(AffinityCall<double>(x, relation), x, upstream, device.stream())
             : backward(AffinityCall<float>(x, relation), x, upstream, device.stream());
}

}  // namespace medkd

MEDKD_IMPLEMENTS {
  m.impl("pixel_affinity_cuda", TORCH_BOX(&medkd::pixel_affinity));
  m.impl("pixel_affinity_backward_cuda", TORCH_BOX(&medkd::pixel_affinity_backward));
}
