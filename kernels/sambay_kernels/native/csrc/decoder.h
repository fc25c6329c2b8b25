// What a decoding step is called with, and the memory that it works in. Structures as in native/decoder_call.py.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "compute_type.h"
#include "lanes.h"
#include "packed_products.h"

namespace sambay {

enum DecoderMixer : int64_t { kMamba, kMemoryUnit, kAttention };

// S: the type of matrices and of what is rounded, T: that of arithmetic, states and small vectors.
template <typename S>
struct DecoderLayer {
  using T = Compute<S>;
  int64_t mixer, place;      // kind of mixer; of its states, rings or pages
  int64_t window, own_keys;  // attention: tokens a query sees, 0: all; whether it makes keys and values
  const T *norm_weight, *norm_bias, *mlp_norm_weight, *mlp_norm_bias;
  Matrix<S> in;           // Mamba: of the scan's input; memory unit: of the gate; attention: of queries, keys, values
  Matrix<S> gate;         // Mamba
  Matrix<S> delta, maps;  // Mamba, both of the scan's input: the time step's factors; B and C, whole vectors each
  Matrix<S> step;         // Mamba: of delta
  Matrix<S> out;
  Matrix<S> up, down;  // MLP; a panel of `up` is a vector of gates, then one of values
  const T *in_bias, *out_bias;               // attention
  const T *conv_weight, *conv_bias;          // Mamba: (width, inner), (inner,)
  const T *step_bias, *decay, *skip;         // Mamba: (inner,), A log2(e) (inner, whole vectors of states), (inner,)
  const T* subln;                            // attention: (2 head_dim,), times 1 - lambda_init
  double lambda;
};

template <typename S>
struct Decoder {
  using T = Compute<S>;
  int64_t count, hidden, vocab, intermediate;
  int64_t heads, key_heads, width;    // of attention
  int64_t inner, states, kept, rank;  // of Mamba; kept: inputs of the convolution before the new one
  double eps;
  const DecoderLayer<S>* layers;
  const S* embed;
  const T *norm_weight, *norm_bias;
  Matrix<S> head;
};

template <typename S>
struct DecoderSlots {
  using T = Compute<S>;
  int64_t slots, pages, page_size, listed, ring;  // listed: pages of a slot at most; ring: places
  S* conv;                                        // (layers, slots, inner, kept)
  T* scan;                                        // (layers, slots, inner, states)
  S *ring_keys, *ring_values;                     // (layers, slots, key heads, ring, width)
  S *page_keys, *page_values;                     // (layers, pages, key heads, page_size, width)
  const int32_t* table;                           // (slots, listed)
  int32_t* lengths;                               // (slots,)
};

template <typename S>
struct DecoderStep {
  const Decoder<S>* decoder;
  const DecoderSlots<S>* slots;
  int64_t rows;
  const int64_t *tokens, *row_slots;  // (rows,)
  const bool* wanted;                 // (rows,), or null: all
  S* logits;                          // (wanted rows, vocab)
  void* room;                         // to work in
  int64_t room_bytes;
  int64_t wrong;  // out: the row that can't be
};

namespace {

// Hands out arrays of a piece of memory, or measures how much they take.
class Room {
 public:
  explicit Room(void* memory) : base(static_cast<char*>(memory)) {}
  template <typename U>
  U* take(int64_t count) {
    U* found = base ? reinterpret_cast<U*>(base + used) : nullptr;
    used += (count * static_cast<int64_t>(sizeof(U)) + 63) / 64 * 64;
    return found;
  }
  int64_t bytes() const { return used; }

 private:
  char* base;
  int64_t used = 0;
};

// (rows, width), rows apart by whole vectors and a little more, lest the same columns share places in the cache.
template <typename U>
struct Buffer {
  U* data;
  int64_t width, row;
  Buffer(Room& room, int64_t rows, int64_t columns) : width(columns), row((columns + 31) / 32 * 32 + 32) {
    data = room.take<U>((rows + kMostRows) * row);
  }
  U* at(int64_t r) const { return data + r * row; }
  // What a product reads behind a row's end must be a number.
  void clear_ends(int64_t r) const { std::fill(at(r) + width, at(r) + row, U{}); }
};

// Which token of which sequence each row is. A slot stands in a run of rows: tokens that follow each other.
template <typename S>
struct RowOrder {
  std::vector<int64_t> before;       // tokens that the sequence has in front of each
  std::vector<int64_t> run_before, run_after;  // rows of its run in front of each, and behind it
  std::vector<int64_t> all, wanted;  // rows
  int64_t last_kept = 0;             // the layer above which nothing is kept for a token to come
  bool runs = false;                 // of more than one row

  explicit RowOrder(const DecoderStep<S>& step)
      : before(step.rows), run_before(step.rows), run_after(step.rows) {
    for (int64_t r = 0; r < step.rows; ++r) {
      const bool goes_on = r > 0 && step.row_slots[r] == step.row_slots[r - 1];
      before[r] = goes_on ? before[r - 1] + 1 : step.slots->lengths[step.row_slots[r]];
      run_before[r] = goes_on ? run_before[r - 1] + 1 : 0;
      runs = runs || goes_on;
      all.push_back(r);
      if (!step.wanted || step.wanted[r]) wanted.push_back(r);
    }
    for (int64_t r = step.rows - 2; r >= 0; --r) run_after[r] = run_before[r + 1] ? run_after[r + 1] + 1 : 0;
    for (int64_t i = 0; i < step.decoder->count; ++i) {
      const DecoderLayer<S>& layer = step.decoder->layers[i];
      if (layer.mixer == kMamba || (layer.mixer == kAttention && layer.own_keys)) last_kept = i;
    }
  }
};

// Rows that a layer computes. What goes into products stands in this order, without gaps.
struct Chosen {
  int64_t count;
  const int64_t* row;
  explicit Chosen(const std::vector<int64_t>& rows) : count(static_cast<int64_t>(rows.size())), row(rows.data()) {}
};

// The rows of a step, and all that they hold on their way.
template <typename S>
struct DecoderRows {
  using T = Compute<S>;
  static constexpr int64_t kLanes = Simd<T>::kLanes;
  const Decoder<S>& model;
  const DecoderSlots<S>& slots;
  const int64_t count;
  const int64_t *tokens, *slot;
  const std::vector<int64_t>&before, &run_before, &run_after;
  const bool runs;
  const int64_t padded_states;
  Buffer<T> hidden, maps;
  Buffer<S> normed, qkv, attended, inner, gate, delta, memory, gated, mlp;

  DecoderRows(const DecoderStep<S>& step, const RowOrder<S>& order, Room& room)
      : model(*step.decoder),
        slots(*step.slots),
        count(step.rows),
        tokens(step.tokens),
        slot(step.row_slots),
        before(order.before),
        run_before(order.run_before),
        run_after(order.run_after),
        runs(order.runs),
        padded_states(whole_vectors<T>(model.states)),
        hidden(room, count, model.hidden),
        maps(room, count, 2 * padded_states),
        normed(room, count, model.hidden),
        qkv(room, count, (model.heads + 2 * model.key_heads) * model.width),
        attended(room, count, model.heads * model.width),
        inner(room, count, model.inner),
        gate(room, count, model.inner),
        delta(room, count, model.rank),
        memory(room, count, model.inner),
        gated(room, count, model.inner),
        mlp(room, count, model.intermediate) {}

  void start(int64_t r) const {
    for (const Buffer<S>* read : {&normed, &attended, &inner, &delta, &gated, &mlp}) read->clear_ends(r);
  }
};

// What a product hands on: rounded as if it had been written.
template <typename S>
SAMBAY_FN Compute<S> rounded(Compute<S> x) {
  return widen(narrow<S>(x));
}

// Memory that is read soon.
template <typename U>
SAMBAY_FN void fetch(const U* from, int64_t count) {
  const char* line = reinterpret_cast<const char*>(from);
  for (const char* end = line + count * sizeof(U); line < end; line += 64) __builtin_prefetch(line);
}

}  // namespace
}  // namespace sambay
