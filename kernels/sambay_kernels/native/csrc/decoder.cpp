// CPU backend: a whole decoding step, tokens of many sequences through all layers, for float, double and bfloat16.
//
// One group of workers goes through the step, with a barrier where a layer needs all that came before. What a product's
// sums go into is done by the worker that has them: gates, convolution, scan, residual sums. Every number of a row is
// made by the same operations in the same order, whatever rows stand beside it, however a sequence's tokens are cut into
// runs and however many workers there are.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu_common.h"
#include "decoder.h"
#include "decoder_attention.h"
#include "decoder_mamba.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace sambay {
namespace {

// What the caller is told instead of a result; as in native/decoder_call.py. Above zero: bytes that are needed.
enum Problem : int64_t { kDone = 0, kNoToken = -1, kNoSlot = -2, kTwice = -3, kFull = -4, kNoPage = -5, kLength = -6 };

template <typename S>
int64_t problem_of(const DecoderStep<S>& step, int64_t r, std::vector<int64_t>& taken) {
  const DecoderSlots<S>& slots = *step.slots;
  const int64_t slot = step.row_slots[r];
  if (step.tokens[r] < 0 || step.tokens[r] >= step.decoder->vocab) return kNoToken;
  if (slot < 0 || slot >= slots.slots) return kNoSlot;
  if (taken[slot] && step.row_slots[r - 1] != slot) return kTwice;
  const int64_t before = slots.lengths[slot] + taken[slot]++, pages = before / slots.page_size + 1;
  if (before < 0) return kLength;
  if (pages > slots.listed) return kFull;
  const int32_t* listed = slots.table + slot * slots.listed;
  int32_t least = 0, most = 0;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = taken[slot] > 1 ? pages - 1 : 0; i < pages; ++i) {
    least = std::min(least, listed[i]);
    most = std::max(most, listed[i]);
  }
  return least < 0 || most >= slots.pages ? kNoPage : kDone;
}

template <typename S>
class DecoderRun {
 public:
  using T = Compute<S>;

  DecoderRun(const DecoderStep<S>& given, const RowOrder<S>& by, Room& room, int64_t workers)
      : step(given), model(*given.decoder), order(by), rows(given, by, room), attention(rows, by, room, workers) {}

  int64_t count() const { return rows.count; }

  // The whole step, by all workers at once.
  void work(const Worker& worker) const {
    for (int64_t r = worker.first(rows.count); r < worker.last(rows.count); ++r) start(r);
    Chosen chosen(order.all);
    for (const DecoderLayer<S>* layer = model.layers; layer < model.layers + model.count; ++layer) {
      const bool is_last_kept = layer - model.layers == order.last_kept;
      norm(worker, chosen, layer->norm_weight, layer->norm_bias);
      // Pages hold keys and values of all rows: who isn't wanted needs no more of the layer.
      if (layer->mixer == kAttention && layer->own_keys && !layer->window)
        chosen = mix_and_keep(worker, *layer, is_last_kept ? Chosen(order.wanted) : chosen);
      else
        mix(worker, *layer, chosen);
      barrier();
      norm(worker, chosen, layer->mlp_norm_weight, layer->mlp_norm_bias);
      gated_product(worker, *layer, chosen);
      barrier();
      add_product(worker, layer->down, rows.mlp, nullptr, chosen);
      barrier();
      if (is_last_kept) chosen = Chosen(order.wanted);
    }
    norm(worker, chosen, model.norm_weight, model.norm_bias);
    product(worker, model.head, rows.normed, chosen, [&](int64_t i, int64_t column, int64_t count, const T* sums) {
      S* to = step.logits + i * model.vocab + column;
      for (int64_t c = 0; c < count; ++c) to[c] = narrow<S>(sums[c]);
    });
    for (int64_t r = worker.first(rows.count); r < worker.last(rows.count); ++r)
      if (r + 1 == rows.count || rows.slot[r + 1] != rows.slot[r])
        rows.slots.lengths[rows.slot[r]] = static_cast<int32_t>(rows.before[r] + 1);
  }

 private:
  const DecoderStep<S>& step;
  const Decoder<S>& model;
  const RowOrder<S>& order;
  const DecoderRows<S> rows;
  const Attention<S> attention;

  static void barrier() {
#pragma omp barrier
  }

  void start(int64_t r) const {
    rows.start(r);
    const S* from = model.embed + rows.tokens[r] * model.hidden;
    T* to = rows.hidden.at(r);
    for (int64_t i = 0; i < model.hidden; ++i) to[i] = widen(from[i]);
  }

  // LayerNorm of the rows, and a barrier.
  void norm(const Worker& worker, const Chosen& chosen, const T* weight, const T* bias) const {
    for (int64_t i = worker.first(chosen.count); i < worker.last(chosen.count); ++i)
      norm_row(rows.hidden.at(chosen.row[i]), weight, bias, rows.normed.at(i));
    barrier();
  }

  void norm_row(const T* x, const T* weight, const T* bias, S* out) const {
    const int64_t width = model.hidden;
    T mean = 0, square = 0;
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < width; ++i) mean += x[i];
    mean /= static_cast<T>(width);
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; ++i) square += (x[i] - mean) * (x[i] - mean);
    const T inverse = 1 / std::sqrt(square / static_cast<T>(width) + static_cast<T>(model.eps));
    SAMBAY_SIMD
    for (int64_t i = 0; i < width; ++i) out[i] = narrow<S>((x[i] - mean) * inverse * weight[i] + bias[i]);
  }

  // `use(i, column, count, sums)` with the sums of a panel of the i-th of the chosen rows; `in_order`: worker by worker.
  template <typename Use>
  void product(const Worker& worker, const Matrix<S>& matrix, const Buffer<S>& x, const Chosen& chosen, const Use& use,
               bool in_order = false) const {
    packed_product(worker, matrix, Inputs<S>{x.data, x.row}, chosen.count, in_order,
                   [&](int64_t column, int64_t row, int64_t count, const PanelSums<T>& sums) {
                     const int64_t columns = std::min(kPanel<T>, matrix.outputs - column);
                     for (int64_t i = 0; i < count; ++i) use(row + i, column, columns, sums[i]);
                   });
  }

  template <typename U>
  void store_product(const Worker& worker, const Matrix<S>& matrix, const Buffer<S>& x, const T* bias,
                     const Buffer<U>& out, const Chosen& chosen) const {
    product(worker, matrix, x, chosen, [&](int64_t i, int64_t column, int64_t count, const T* sums) {
      U* to = out.at(i) + column;
      for (int64_t c = 0; c < count; ++c) {
        const S value = narrow<S>(bias ? sums[c] + bias[column + c] : sums[c]);
        if constexpr (std::is_same_v<U, S>)
          to[c] = value;
        else
          to[c] = widen(value);
      }
    });
  }

  // Into the residual stream.
  void add_product(const Worker& worker, const Matrix<S>& matrix, const Buffer<S>& x, const T* bias,
                   const Chosen& chosen) const {
    product(worker, matrix, x, chosen, [&](int64_t i, int64_t column, int64_t count, const T* sums) {
      T* to = rows.hidden.at(chosen.row[i]) + column;
      for (int64_t c = 0; c < count; ++c) to[c] += rounded<S>(bias ? sums[c] + bias[column + c] : sums[c]);
    });
  }

  // The first half of an MLP: panels are a vector of gates, then their values.
  void gated_product(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen) const {
    product(worker, layer.up, rows.normed, chosen, [&](int64_t i, int64_t column, int64_t, const T* sums) {
      constexpr int64_t kLanes = Simd<T>::kLanes;
      const int64_t first = column / 2, count = std::min(kLanes, model.intermediate - first);
      S* to = rows.mlp.at(i) + first;
      for (int64_t c = 0; c < count; ++c)
        to[c] = narrow<S>(swiglu_value(rounded<S>(sums[c]), rounded<S>(sums[kLanes + c])));
    });
  }

  void mix(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen) const {
    if (layer.mixer == kMamba) return mix_by_scan(worker, layer, chosen);
    if (layer.mixer == kMemoryUnit) return mix_by_memory(worker, layer, chosen);
    store_product(worker, layer.in, rows.normed, layer.in_bias, rows.qkv, chosen);
    barrier();
    attend(worker, layer, chosen);
  }

  // Keys and values of all rows go into pages; the rest is for `chosen` ones, who are returned.
  Chosen mix_and_keep(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen) const {
    store_product(worker, layer.in, rows.normed, layer.in_bias, rows.qkv, Chosen(order.all));
    barrier();
    attention.keep(worker, layer);
    barrier();
    attend(worker, layer, chosen);
    return chosen;
  }

  void attend(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen) const {
    attention.attend(worker, layer, chosen);
    barrier();
    attention.finish(worker, layer, chosen);
    barrier();
    add_product(worker, layer.out, rows.attended, layer.out_bias, chosen);
  }

  void mix_by_memory(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen) const {
    product(worker, layer.in, rows.normed, chosen, [&](int64_t i, int64_t column, int64_t count, const T* sums) {
      const S* memory = rows.memory.at(chosen.row[i]) + column;
      S* to = rows.gated.at(i) + column;
      for (int64_t c = 0; c < count; ++c) to[c] = narrow<S>(swiglu_value(rounded<S>(sums[c]), widen(memory[c])));
    });
    barrier();
    add_product(worker, layer.out, rows.gated, nullptr, chosen);
  }

  void mix_by_scan(const Worker& worker, const DecoderLayer<S>& layer, const Chosen& chosen) const {
    const auto conv = [&](int64_t r, int64_t column, int64_t, const T* sums) {
      if (model.kept == 3)
        conv_channels<S, 3>(rows, layer, r, column, sums);
      else
        conv_channels<S, -1>(rows, layer, r, column, sums);
    };
    const auto scan = [&](int64_t r, int64_t column, int64_t, const T* sums) {
      scan_channels(rows, layer, r, column, sums);
    };
    product(worker, layer.in, rows.normed, chosen, conv, rows.runs);
    store_product(worker, layer.gate, rows.normed, nullptr, rows.gate, chosen);
    barrier();
    store_product(worker, layer.delta, rows.inner, nullptr, rows.delta, chosen);
    store_product(worker, layer.maps, rows.inner, nullptr, rows.maps, chosen);
    barrier();
    product(worker, layer.step, rows.delta, chosen, scan, rows.runs);
    barrier();
    add_product(worker, layer.out, rows.gated, nullptr, chosen);
  }
};

template <typename S>
void run_by(const DecoderRun<S>& run, [[maybe_unused]] int workers) {
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    FlushDenormals guard;
    const AmxScope tiles(std::is_same_v<S, BFloat16> ? run.count() : 0);
#if defined(_OPENMP)
    const Worker worker{omp_get_thread_num(), omp_get_num_threads()};
#else
    const Worker worker{0, 1};
#endif
    run.work(worker);
  }
}

// Products of a row, about.
template <typename S>
int64_t work_of(const Decoder<S>& model) {
  return model.hidden * (model.vocab + model.count * (2 * model.inner + 3 * model.intermediate));
}

template <typename S>
int64_t decoder_step(DecoderStep<S>& step, int threads) {
  std::vector<int64_t> taken(step.slots->slots);
  for (int64_t r = 0; r < step.rows; ++r)
    if (const int64_t found = problem_of(step, r, taken)) {
      step.wrong = r;
      return found;
    }
  const int workers = step.rows * work_of(*step.decoder) < 8 * kSmall ? 1 : threads;
  const RowOrder<S> order(step);
  Room needed(nullptr);
  DecoderRun<S>(step, order, needed, workers);
  if (needed.bytes() > step.room_bytes) return needed.bytes();
  Room room(step.room);
  run_by(DecoderRun<S>(step, order, room, workers), workers);
  return kDone;
}

}  // namespace
}  // namespace sambay

#define SAMBAY_EXPORT(S, suffix)                                                                             \
  extern "C" int64_t sambay_decoder_step_##suffix(sambay::DecoderStep<S>* step, int threads) {               \
    return sambay::decoder_step(*step, threads);                                                             \
  }                                                                                                          \
  extern "C" int64_t sambay_decoder_lanes_##suffix() { return sambay::Simd<sambay::Compute<S>>::kLanes; }    \
  extern "C" int64_t sambay_decoder_terms_##suffix() { return sambay::kTerms<S>; }                           \
  extern "C" int64_t sambay_decoder_side_by_side_##suffix() { return sambay::kSideBySide<S>; }

SAMBAY_EXPORT(float, f32)
SAMBAY_EXPORT(double, f64)
SAMBAY_EXPORT(sambay::BFloat16, bf16)
