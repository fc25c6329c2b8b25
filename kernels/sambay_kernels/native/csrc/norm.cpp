// CPU backend: residual addition and LayerNorm, forward and backward, for float and double.
//
// The stream and all arithmetic are T. What a layer adds to it (D) and the normalised rows (O) may be bfloat16 beside
// floats: they are widened as they are read and rounded as they are written (compute_type.h).
//
// A row is computed by the same instructions whatever stands beside it. The gradients of weight and bias are summed by
// blocks of rows whose size follows from their number alone, the blocks in their order: the same bits for any number of
// threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "compute_type.h"
#include "cpu_common.h"

namespace sambay {

template <typename T>
struct AddLayerNormForward {
  int64_t count, width;                // rows, elements of a row
  int64_t narrow_delta, narrow_normed;  // whether they are bfloat16
  double eps;
  const T* hidden;
  const void* delta;  // may be null
  const T *weight, *bias;
  T* total;  // hidden + delta; null without delta
  void* normed;
  T* stats;  // (count, 2): mean, 1 / deviation
};

template <typename T>
struct AddLayerNormBackward {
  int64_t count, width;
  int64_t narrow_delta, narrow_normed;
  const void* grad;     // of the normalised rows
  const T* grad_total;  // may be null
  const T *total, *stats, *weight;
  T* of_total;
  void* of_delta;       // the same, narrow; else null
  T *of_weight, *of_bias;  // may be null, both
};

namespace {

constexpr int64_t kBlockRows = 32;  // at least
constexpr int64_t kBlocks = 64;     // at most

int64_t block_rows(int64_t count) { return std::max(kBlockRows, (count + kBlocks - 1) / kBlocks); }

// `task(block, first, last)` over blocks of rows.
template <typename Task>
void run_blocks(int64_t count, int64_t width, int threads, const Task& task) {
  const int64_t rows = block_rows(count), blocks = (count + rows - 1) / rows;
  const int used = count * width < kSmall ? 1 : static_cast<int>(std::min<int64_t>(threads, blocks));
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    FlushDenormals guard;
    task(i, i * rows, std::min(count, (i + 1) * rows));
  }
}

// total = hidden + delta where there is a delta. Returns the row to read and, in `sum`, its sum.
template <typename D, typename T>
const T* add_row(const AddLayerNormForward<T>& args, int64_t row, T& sum) {
  const int64_t width = args.width;
  const T* hidden = args.hidden + row * width;
  T partial = 0;
  if (!args.delta) {
#pragma omp simd reduction(+ : partial)
    for (int64_t i = 0; i < width; ++i) partial += hidden[i];
    sum = partial;
    return hidden;
  }
  const D* delta = static_cast<const D*>(args.delta) + row * width;
  T* total = args.total + row * width;
#pragma omp simd reduction(+ : partial)
  for (int64_t i = 0; i < width; ++i) {
    const T value = hidden[i] + widen(delta[i]);
    total[i] = value;
    partial += value;
  }
  sum = partial;
  return total;
}

template <typename D, typename O, typename T>
void forward_row(const AddLayerNormForward<T>& args, int64_t row) {
  const int64_t width = args.width;
  T mean, square = 0;
  const T* x = add_row<D>(args, row, mean);
  mean /= static_cast<T>(width);
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
  const T inverse = 1 / std::sqrt(square / static_cast<T>(width) + static_cast<T>(args.eps));
  O* out = static_cast<O*>(args.normed) + row * width;
  const T *weight = args.weight, *bias = args.bias;
  SAMBAY_SIMD
  for (int64_t i = 0; i < width; ++i) out[i] = narrow<O>((x[i] - mean) * inverse * weight[i] + bias[i]);
  args.stats[2 * row] = mean;
  args.stats[2 * row + 1] = inverse;
}

// Adds a row to the sums of its block.
template <typename O, typename T>
void add_to_sums(const O* grad, const T* x, T mean, T inverse, int64_t width, T* of_weight, T* of_bias) {
  SAMBAY_SIMD
  for (int64_t i = 0; i < width; ++i) {
    const T up = widen(grad[i]);
    of_weight[i] += up * ((x[i] - mean) * inverse);
    of_bias[i] += up;
  }
}

template <typename D, typename O, bool Passed, typename T>
void backward_row(const AddLayerNormBackward<T>& args, int64_t row, T* of_weight, T* of_bias) {
  const int64_t width = args.width;
  const T *x = args.total + row * width, *weight = args.weight, mean = args.stats[2 * row];
  const T *passed = Passed ? args.grad_total + row * width : nullptr, inverse = args.stats[2 * row + 1];
  const O* grad = static_cast<const O*>(args.grad) + row * width;
  T sum = 0, product = 0;
#pragma omp simd reduction(+ : sum, product)
  for (int64_t i = 0; i < width; ++i) {
    const T inner = widen(grad[i]) * weight[i];
    sum += inner;
    product += inner * ((x[i] - mean) * inverse);
  }
  if (of_weight) add_to_sums(grad, x, mean, inverse, width, of_weight, of_bias);
  sum /= static_cast<T>(width);
  product /= static_cast<T>(width);
  T* of_total = args.of_total + row * width;
  D* of_delta = static_cast<D*>(args.of_delta) + (args.of_delta ? row * width : 0);
  SAMBAY_SIMD
  for (int64_t i = 0; i < width; ++i) {
    T found = inverse * (widen(grad[i]) * weight[i] - sum - (x[i] - mean) * inverse * product);
    if constexpr (Passed) found += passed[i];
    of_total[i] = found;
    if constexpr (!std::is_same_v<D, T>) of_delta[i] = narrow<D>(found);
  }
}

template <typename D, typename O, typename T>
void forward(const AddLayerNormForward<T>& args, int threads) {
  run_blocks(args.count, args.width, threads, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) forward_row<D, O>(args, row);
  });
}

template <typename D, typename O, typename T>
void backward(const AddLayerNormBackward<T>& args, int threads) {
  const int64_t width = args.width, rows = block_rows(args.count), blocks = (args.count + rows - 1) / rows;
  std::vector<T> sums(args.of_weight ? blocks * 2 * width : 0);
  run_blocks(args.count, width, threads, [&](int64_t block, int64_t first, int64_t last) {
    T* of_weight = args.of_weight ? &sums[block * 2 * width] : nullptr;
    T* of_bias = of_weight ? of_weight + width : nullptr;
    for (int64_t row = first; row < last; ++row)
      args.grad_total ? backward_row<D, O, true>(args, row, of_weight, of_bias)
                      : backward_row<D, O, false>(args, row, of_weight, of_bias);
  });
  if (!args.of_weight) return;
  std::fill(args.of_weight, args.of_weight + width, T(0));
  std::fill(args.of_bias, args.of_bias + width, T(0));
  for (int64_t block = 0; block < blocks; ++block) {
    const T* from = &sums[block * 2 * width];
    SAMBAY_SIMD
    for (int64_t i = 0; i < width; ++i) {
      args.of_weight[i] += from[i];
      args.of_bias[i] += from[width + i];
    }
  }
}

// `task` with values of the types that are stored; doubles stand beside doubles alone.
template <typename Args, typename Task>
void with_types(const Args& args, float, const Task& task) {
  const bool narrow_delta = args.narrow_delta, narrow_normed = args.narrow_normed;
  if (narrow_delta && narrow_normed) return task(BFloat16{}, BFloat16{});
  if (narrow_delta) return task(BFloat16{}, float{});
  if (narrow_normed) return task(float{}, BFloat16{});
  task(float{}, float{});
}

template <typename Args, typename Task>
void with_types(const Args&, double, const Task& task) {
  task(double{}, double{});
}

}  // namespace
}  // namespace sambay

#define SAMBAY_EXPORT(T, suffix)                                                                                   \
  extern "C" void sambay_add_layer_norm_forward_##suffix(const sambay::AddLayerNormForward<T>* args, int threads) { \
    sambay::with_types(*args, T{}, [&](auto delta, auto normed) {                                                  \
      sambay::forward<decltype(delta), decltype(normed)>(*args, threads);                                          \
    });                                                                                                            \
  }                                                                                                                \
  extern "C" void sambay_add_layer_norm_backward_##suffix(const sambay::AddLayerNormBackward<T>* args, int threads) { \
    sambay::with_types(*args, T{}, [&](auto delta, auto normed) {                                                  \
      sambay::backward<decltype(delta), decltype(normed)>(*args, threads);                                         \
    });                                                                                                            \
  }

SAMBAY_EXPORT(float, f32)
SAMBAY_EXPORT(double, f64)
