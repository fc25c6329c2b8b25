// CPU backend: selective scan, causal convolution and gate, forward and backward, for float, double and bfloat16.
//
// A plain C interface without torch or Python headers: any C++17 compiler builds it in seconds, it fits every torch.
//
// S is the type of the tokens in memory, T the one of all arithmetic, of parameters, states and sums (compute_type.h).
//
// Work is cut into tasks of (64 channels) x (a group of documents). A channel of a document is computed by the same
// instructions whatever stands beside it, so a document's results don't depend on the pack. Sums over channels (the
// gradients of B and C) and over documents (those of the weights) go through partial buffers, added in a fixed order:
// the same bits for any number of threads.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "compute_type.h"
#include "cpu_common.h"
#include "scan_core.h"

namespace sambay {
namespace {

constexpr int kLanes = 64;       // channels of one task
constexpr int64_t kChunk = 32;   // tokens between kept states; SCAN_KEPT_EVERY in ops/selective_scan/cpp.py
constexpr int64_t kGroups = 16;  // document groups at most

// Documents split into groups of about the same number of tokens. The split depends on the borders alone.
struct Documents {
  const int32_t* borders;
  int64_t count;
  std::vector<int64_t> first;  // first document of each group, and the end

  Documents(const int32_t* cu, int64_t documents) : borders(cu), count(documents) {
    const int64_t groups = std::max<int64_t>(1, std::min(kGroups, documents));
    const int64_t total = documents ? cu[documents] + documents : 0;  // an empty document counts as one token
    first.push_back(0);
    for (int64_t s = 1; s < documents; ++s) {
      const int64_t before = cu[s] + s;
      const bool full = before * groups >= total * static_cast<int64_t>(first.size());
      if (full && static_cast<int64_t>(first.size()) < groups) first.push_back(s);
    }
    first.push_back(documents);
  }

  int64_t groups() const { return static_cast<int64_t>(first.size()) - 1; }
};

template <typename Task>
void run_tasks(const Documents& docs, int64_t channels, int64_t work, int threads, const Task& task) {
  const int64_t blocks = (channels + kLanes - 1) / kLanes, tasks = blocks * docs.groups();
  const int used = work < kSmall ? 1 : static_cast<int>(std::min<int64_t>(threads, std::max<int64_t>(tasks, 1)));
#pragma omp parallel for schedule(dynamic) num_threads(used) if (used > 1)
  for (int64_t i = 0; i < tasks; ++i) {
    FlushDenormals guard;
    const int64_t channel = i % blocks * kLanes;
    task(i / blocks, i % blocks, channel, static_cast<int>(std::min<int64_t>(kLanes, channels - channel)));
  }
}

template <typename T, typename S>
void load(T* to, const S* from, int lanes) {
  for (int w = 0; w < lanes; ++w) to[w] = widen(from[w]);
  for (int w = lanes; w < kLanes; ++w) to[w] = T(0);
}

template <typename S, typename T>
void store(S* to, const T* from, int lanes) {
  for (int w = 0; w < lanes; ++w) to[w] = narrow<S>(from[w]);
}

// (channels, states) of one block -> [states][kLanes], and back.
template <typename T>
void load_states(T* to, const T* from, int64_t states, int lanes) {
  for (int64_t n = 0; n < states; ++n)
    for (int w = 0; w < kLanes; ++w) to[n * kLanes + w] = w < lanes ? from[w * states + n] : T(0);
}

template <typename T>
void store_states(T* to, const T* from, int64_t states, int lanes) {
  for (int w = 0; w < lanes; ++w)
    for (int64_t n = 0; n < states; ++n) to[w * states + n] = from[n * kLanes + w];
}

}  // namespace

template <typename T>
struct Rows {  // (tokens, width), rows `stride` apart; data may be null
  const T* data;
  int64_t stride;
  const T* at(int64_t row) const { return data + row * stride; }
};

template <typename T>
struct WritableRows {  // (tokens, width), rows `stride` apart
  T* data;
  int64_t stride;
  T* at(int64_t row) const { return data + row * stride; }
};

template <typename S>
struct SwigluForward {
  int64_t count, width;  // rows, elements of a row
  Rows<S> gate, value;
  S* out;  // (count, width)
};

template <typename S>
struct SwigluBackward {
  int64_t count, width;
  Rows<S> grad, gate, value;
  WritableRows<S> of_gate, of_value;
};

template <typename S>
struct ScanArgs {
  using T = Compute<S>;
  int64_t tokens, channels, states, documents;
  const int32_t* borders;
  Rows<S> u, delta, B, C, z;
  const T *A, *D, *bias, *initial;
  int64_t softplus;
};

template <typename S>
struct ScanForward {
  using T = Compute<S>;
  ScanArgs<S> in;
  S* y;
  T *final_state, *checkpoints;  // checkpoints may be null
};

template <typename S>
struct ScanBackward {
  using T = Compute<S>;
  ScanArgs<S> in;
  Rows<S> grad_y;                     // data may be null
  const T *grad_final, *checkpoints;  // grad_final may be null
  S *u, *delta, *z;                   // (T, D); z may be null
  T *A, *D, *bias;                    // partials (groups, D, N), (groups, D); D, bias may be null
  T *B, *C;                           // partials (blocks, T, N)
  T* initial;                         // (S, D, N), may be null
};

namespace {

// The first checkpoint row of a document: rows of different documents never meet.
inline int64_t checkpoint_row(const int32_t* borders, int64_t document) {
  return borders[document] / kChunk + document;
}

// What every step of a block of channels needs, for up to kChunk tokens.
template <typename S>
struct Tile {
  using T = Compute<S>;
  std::vector<T> B, C;  // (kChunk, states)
  alignas(64) T u[kChunk][kLanes], raw[kChunk][kLanes], delta[kChunk][kLanes], delta_u[kChunk][kLanes];
  alignas(64) T D[kLanes], bias[kLanes];

  Tile(const ScanArgs<S>& in, int64_t channel, int lanes) : B(kChunk * in.states), C(kChunk * in.states) {
    std::fill(D, D + kLanes, T(0));
    std::fill(bias, bias + kLanes, T(0));
    if (in.D) load(D, in.D + channel, lanes);
    if (in.bias) load(bias, in.bias + channel, lanes);
  }

  void fill(const ScanArgs<S>& in, int64_t start, int64_t count, int64_t channel, int lanes) {
    for (int64_t t = 0; t < count; ++t) {
      std::transform(in.B.at(start + t), in.B.at(start + t) + in.states, &B[t * in.states], widen<S>);
      std::transform(in.C.at(start + t), in.C.at(start + t) + in.states, &C[t * in.states], widen<S>);
      load(u[t], in.u.at(start + t) + channel, lanes);
      load(raw[t], in.delta.at(start + t) + channel, lanes);
      if (in.softplus) {
        SAMBAY_SIMD
        for (int w = 0; w < kLanes; ++w) {
          raw[t][w] += bias[w];
          delta[t][w] = sambay::softplus(raw[t][w]);
          delta_u[t][w] = delta[t][w] * u[t][w];
        }
      } else {
        SAMBAY_SIMD
        for (int w = 0; w < kLanes; ++w) {
          delta[t][w] = raw[t][w] + bias[w];
          delta_u[t][w] = delta[t][w] * u[t][w];
        }
      }
    }
  }
};

template <typename T>
struct Block {  // per-task constants and state
  std::vector<T> A, A2, h;
  template <typename S>
  Block(const ScanArgs<S>& in, int64_t channel, int lanes)
      : A(in.states * kLanes), A2(in.states * kLanes), h(in.states * kLanes) {
    load_states(A.data(), in.A + channel * in.states, in.states, lanes);
    for (size_t i = 0; i < A.size(); ++i) A2[i] = A[i] * T(kLog2E);
  }
  template <typename S>
  void start(const ScanArgs<S>& in, int64_t document, int64_t channel, int lanes) {
    if (in.initial)
      load_states(h.data(), in.initial + (document * in.channels + channel) * in.states, in.states, lanes);
    else
      std::fill(h.begin(), h.end(), T(0));
  }
};

template <typename T>
void forward_token(const Block<T>& block, T* h, const T* delta, const T* delta_u, const T* b, const T* c,
                   int64_t states, T* y) {
  for (int64_t n = 0; n < states; ++n) {
    const T bn = b[n], cn = c[n];
    const T* a2 = block.A2.data() + n * kLanes;
    T* hn = h + n * kLanes;
    SAMBAY_SIMD
    for (int w = 0; w < kLanes; ++w) {
      hn[w] = scan_step(hn[w], decay_of(delta[w], a2[w]), delta_u[w], bn);
      y[w] += hn[w] * cn;
    }
  }
}

template <typename S, typename T = Compute<S>>
void scan_forward_task(const ScanForward<S>& args, const Documents& docs, int64_t group, int64_t channel, int lanes) {
  const ScanArgs<S>& in = args.in;
  Block<T> block(in, channel, lanes);
  Tile<S> tile(in, channel, lanes);
  T* h = block.h.data();
  for (int64_t s = docs.first[group]; s < docs.first[group + 1]; ++s) {
    block.start(in, s, channel, lanes);
    for (int64_t start = in.borders[s], row = checkpoint_row(in.borders, s); start < in.borders[s + 1]; ++row) {
      const int64_t count = std::min<int64_t>(kChunk, in.borders[s + 1] - start);
      if (args.checkpoints) {
        T* kept = args.checkpoints + row * in.states * in.channels + channel;
        for (int64_t n = 0; n < in.states; ++n) store(kept + n * in.channels, h + n * kLanes, lanes);
      }
      tile.fill(in, start, count, channel, lanes);
      for (int64_t t = 0; t < count; ++t) {
        alignas(64) T y[kLanes];
        SAMBAY_SIMD
        for (int w = 0; w < kLanes; ++w) y[w] = tile.D[w] * tile.u[t][w];
        forward_token(block, h, tile.delta[t], tile.delta_u[t], &tile.B[t * in.states], &tile.C[t * in.states],
                      in.states, y);
        if (in.z.data) {
          alignas(64) T z[kLanes];
          load(z, in.z.at(start + t) + channel, lanes);
          SAMBAY_SIMD
          for (int w = 0; w < kLanes; ++w) y[w] = swiglu_value(z[w], y[w]);
        }
        store(args.y + (start + t) * in.channels + channel, y, lanes);
      }
      start += count;
    }
    store_states(args.final_state + (s * in.channels + channel) * in.states, h, in.states, lanes);
  }
}

// Buffers of the backward sweep over one chunk.
template <typename T>
struct Sweep {
  std::vector<T> h, a, grad_h, grad_A;
  alignas(64) T grad_y[kChunk][kLanes];
  alignas(64) T grad_D[kLanes] = {}, grad_bias[kLanes] = {};
  explicit Sweep(int64_t states)
      : h((kChunk + 1) * states * kLanes),
        a(kChunk * states * kLanes),
        grad_h(states * kLanes),
        grad_A(states * kLanes) {}
};

// Recompute states, decays and the gradient that enters below the gate, for the tokens of the tile.
template <typename S, typename T = Compute<S>>
void replay_chunk(const ScanBackward<S>& args, const Block<T>& block, const Tile<S>& tile, Sweep<T>& sweep,
                  int64_t start, int64_t count, int64_t channel, int lanes) {
  const ScanArgs<S>& in = args.in;
  const int64_t plane = in.states * kLanes;
  for (int64_t t = 0; t < count; ++t) {
    const T *b = &tile.B[t * in.states], *c = &tile.C[t * in.states];
    T *before = sweep.h.data() + t * plane, *after = before + plane, *a = sweep.a.data() + t * plane;
    alignas(64) T y[kLanes];
    SAMBAY_SIMD
    for (int w = 0; w < kLanes; ++w) y[w] = tile.D[w] * tile.u[t][w];
    for (int64_t n = 0; n < in.states; ++n) {
      const T bn = b[n], cn = c[n];
      const T* a2 = block.A2.data() + n * kLanes;
      SAMBAY_SIMD
      for (int w = 0; w < kLanes; ++w) {
        const int64_t i = n * kLanes + w;
        a[i] = decay_of(tile.delta[t][w], a2[w]);
        after[i] = scan_step(before[i], a[i], tile.delta_u[t][w], bn);
        y[w] += after[i] * cn;
      }
    }
    T* g = sweep.grad_y[t];
    if (args.grad_y.data)
      load(g, args.grad_y.at(start + t) + channel, lanes);
    else
      std::fill(g, g + kLanes, T(0));
    if (in.z.data) {
      alignas(64) T z[kLanes], grad_z[kLanes];
      load(z, in.z.at(start + t) + channel, lanes);
      SAMBAY_SIMD
      for (int w = 0; w < kLanes; ++w) {
        const SwigluGrads<T> out = swiglu_backward_value(g[w], z[w], y[w]);
        grad_z[w] = out.gate;
        g[w] = out.value;
      }
      store(args.z + (start + t) * in.channels + channel, grad_z, lanes);
    }
  }
}

// One token backwards: gradients of B and C of this block, and of delta and delta u of each channel.
template <typename S, typename T = Compute<S>>
void backward_token(const Block<T>& block, const Tile<S>& tile, Sweep<T>& sweep, int64_t t, int64_t states, T* grad_b,
                    T* grad_c, T* grad_delta, T* grad_delta_u) {
  const int64_t plane = states * kLanes;
  const T *b = &tile.B[t * states], *c = &tile.C[t * states];
  const T *before = sweep.h.data() + t * plane, *after = before + plane, *a = sweep.a.data() + t * plane;
  const T *delta = tile.delta[t], *delta_u = tile.delta_u[t], *g = sweep.grad_y[t];
  for (int64_t n = 0; n < states; ++n) {
    const T bn = b[n], cn = c[n];
    T sum_b = 0, sum_c = 0;
    const T* A = block.A.data() + n * kLanes;
    T *grad_h = sweep.grad_h.data() + n * kLanes, *grad_A = sweep.grad_A.data() + n * kLanes;
#pragma omp simd reduction(+ : sum_b, sum_c)
    for (int w = 0; w < kLanes; ++w) {
      const int64_t i = n * kLanes + w;
      const ScanGrads<T> out = scan_step_backward(grad_h[w], g[w], a[i], before[i], after[i], delta_u[w], bn, cn);
      sum_b += out.b;
      sum_c += out.c;
      grad_delta_u[w] += out.delta_u;
      grad_delta[w] += out.decay * A[w];
      grad_A[w] += out.decay * delta[w];
      grad_h[w] = out.h;
    }
    grad_b[n] = sum_b;
    grad_c[n] = sum_c;
  }
}

template <typename S, typename T = Compute<S>>
void backward_chunk(const ScanBackward<S>& args, const Block<T>& block, const Tile<S>& tile, Sweep<T>& sweep,
                    int64_t start, int64_t count, int64_t index, int64_t channel, int lanes) {
  const ScanArgs<S>& in = args.in;
  for (int64_t t = count - 1; t >= 0; --t) {
    const int64_t token = start + t, partial = (index * in.tokens + token) * in.states;
    alignas(64) T grad_delta[kLanes] = {}, grad_delta_u[kLanes] = {}, grad_u[kLanes];
    backward_token(block, tile, sweep, t, in.states, args.B + partial, args.C + partial, grad_delta, grad_delta_u);
    const T *g = sweep.grad_y[t], *u = tile.u[t], *delta = tile.delta[t], *raw = tile.raw[t];
    SAMBAY_SIMD
    for (int w = 0; w < kLanes; ++w) {
      const T slope = in.softplus ? softplus_slope(raw[w]) : T(1);
      const TokenGrads<T> out = token_backward(grad_delta_u[w], grad_delta[w], g[w], u[w], delta[w], slope, tile.D[w]);
      grad_u[w] = out.u;
      grad_delta[w] = out.delta;
      sweep.grad_D[w] += g[w] * u[w];
      sweep.grad_bias[w] += grad_delta[w];
    }
    store(args.delta + token * in.channels + channel, grad_delta, lanes);
    store(args.u + token * in.channels + channel, grad_u, lanes);
  }
}

template <typename S, typename T = Compute<S>>
void scan_backward_task(const ScanBackward<S>& args, const Documents& docs, int64_t group, int64_t index,
                        int64_t channel, int lanes) {
  const ScanArgs<S>& in = args.in;
  Block<T> block(in, channel, lanes);
  Tile<S> tile(in, channel, lanes);
  Sweep<T> sweep(in.states);
  for (int64_t s = docs.first[group]; s < docs.first[group + 1]; ++s) {
    const int64_t begin = in.borders[s], length = in.borders[s + 1] - begin;
    const int64_t place = (s * in.channels + channel) * in.states;
    if (args.grad_final)
      load_states(sweep.grad_h.data(), args.grad_final + place, in.states, lanes);
    else
      std::fill(sweep.grad_h.begin(), sweep.grad_h.end(), T(0));
    for (int64_t chunk = (length + kChunk - 1) / kChunk - 1; chunk >= 0; --chunk) {
      const int64_t start = begin + chunk * kChunk, count = std::min<int64_t>(kChunk, in.borders[s + 1] - start);
      const T* kept = args.checkpoints + (checkpoint_row(in.borders, s) + chunk) * in.states * in.channels + channel;
      for (int64_t n = 0; n < in.states; ++n) load(sweep.h.data() + n * kLanes, kept + n * in.channels, lanes);
      tile.fill(in, start, count, channel, lanes);
      replay_chunk(args, block, tile, sweep, start, count, channel, lanes);
      backward_chunk(args, block, tile, sweep, start, count, index, channel, lanes);
    }
    if (args.initial) store_states(args.initial + place, sweep.grad_h.data(), in.states, lanes);
  }
  store_states(args.A + (group * in.channels + channel) * in.states, sweep.grad_A.data(), in.states, lanes);
  if (args.D) store(args.D + group * in.channels + channel, sweep.grad_D, lanes);
  if (args.bias) store(args.bias + group * in.channels + channel, sweep.grad_bias, lanes);
}

template <typename S>
void scan_forward(const ScanForward<S>& args, int threads) {
  const ScanArgs<S>& in = args.in;
  const Documents docs(in.borders, in.documents);
  run_tasks(docs, in.channels, (in.tokens + in.documents) * in.channels * in.states, threads,
            [&](int64_t group, int64_t, int64_t channel, int lanes) {
              scan_forward_task(args, docs, group, channel, lanes);
            });
}

template <typename S>
void scan_backward(const ScanBackward<S>& args, int threads) {
  const ScanArgs<S>& in = args.in;
  const Documents docs(in.borders, in.documents);
  run_tasks(docs, in.channels, (in.tokens + in.documents) * in.channels * in.states, threads,
            [&](int64_t group, int64_t index, int64_t channel, int lanes) {
              scan_backward_task(args, docs, group, index, channel, lanes);
            });
}

}  // namespace

template <typename S>
struct ConvArgs {
  using T = Compute<S>;
  int64_t tokens, channels, width, documents;  // width = K
  const int32_t* borders;
  Rows<S> x;
  const T *weight, *bias, *initial;  // weight transposed (K, D); initial (S, K-1, D); bias, initial may be null
  int64_t silu;
};

template <typename S>
struct ConvForward {
  ConvArgs<S> in;
  S *y, *final_state;  // (T, D), (S, K-1, D)
};

template <typename S>
struct ConvBackward {
  using T = Compute<S>;
  ConvArgs<S> in;
  Rows<S> grad_y;       // data may be null
  const T* grad_final;  // (S, K-1, D), may be null
  S* x;                 // (T, D)
  T *weight, *bias, *initial;  // partials (groups, K, D), (groups, D); (S, K-1, D); last two may be null
};

namespace {

// K rows of a block of channels that move along a document: row k meets tap k, the last row is the current token's.
template <typename T>
struct Window {
  std::vector<T> buffer;
  std::vector<T*> rows;
  explicit Window(int64_t width) : buffer(width * kLanes), rows(width) {
    for (int64_t k = 0; k < width; ++k) rows[k] = buffer.data() + k * kLanes;
  }
  void clear() { std::fill(buffer.begin(), buffer.end(), T(0)); }
  void advance() { std::rotate(rows.begin(), rows.begin() + 1, rows.end()); }
};

// Taps, bias and recent inputs of one block of channels.
template <typename S>
struct Filter {
  using T = Compute<S>;
  const ConvArgs<S>& in;
  int64_t channel;
  int lanes;
  std::vector<T> taps;
  alignas(64) T bias[kLanes] = {};
  Window<T> inputs;

  Filter(const ConvArgs<S>& args, int64_t first, int count)
      : in(args), channel(first), lanes(count), taps(args.width * kLanes), inputs(args.width) {
    for (int64_t k = 0; k < in.width; ++k) load(&taps[k * kLanes], in.weight + k * in.channels + channel, lanes);
    if (in.bias) load(bias, in.bias + channel, lanes);
  }

  // The K-1 inputs before a document.
  void start(int64_t document) {
    inputs.clear();
    if (!in.initial) return;
    for (int64_t k = 0; k + 1 < in.width; ++k)
      load(inputs.rows[k], in.initial + (document * (in.width - 1) + k) * in.channels + channel, lanes);
  }

  void token(int64_t token, T* out) {
    load(inputs.rows[in.width - 1], in.x.at(token) + channel, lanes);
    std::copy(bias, bias + kLanes, out);
    for (int64_t k = 0; k < in.width; ++k) {
      const T *row = inputs.rows[k], *tap = &taps[k * kLanes];
      SAMBAY_SIMD
      for (int w = 0; w < kLanes; ++w) out[w] += tap[w] * row[w];
    }
  }
};

template <typename S, typename T = Compute<S>>
void conv_forward_task(const ConvForward<S>& args, const Documents& docs, int64_t group, int64_t channel, int lanes) {
  const ConvArgs<S>& in = args.in;
  Filter<S> filter(in, channel, lanes);
  for (int64_t s = docs.first[group]; s < docs.first[group + 1]; ++s) {
    filter.start(s);
    for (int64_t token = in.borders[s]; token < in.borders[s + 1]; ++token) {
      alignas(64) T out[kLanes];
      filter.token(token, out);
      if (in.silu) {
        SAMBAY_SIMD
        for (int w = 0; w < kLanes; ++w) out[w] *= sigmoid(out[w]);
      }
      store(args.y + token * in.channels + channel, out, lanes);
      filter.inputs.advance();
    }
    for (int64_t k = 0; k + 1 < in.width; ++k)
      store(args.final_state + (s * (in.width - 1) + k) * in.channels + channel, filter.inputs.rows[k], lanes);
  }
}

// Gradient below the activation of one token.
template <typename S, typename T = Compute<S>>
void conv_output_grad(const ConvBackward<S>& args, Filter<S>& filter, int64_t token, T* g) {
  alignas(64) T out[kLanes];
  filter.token(token, out);
  if (args.grad_y.data)
    load(g, args.grad_y.at(token) + filter.channel, filter.lanes);
  else
    std::fill(g, g + kLanes, T(0));
  if (!args.in.silu) return;
  SAMBAY_SIMD
  for (int w = 0; w < kLanes; ++w) g[w] *= silu_slope(out[w], sigmoid(out[w]));
}

// Store the gradient of an input; before the document's start it belongs to the initial state.
template <typename S, typename T = Compute<S>>
void conv_emit(const ConvBackward<S>& args, int64_t document, int64_t position, int64_t channel, int lanes,
               const T* value) {
  const ConvArgs<S>& in = args.in;
  if (position >= 0)
    store(args.x + (in.borders[document] + position) * in.channels + channel, value, lanes);
  else if (args.initial)
    store(args.initial + (document * (in.width - 1) + in.width - 1 + position) * in.channels + channel, value, lanes);
}

template <typename S, typename T = Compute<S>>
void conv_backward_task(const ConvBackward<S>& args, const Documents& docs, int64_t group, int64_t channel, int lanes) {
  const ConvArgs<S>& in = args.in;
  Filter<S> filter(in, channel, lanes);
  Window<T> grads(in.width);  // of the inputs in the filter's window; the oldest is complete after its token's turn
  std::vector<T> grad_weight(in.width * kLanes);
  alignas(64) T grad_bias[kLanes] = {}, g[kLanes], kept[kLanes];
  for (int64_t s = docs.first[group]; s < docs.first[group + 1]; ++s) {
    const int64_t length = in.borders[s + 1] - in.borders[s];
    filter.start(s);
    grads.clear();
    for (int64_t t = 0; t < length; ++t) {
      conv_output_grad(args, filter, in.borders[s] + t, g);
      for (int64_t k = 0; k < in.width; ++k) {
        const T *row = filter.inputs.rows[k], *tap = &filter.taps[k * kLanes];
        T *grad_row = grads.rows[k], *grad_tap = &grad_weight[k * kLanes];
        SAMBAY_SIMD
        for (int w = 0; w < kLanes; ++w) {
          grad_tap[w] += g[w] * row[w];
          grad_row[w] += g[w] * tap[w];
        }
      }
      SAMBAY_SIMD
      for (int w = 0; w < kLanes; ++w) grad_bias[w] += g[w];
      conv_emit(args, s, t - in.width + 1, channel, lanes, grads.rows[0]);
      std::fill(grads.rows[0], grads.rows[0] + kLanes, T(0));
      grads.advance();
      filter.inputs.advance();
    }
    // The last K-1 inputs are the final state as well.
    for (int64_t k = 0; k + 1 < in.width; ++k) {
      T* row = grads.rows[k];
      if (args.grad_final) {
        load(kept, args.grad_final + (s * (in.width - 1) + k) * in.channels + channel, lanes);
        for (int w = 0; w < kLanes; ++w) row[w] += kept[w];
      }
      conv_emit(args, s, length - in.width + 1 + k, channel, lanes, row);
    }
  }
  for (int64_t k = 0; k < in.width; ++k)
    store(args.weight + (group * in.width + k) * in.channels + channel, &grad_weight[k * kLanes], lanes);
  if (args.bias) store(args.bias + group * in.channels + channel, grad_bias, lanes);
}

template <typename S>
void conv_forward(const ConvForward<S>& args, int threads) {
  const ConvArgs<S>& in = args.in;
  const Documents docs(in.borders, in.documents);
  run_tasks(docs, in.channels, (in.tokens + in.documents) * in.channels, threads,
            [&](int64_t group, int64_t, int64_t channel, int lanes) {
              conv_forward_task(args, docs, group, channel, lanes);
            });
}

template <typename S>
void conv_backward(const ConvBackward<S>& args, int threads) {
  const ConvArgs<S>& in = args.in;
  const Documents docs(in.borders, in.documents);
  run_tasks(docs, in.channels, (in.tokens + in.documents) * in.channels, threads,
            [&](int64_t group, int64_t, int64_t channel, int lanes) {
              conv_backward_task(args, docs, group, channel, lanes);
            });
}

// Run `task(first, last)` over pieces of [0, count).
template <typename Task>
void run_pieces(int64_t count, int threads, const Task& task) {
  constexpr int64_t kPiece = 1 << 13;
  const int64_t pieces = (count + kPiece - 1) / kPiece;
  const int used = count < kSmall ? 1 : threads;
#pragma omp parallel for schedule(static) num_threads(used) if (used > 1)
  for (int64_t i = 0; i < pieces; ++i) {
    FlushDenormals guard;
    task(i * kPiece, std::min(count, (i + 1) * kPiece));
  }
}

// Runs of elements side by side in a row of a matrix (count, width), in pieces over threads: `task(row, first, last)`.
template <typename Task>
void run_rows(int64_t count, int64_t width, int threads, const Task& task) {
  run_pieces(count * width, threads, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t row = first / width, column = first % width, stop = std::min(width, column + last - first);
      task(row, column, stop);
      first += stop - column;
    }
  });
}

template <typename S>
void swiglu_forward(const SwigluForward<S>& args, int threads) {
  run_rows(args.count, args.width, threads, [&](int64_t row, int64_t first, int64_t last) {
    const S *gate = args.gate.at(row), *value = args.value.at(row);
    S* out = args.out + row * args.width;
    SAMBAY_SIMD
    for (int64_t i = first; i < last; ++i) out[i] = narrow<S>(swiglu_value(widen(gate[i]), widen(value[i])));
  });
}

template <typename S>
void swiglu_backward(const SwigluBackward<S>& args, int threads) {
  run_rows(args.count, args.width, threads, [&](int64_t row, int64_t first, int64_t last) {
    const S *grad = args.grad.at(row), *gate = args.gate.at(row), *value = args.value.at(row);
    S *of_gate = args.of_gate.at(row), *of_value = args.of_value.at(row);
    SAMBAY_SIMD
    for (int64_t i = first; i < last; ++i) {
      const auto out = swiglu_backward_value(widen(grad[i]), widen(gate[i]), widen(value[i]));
      of_gate[i] = narrow<S>(out.gate);
      of_value[i] = narrow<S>(out.value);
    }
  });
}

}  // namespace
}  // namespace sambay

#define SAMBAY_EXPORT(T, suffix)                                                                                      \
  extern "C" void sambay_scan_forward_##suffix(const sambay::ScanForward<T>* args, int threads) {                     \
    sambay::scan_forward(*args, threads);                                                                             \
  }                                                                                                                   \
  extern "C" void sambay_scan_backward_##suffix(const sambay::ScanBackward<T>* args, int threads) {                   \
    sambay::scan_backward(*args, threads);                                                                            \
  }                                                                                                                   \
  extern "C" void sambay_conv_forward_##suffix(const sambay::ConvForward<T>* args, int threads) {                     \
    sambay::conv_forward(*args, threads);                                                                             \
  }                                                                                                                   \
  extern "C" void sambay_conv_backward_##suffix(const sambay::ConvBackward<T>* args, int threads) {                   \
    sambay::conv_backward(*args, threads);                                                                            \
  }                                                                                                                   \
  extern "C" void sambay_swiglu_forward_##suffix(const sambay::SwigluForward<T>* args, int threads) {                 \
    sambay::swiglu_forward(*args, threads);                                                                           \
  }                                                                                                                   \
  extern "C" void sambay_swiglu_backward_##suffix(const sambay::SwigluBackward<T>* args, int threads) {               \
    sambay::swiglu_backward(*args, threads);                                                                          \
  }

SAMBAY_EXPORT(float, f32)
SAMBAY_EXPORT(double, f64)
SAMBAY_EXPORT(sambay::BFloat16, bf16)

// Sizes the caller allocates by.
extern "C" int64_t sambay_lanes() { return sambay::kLanes; }
extern "C" int64_t sambay_groups(const int32_t* borders, int64_t documents) {
  return sambay::Documents(borders, documents).groups();
}
