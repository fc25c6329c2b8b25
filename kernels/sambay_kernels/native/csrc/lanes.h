// Sums over the lanes of vectors, in one order: many at a time, each into a lane of its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "products.h"

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SAMBAY_SHUFFLES
#endif
#endif

namespace sambay {
namespace {

#if defined(SAMBAY_SHUFFLES)
// Where a lane of the folded vector comes from, and `block / 2` behind it.
constexpr int folded_from(int lane, int block, int lanes) {
  const int half = block / 2;
  return lane / block * block + lane % half + (lane % block < half ? 0 : lanes);
}

// In every block of lanes: the halves of a's block added in its first half, those of b's in the second.
template <int Block, typename T, size_t... I>
SAMBAY_FN Vector<T> fold(const Vector<T>& a, const Vector<T>& b, std::index_sequence<I...>) {
  constexpr int kLanes = Simd<T>::kLanes;
  return __builtin_shufflevector(a, b, folded_from(I, Block, kLanes)...) +
         __builtin_shufflevector(a, b, (folded_from(I, Block, kLanes) + Block / 2)...);
}

template <typename T, int Count>
SAMBAY_FN Vector<T> sums_of_lanes(const Vector<T>* vectors) {
  if constexpr (Count == 1) {
    return vectors[0];
  } else {
    Vector<T> half[Count / 2];
    for (int i = 0; i < Count / 2; ++i)
      half[i] = fold<Count, T>(vectors[i], vectors[i + Count / 2], std::make_index_sequence<Simd<T>::kLanes>());
    return sums_of_lanes<T, Count / 2>(half);
  }
}
#else
template <typename T, int Count>
SAMBAY_FN Vector<T> sums_of_lanes(const Vector<T>* vectors) {
  Vector<T> out{};
  for (int i = 0; i < Count; ++i)
    for (int lane = 0; lane < Count; ++lane) out[i] += vectors[i][lane];
  return out;
}
#endif

// Lane i: the sum of the lanes of vectors[i], for as many vectors as a vector has lanes.
template <typename T>
SAMBAY_FN Vector<T> sums_of_lanes(const Vector<T>* vectors) {
  return sums_of_lanes<T, Simd<T>::kLanes>(vectors);
}

template <typename T>
SAMBAY_FN T sum_of_lanes(const Vector<T>& value) {
  T sum = 0;
  for (int lane = 0; lane < Simd<T>::kLanes; ++lane) sum += value[lane];
  return sum;
}

// The first `count` elements of a vector's worth of memory, zeros behind them; and back.
template <typename V, typename E>
SAMBAY_FN V load_first(const E* from, int64_t count) {
  constexpr int64_t kWhole = sizeof(V) / sizeof(E);
  V out{};
  if (count >= kWhole) {
    std::memcpy(&out, from, sizeof out);
    return out;
  }
#if defined(__AVX512BW__)
  return (V)_mm512_maskz_loadu_epi8((uint64_t{1} << count * sizeof(E)) - 1, from);
#else
  std::memcpy(&out, from, count * sizeof(E));
  return out;
#endif
}

template <typename T>
SAMBAY_FN void store_first(T* to, const Vector<T>& value, int64_t count) {
  if (count >= Simd<T>::kLanes) return store_vector(to, value);
#if defined(__AVX512BW__)
  _mm512_mask_storeu_epi8(to, (uint64_t{1} << count * sizeof(T)) - 1, (__m512i)value);
#else
  std::memcpy(to, &value, count * sizeof(T));
#endif
}

}  // namespace
}  // namespace sambay
