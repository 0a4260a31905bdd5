// Vectors of the instruction set's width, by the extensions that gcc and clang share, and how they are rearranged.
#pragma once

#include <utility>

#include "../math/elementary.h"

namespace medkd {
namespace MEDKD_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes), may_alias));
};
template <typename A>
using Vector = typename VectorOf<A>::type;

template <typename A>
constexpr int vector_lanes = vector_bytes / static_cast<int>(sizeof(A));

template <typename A>
MEDKD_INLINE Vector<A> load(const A* from) {
  return *reinterpret_cast<const Vector<A>*>(from);
}

// The same at any address.
template <typename A>
struct LooseVectorOf;
template <>
struct LooseVectorOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes), may_alias, aligned(4)));
};
template <>
struct LooseVectorOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes), may_alias, aligned(8)));
};

template <typename A>
MEDKD_INLINE Vector<A> load_loose(const A* from) {
  return *reinterpret_cast<const typename LooseVectorOf<A>::type*>(from);
}

template <typename A>
MEDKD_INLINE void store_loose(Vector<A> x, A* to) {
  *reinterpret_cast<typename LooseVectorOf<A>::type*>(to) = x;
}

#if !defined(__clang__)
// Integers of the lanes' size, which name lanes in a shuffle.
template <typename A>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef int32_t type __attribute__((vector_size(vector_bytes)));
};
template <>
struct LanesOf<double> {
  typedef int64_t type __attribute__((vector_size(vector_bytes)));
};
#endif

// Lanes first, first + step, first + 2 step, ... of a followed by b.
template <typename A, int first, int step, int... lane>
MEDKD_INLINE Vector<A> pick_lanes(Vector<A> a, Vector<A> b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (first + step * lane)...);
#else
  return __builtin_shuffle(a, b, typename LanesOf<A>::type{(first + step * lane)...});
#endif
}
template <typename A, int first, int step>
MEDKD_INLINE Vector<A> pick(Vector<A> a, Vector<A> b) {
  return pick_lanes<A, first, step>(a, b, std::make_integer_sequence<int, vector_lanes<A>>());
}

// a's and b's lanes in turn, from lane `first` on.
template <typename A, int first, int... lane>
MEDKD_INLINE Vector<A> zip_lanes(Vector<A> a, Vector<A> b, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (first + lane / 2 + lane % 2 * vector_lanes<A>)...);
#else
  return __builtin_shuffle(a, b, typename LanesOf<A>::type{(first + lane / 2 + lane % 2 * vector_lanes<A>)...});
#endif
}
template <typename A, int first>
MEDKD_INLINE Vector<A> zip(Vector<A> a, Vector<A> b) {
  return zip_lanes<A, first>(a, b, std::make_integer_sequence<int, vector_lanes<A>>());
}

// Pairs that lie side by side in memory, as a vector of their first ones and one of their second ones. With AVX2, whose quick
// shuffles stay in a half of a vector, halves are loaded and stored so that this is where their numbers are wanted.
#if defined(__AVX__) && !defined(__AVX512F__) && defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define MEDKD_HALVES
#endif
#endif

template <typename A>
struct Pairs {
  Vector<A> first, second;
};

#if defined(MEDKD_HALVES)
template <typename A>
struct LooseHalfOf;
template <>
struct LooseHalfOf<float> {
  typedef float type __attribute__((vector_size(vector_bytes / 2), may_alias, aligned(4)));
};
template <>
struct LooseHalfOf<double> {
  typedef double type __attribute__((vector_size(vector_bytes / 2), may_alias, aligned(8)));
};

// Of two vectors, one after the other, which lane a shuffle in halves puts into `lane`. To take pairs apart: the first ones of
// a half of the one, then of the other. To put them together: numbers of both in turn.
constexpr int apart(int lane, int lanes) {
  const int half = lanes / 2, within = lane % half;
  return lane - within + 2 * within % half + (within < half / 2 ? 0 : lanes);
}
constexpr int together(int lane, int lanes) {
  const int half = lanes / 2, within = lane % half;
  return lane - within + within / 2 + (within % 2 == 0 ? 0 : lanes);
}

template <typename A, int... lane>
MEDKD_INLINE Pairs<A> load_pairs(const A* from, std::integer_sequence<int, lane...>) {
  constexpr int lanes = vector_lanes<A>, half = lanes / 2;
  const auto halves = [](const A* low, const A* high) {
    using Half = typename LooseHalfOf<A>::type;
    return __builtin_shufflevector(*reinterpret_cast<const Half*>(low), *reinterpret_cast<const Half*>(high), lane...);
  };
  const Vector<A> even = halves(from, from + lanes), odd = halves(from + half, from + lanes + half);
  return {__builtin_shufflevector(even, odd, apart(lane, lanes)...),
          __builtin_shufflevector(even, odd, (apart(lane, lanes) + 1)...)};
}

template <typename A, int first, int... lane>
MEDKD_INLINE void store_half(Vector<A> x, A* to, std::integer_sequence<int, lane...>) {
  *reinterpret_cast<typename LooseHalfOf<A>::type*>(to) = __builtin_shufflevector(x, x, (first + lane)...);
}

template <typename A, int... lane>
MEDKD_INLINE void store_pairs(Pairs<A> x, A* to, std::integer_sequence<int, lane...>) {
  constexpr int lanes = vector_lanes<A>, half = lanes / 2;
  const Vector<A> even = __builtin_shufflevector(x.first, x.second, together(lane, lanes)...);
  const Vector<A> odd = __builtin_shufflevector(x.first, x.second, (together(lane, lanes) + half / 2)...);
  constexpr std::make_integer_sequence<int, half> in_half;
  store_half<A, 0>(even, to, in_half);
  store_half<A, 0>(odd, to + half, in_half);
  store_half<A, half>(even, to + lanes, in_half);
  store_half<A, half>(odd, to + lanes + half, in_half);
}

template <typename A>
MEDKD_INLINE Pairs<A> load_pairs(const A* from) {
  return load_pairs<A>(from, std::make_integer_sequence<int, vector_lanes<A>>());
}

template <typename A>
MEDKD_INLINE void store_pairs(Pairs<A> x, A* to) {
  store_pairs<A>(x, to, std::make_integer_sequence<int, vector_lanes<A>>());
}
#else
template <typename A>
MEDKD_INLINE Pairs<A> load_pairs(const A* from) {
  const Vector<A> a = load_loose(from), b = load_loose(from + vector_lanes<A>);
  return {pick<A, 0, 2>(a, b), pick<A, 1, 2>(a, b)};
}

template <typename A>
MEDKD_INLINE void store_pairs(Pairs<A> x, A* to) {
  store_loose<A>(zip<A, 0>(x.first, x.second), to);
  store_loose<A>(zip<A, vector_lanes<A> / 2>(x.first, x.second), to + vector_lanes<A>);
}
#endif

// x[i][j] becomes x[j][i]: every round of zipping the first half of the rows with the second moves one bit of the index.
template <typename A>
MEDKD_INLINE void transpose(Vector<A>* x) {
  constexpr int lanes = vector_lanes<A>;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    Vector<A> y[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      y[2 * i] = zip<A, 0>(x[i], x[i + lanes / 2]);
      y[2 * i + 1] = zip<A, lanes / 2>(x[i], x[i + lanes / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) x[i] = y[i];
  }
}


}  // namespace MEDKD_ISA
}  // namespace medkd
