// Products of small matrices in registers, for any processor: vectors as GCC and Clang write them, no intrinsics.
//
// One form does for all: the left factor's elements may lie anywhere (strides), so it is never transposed, and the
// right factor's rows lie side by side in whole vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "scan_core.h"

namespace sambay {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 8;  // of 32 registers 24 hold sums
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kTileRows = 4;  // of 16 registers 12
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 8;
#else
constexpr int kVectorBytes = 16, kTileRows = 4;
#endif
constexpr int kTileVectors = 3;

template <typename T>
struct Simd {
  typedef T Vector __attribute__((vector_size(kVectorBytes)));
  typedef T Anywhere __attribute__((vector_size(kVectorBytes), aligned(alignof(T)), may_alias));  // in memory
  static constexpr int kLanes = kVectorBytes / sizeof(T);
};

template <typename T>
using Vector = typename Simd<T>::Vector;

template <typename T>
SAMBAY_FN int64_t whole_vectors(int64_t count) {
  return (count + Simd<T>::kLanes - 1) / Simd<T>::kLanes * Simd<T>::kLanes;
}

template <typename T>
SAMBAY_FN Vector<T> load_vector(const T* from) {
  return *reinterpret_cast<const typename Simd<T>::Anywhere*>(from);
}

template <typename T>
SAMBAY_FN void store_vector(T* to, const Vector<T>& value) {
  *reinterpret_cast<typename Simd<T>::Anywhere*>(to) = value;
}

template <typename T>
SAMBAY_FN Vector<T> all_lanes(T value) {
  return Vector<T>{} + value;
}

// 2^x of every lane, for x that is at most a rounding above 0: as exp2_of.
SAMBAY_FN Vector<float> exp2_lanes(const Vector<float>& x) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Vector<float> least = all_lanes(-126.f), bounded = x < least ? least : x;
  const Vector<float> shifted = bounded + kExp2Shift;
  const Vector<float> power = exp2_polynomial<Vector<float>>(bounded - (shifted - kExp2Shift));
  const Vector<float> result = (Vector<float>)((Bits)power + ((Bits)shifted << 23));  // a cast keeps the bits
  return x < least ? Vector<float>{} : result;
}

SAMBAY_FN Vector<double> exp2_lanes(const Vector<double>& x) {
  Vector<double> out = x;
  for (int lane = 0; lane < Simd<double>::kLanes; ++lane) out[lane] = std::exp2(out[lane]);
  return out;
}

// The left factor: element (i, k) at data[i * row + k * column].
template <typename T>
struct Left {
  const T* data;
  int64_t row, column;
};

// A matrix whose rows lie in whole vectors, `row` elements apart.
template <typename T>
struct Right {
  const T* data;
  int64_t row;
};

template <typename T>
struct Sums {
  T* data;
  int64_t row;
  bool add;  // to what stands there
};

// What a run of rows of the result needs: terms [begin, end) of each sum, columns [first, last) in whole vectors.
struct Reach {
  int64_t begin, end, first, last;
};

template <typename T, int Rows, int Vectors>
SAMBAY_FN void product_tile(const Left<T>& a, const Right<T>& b, const Sums<T>& c, int64_t begin, int64_t end) {
  constexpr int kLanes = Simd<T>::kLanes;
  Vector<T> sums[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < Vectors; ++n)
      sums[i][n] = c.add ? load_vector(c.data + i * c.row + n * kLanes) : Vector<T>{};
  const T* left = a.data + begin * a.column;
  const T* right = b.data + begin * b.row;
  for (int64_t k = begin; k < end; ++k, left += a.column, right += b.row) {
    Vector<T> factors[Vectors];
    for (int n = 0; n < Vectors; ++n) factors[n] = load_vector(right + n * kLanes);
    for (int i = 0; i < Rows; ++i)
      for (int n = 0; n < Vectors; ++n) sums[i][n] += left[i * a.row] * factors[n];
  }
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < Vectors; ++n) store_vector(c.data + i * c.row + n * kLanes, sums[i][n]);
}

template <typename T, int Rows>
void product_rows(const Left<T>& a, const Right<T>& b, const Sums<T>& c, const Reach& reach) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  for (int64_t n = reach.first; n < reach.last;) {
    const int64_t left = (reach.last - n) / kLanes;
    const Right<T> from{b.data + n, b.row};
    const Sums<T> to{c.data + n, c.row, c.add};
    if (left == 1) {
      product_tile<T, Rows, 1>(a, from, to, reach.begin, reach.end);
      n += kLanes;
    } else if (left == 2 || left == 4) {
      product_tile<T, Rows, 2>(a, from, to, reach.begin, reach.end);
      n += 2 * kLanes;
    } else {
      product_tile<T, Rows, kTileVectors>(a, from, to, reach.begin, reach.end);
      n += kTileVectors * kLanes;
    }
  }
}

template <typename T, int Rows = kTileRows>
void product_rows_of(int64_t rows, const Left<T>& a, const Right<T>& b, const Sums<T>& c, const Reach& reach) {
  if (rows == Rows) return product_rows<T, Rows>(a, b, c, reach);
  if constexpr (Rows > 1) product_rows_of<T, Rows - 1>(rows, a, b, c, reach);
}

// C (rows, .) = A B or C += A B; `reach_of(first, count)` says what a run of rows needs. The rest stays as it is.
template <typename T, typename ReachOf>
void product(int64_t rows, const Left<T>& a, const Right<T>& b, const Sums<T>& c, const ReachOf& reach_of) {
  for (int64_t i = 0; i < rows; i += kTileRows) {
    const int64_t count = std::min<int64_t>(kTileRows, rows - i);
    const Left<T> left{a.data + i * a.row, a.row, a.column};
    product_rows_of<T>(count, left, b, {c.data + i * c.row, c.row, c.add}, reach_of(i, count));
  }
}

}  // namespace
}  // namespace sambay
