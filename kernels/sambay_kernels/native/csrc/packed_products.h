// Products of few rows with matrices that were packed once, in any type: the heart of a decoding step.
//
// A matrix (outputs, inputs) lies in panels of two vectors of outputs, each panel's terms one after another: every
// product reads it from front to end. bfloat16's terms lie in pairs. A result is the sum over its terms in their order,
// in one register, whatever rows stand beside it: the same bits for any number of rows and of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "amx.h"
#include "compute_type.h"
#include "products.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace sambay {

// S: the type of matrices and of what they meet, T: that of sums.
template <typename S>
struct Matrix {
  const S* panels;
  int64_t outputs, terms;  // terms as packed: zeros fill them up to a multiple of kTerms
};

namespace {

#if defined(SAMBAY_AMX)
constexpr int64_t kTermStep = kAmxTerms;
#else
constexpr int64_t kTermStep = 2;
#endif
template <typename S>
constexpr int64_t kSideBySide = std::is_same_v<S, BFloat16> ? 2 : 1;  // terms that lie so
template <typename S>
constexpr int64_t kTerms = std::is_same_v<S, BFloat16> ? kTermStep : 1;

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kPanelRows = 12;  // of 32 registers 24 hold sums
#else
constexpr int kPanelRows = 6;  // of 16 registers 12
#endif

template <typename T>
constexpr int64_t kPanel = 2 * Simd<T>::kLanes;  // outputs

constexpr int kMostRows = 32;  // of a tile of any kind

template <typename T>
using PanelSums = T[kMostRows][kPanel<T>];

// A worker of a group that shares each piece of work.
struct Worker {
  int64_t index, count;
  int64_t first(int64_t total) const { return total * index / count; }
  int64_t last(int64_t total) const { return total * (index + 1) / count; }
};

// Rows that a product reads, `row` elements apart.
template <typename S>
struct Inputs {
  const S* data;
  int64_t row;
};

// What is read soon, fetched on the side: `step` bytes, of two lines at most, with each term (or pair). A single row
// reads as fast as memory gives, and is slower for a second request.
struct Ahead {
  const char* next;
  int64_t step;
  template <int Rows>
  SAMBAY_FN void fetch() {
    __builtin_prefetch(next, 0, 2);
    if (Rows > 1 && step > 64) __builtin_prefetch(next + 64, 0, 2);
    next += step;
  }
};

template <typename S, int Rows, typename T = Compute<S>>
void panel_sums(const Inputs<S>& x, const S* panel, int64_t terms, Ahead ahead, PanelSums<T>& out) {
  constexpr int kLanes = Simd<T>::kLanes;
  Vector<T> sums[Rows][2] = {};
  for (int64_t k = 0; k < terms; ++k, panel += 2 * kLanes) {
    ahead.fetch<Rows>();
    const Vector<T> low = load_vector(panel), high = load_vector(panel + kLanes);
    for (int i = 0; i < Rows; ++i) {
      sums[i][0] += x.data[i * x.row + k] * low;
      sums[i][1] += x.data[i * x.row + k] * high;
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < 2; ++n) store_vector(out[i] + n * kLanes, sums[i][n]);
}

// A pair of bfloat16 in every lane.
typedef uint32_t Pairs __attribute__((vector_size(kVectorBytes)));

SAMBAY_FN Vector<float> evens(const Pairs& pairs) { return (Vector<float>)(pairs << 16); }
SAMBAY_FN Vector<float> odds(const Pairs& pairs) { return (Vector<float>)(pairs & 0xffff0000u); }

SAMBAY_FN Vector<float> add_products(const Vector<float>& sums, const Pairs& a, const Pairs& b) {
#if defined(__AVX512BF16__)
  return (Vector<float>)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
  return sums + evens(a) * evens(b) + odds(a) * odds(b);
#endif
}

SAMBAY_FN Vector<float> add_products(const Vector<float>& sums, const Vector<float>& a, const Vector<float>& b) {
  return sums + a * b;
}

SAMBAY_FN Vector<double> add_products(const Vector<double>& sums, const Vector<double>& a, const Vector<double>& b) {
  return sums + a * b;
}

template <int Rows>
void panel_sums_of_pairs(const Inputs<BFloat16>& x, const BFloat16* panel, int64_t terms, Ahead ahead,
                        PanelSums<float>& out) {
  constexpr int kLanes = Simd<float>::kLanes;
  Vector<float> sums[Rows][2] = {};
  for (int64_t k = 0; k < terms; k += 2, panel += 4 * kLanes) {
    ahead.fetch<Rows>();
    Pairs low, high;
    std::memcpy(&low, panel, sizeof low);
    std::memcpy(&high, panel + 2 * kLanes, sizeof high);
    for (int i = 0; i < Rows; ++i) {
      uint32_t factor;
      std::memcpy(&factor, x.data + i * x.row + k, sizeof factor);
      const Pairs factors = Pairs{} + factor;
      sums[i][0] = add_products(sums[i][0], factors, low);
      sums[i][1] = add_products(sums[i][1], factors, high);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < 2; ++n) store_vector(out[i] + n * kLanes, sums[i][n]);
}

template <typename S, int Rows = kPanelRows>
void panel_sums_of(int64_t rows, const Inputs<S>& x, const S* panel, int64_t terms, const Ahead& ahead,
                   PanelSums<Compute<S>>& out) {
  if (rows == Rows) {
    if constexpr (std::is_same_v<S, BFloat16>)
      panel_sums_of_pairs<Rows>(x, panel, terms, ahead, out);
    else
      panel_sums<S, Rows>(x, panel, terms, ahead, out);
  } else if constexpr (Rows > 1) {
    panel_sums_of<S, Rows - 1>(rows, x, panel, terms, ahead, out);
  }
}

// Rows of a tile: as even as can be, but for AMX, which takes whole ones. With two tiles the second one's time is the
// next panel's to come.
template <typename S>
struct RowTiles {
  int64_t rows, count;
  bool amx = false;

  explicit RowTiles(int64_t all) : rows(all), count(std::max<int64_t>(all < 6 ? 1 : 2, whole_tiles(all, kPanelRows))) {
#if defined(SAMBAY_AMX)
    amx = std::is_same_v<S, BFloat16> && amx_is_ours();
    if (amx) count = whole_tiles(all, kMostRows);
#endif
  }
  static int64_t whole_tiles(int64_t all, int64_t most) { return (all + most - 1) / most; }
  int64_t first(int64_t tile) const {
    return amx ? std::min(rows, tile * kMostRows) : rows * tile / count;
  }

  void sums(int64_t tile, int64_t length, const Inputs<S>& x, const S* panel, int64_t terms,
            PanelSums<Compute<S>>& out) const {
#if defined(SAMBAY_AMX)
    if constexpr (std::is_same_v<S, BFloat16>)
      if (amx) return (length > kAmxRows ? amx_sums<true> : amx_sums<false>)(x.data, x.row, panel, terms, out);
#endif
    const int64_t size = kPanel<Compute<S>> * terms;
    const Ahead ahead{reinterpret_cast<const char*>(panel + size + size * tile / count),
                      static_cast<int64_t>(kPanel<Compute<S>> * kSideBySide<S> * sizeof(S)) / count};
    panel_sums_of<S>(length, x, panel, terms, ahead, out);
  }
};

// This worker's share of x (rows, inputs) times the matrix: `use(column, row, count, sums)` with the sums of a panel
// that begins at this output, for `count` rows; `in_order`: of a panel for all rows, from the first on. Up to
// kMostRows - 1 rows behind x's last are read, and lost.
template <typename S, typename Use>
void packed_product(const Worker& worker, const Matrix<S>& matrix, const Inputs<S>& x, int64_t rows, bool in_order,
                    const Use& use) {
  using T = Compute<S>;
  const RowTiles<S> tiles(rows);
  const int64_t together = in_order ? tiles.count : 1;
  const int64_t shares = (matrix.outputs + kPanel<T> - 1) / kPanel<T> * (in_order ? 1 : tiles.count);
  alignas(64) PanelSums<T> sums;
  for (int64_t unit = worker.first(shares) * together; unit < worker.last(shares) * together; ++unit) {
    const int64_t panel = unit / tiles.count, tile = unit % tiles.count;
    const int64_t row = tiles.first(tile), count = tiles.first(tile + 1) - row;
    const Inputs<S> from{x.data + row * x.row, x.row};
    tiles.sums(tile, count, from, matrix.panels + panel * kPanel<T> * matrix.terms, matrix.terms, sums);
    use(panel * kPanel<T>, row, count, sums);
  }
}

}  // namespace
}  // namespace sambay
