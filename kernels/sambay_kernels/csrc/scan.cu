// The selective scan on a GPU, forward and backward, over packed documents cut into segments (segments.py).
//
// A block of four warps takes one segment and walks through its tokens. A lane is one channel and holds its 16 states
// in registers; with more than 16 states, several lanes share a channel ("slabs" of 16 states each, zeros at the end).
// B and C are the same for all channels: they are brought to shared memory as float32, kKeep tokens at a time.
//
// A document that is one segment takes one pass. Longer ones take three: scan_forward_kernel with kLocal runs each
// segment but the last from zero, scan_carry_kernel adds up the states at the cuts, scan_forward_kernel runs from
// those. The backward mirrors this from the end. It gets the states before every kKeep-th token from the forward pass
// and computes the others again, kBlock tokens at a time, into shared memory.
//
// Sums over channels (the gradients of B and C) and over segments (those of A, D, bias) leave as partial sums and are
// added in a fixed order by sum_parts_kernel: no atomics, the same input gives the same bits.

#include <type_traits>

#include "cuda_common.cuh"

extern __shared__ float4 sambay_shared[];

namespace sambay {

template <typename T>
struct ScanArgs {
  int64_t tokens, channels, states, documents, segments;
  int64_t slabs, tiles;  // lanes of a channel, a power of two; blocks side by side for all channels
  const int32_t *start, *end, *document, *first, *borders;  // the plan of segments.py
  Rows<T> u, delta, B, C, z;
  const float *A, *D, *bias, *initial;  // D, bias, initial may be null
  int64_t softplus;
};

template <typename T>
struct ScanForward {
  ScanArgs<T> in;
  float *local, *elapsed, *carried;  // (n, N, D), (n, D), (n, N, D): scratch; null where no document is cut
  T* y;                              // (T, D)
  float *final_state, *kept;         // (S, D, N); (rows, N, D), may be null
};

template <typename T>
struct ScanBackward {
  ScanArgs<T> in;
  Rows<T> grad_y;                    // data may be null
  const float *grad_final, *kept;    // (S, D, N), may be null
  float *local, *elapsed, *carried;  // as in ScanForward
  T *u, *delta, *z;                  // gradients, (T, D); z may be null
  float *A, *D, *bias;               // partial sums (n, N, D), (n, D), (n, D); D, bias may be null
  float *B, *C;                      // partial sums (tiles, T, N)
  float* initial;                    // (S, D, N), may be null
};

struct SumParts {
  int64_t count, size;
  const float* parts;  // (count, size)
  float* sum;          // (size,)
};

namespace {

constexpr int kWarp = 32, kWarps = 4, kThreads = kWarp * kWarps;
constexpr int kStates = 16;  // of a lane
constexpr int kKeep = 16;    // tokens between kept states; CUDA_KEPT_EVERY in selective_scan/cuda_backend.py
constexpr int kBlock = 8;    // tokens whose states the backward holds in shared memory; divides kKeep
constexpr int kAhead = 4;    // tokens that are asked for before they are needed; divides kKeep
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLn2 = 0.6931471805599453f;

// A lane's place. kOne: one lane a channel, with all of its 16 states.
template <bool kOne>
struct Lane {
  int slabs, width, warp, index, slab;  // width: channels of a warp
  int64_t channel;
  int states;  // how many of its 16 exist
  bool here;   // the channel exists
  bool writes;

  template <typename T>
  __device__ __forceinline__ explicit Lane(const ScanArgs<T>& in) {
    slabs = kOne ? 1 : static_cast<int>(in.slabs);
    width = kWarp / slabs;
    warp = threadIdx.x / kWarp;
    index = threadIdx.x % kWarp;
    slab = kOne ? 0 : index / width;
    channel = (static_cast<int64_t>(blockIdx.y) * kWarps + warp) * width + (kOne ? index : index % width);
    here = channel < in.channels;
    const int64_t left = in.states - slab * kStates;
    states = !here || left < 0 ? 0 : kOne || left > kStates ? kStates : static_cast<int>(left);
    writes = here && slab == 0;
  }

  __device__ __forceinline__ int padded() const { return slabs * kStates; }

  // Sum over the lanes of a channel.
  __device__ __forceinline__ float over_slabs(float value) const {
    if constexpr (!kOne) {
      for (int mask = width; mask < kWarp; mask *= 2) value += __shfl_xor_sync(kAll, value, mask);
    }
    return value;
  }

  // A lane's states of a (.., D, N) tensor.
  __device__ __forceinline__ void load_by_channel(float (&h)[kStates], const float* from, int64_t row, int64_t channels,
                                                  int64_t all) const {
    from += (row * channels + channel) * all + slab * kStates;
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = i < states ? from[i] : 0.f;
  }

  __device__ __forceinline__ void store_by_channel(float* to, const float (&h)[kStates], int64_t row, int64_t channels,
                                                   int64_t all) const {
    to += (row * channels + channel) * all + slab * kStates;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (i < states) to[i] = h[i];
  }

  // A lane's states of a (.., N, D) tensor: neighbours stand side by side.
  __device__ __forceinline__ void load_by_state(float (&h)[kStates], const float* from, int64_t row, int64_t channels,
                                                int64_t all) const {
    from += (row * all + slab * kStates) * channels + channel;
#pragma unroll
    for (int i = 0; i < kStates; ++i) h[i] = i < states ? from[i * channels] : 0.f;
  }

  __device__ __forceinline__ void store_by_state(float* to, const float (&h)[kStates], int64_t row, int64_t channels,
                                                 int64_t all) const {
    to += (row * all + slab * kStates) * channels + channel;
#pragma unroll
    for (int i = 0; i < kStates; ++i)
      if (i < states) to[i * channels] = h[i];
  }

  __device__ __forceinline__ float of_channel(const float* values) const {
    return values && here ? values[channel] : 0.f;
  }
};

// Rows of kCount tokens as one lane needs them; zeros outside [first, end).
template <typename T, int kCount>
struct Ahead {
  T value[kCount];

  __device__ __forceinline__ void load(const Rows<T>& rows, int token, int first, int end, int64_t channel, bool here) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const bool inside = here && token + j >= first && token + j < end;
      value[j] = inside ? rows.at(token + j)[channel] : from_float<T>(0.f);
    }
  }

  __device__ __forceinline__ float at(int j) const { return to_float(value[j]); }
};

// B and C of kKeep tokens in shared memory, (kKeep, 2, padded) float32, zeros beyond the segment and the last state.
template <typename T, bool kOne>
struct Maps {
  static constexpr int kEach = kOne ? kKeep * 2 * kStates / kThreads : 1;
  float* shared;
  int padded;
  T ahead[kEach];

  __device__ __forceinline__ T read(const ScanArgs<T>& in, int chunk, int end, int place) const {
    const int token = chunk + place / (2 * padded), n = place % padded;
    const Rows<T>& rows = place / padded % 2 ? in.C : in.B;
    return token < end && n < in.states ? rows.at(token)[n] : from_float<T>(0.f);
  }

  // Ask for a chunk's values, which `put` will write. (With many states `put` reads them itself.)
  __device__ __forceinline__ void ask(const ScanArgs<T>& in, int chunk, int end) {
    if constexpr (kOne) {
#pragma unroll
      for (int r = 0; r < kEach; ++r) ahead[r] = read(in, chunk, end, r * kThreads + threadIdx.x);
    }
  }

  __device__ __forceinline__ void put(const ScanArgs<T>& in, int chunk, int end) {
    __syncthreads();
    if constexpr (kOne) {
#pragma unroll
      for (int r = 0; r < kEach; ++r) shared[r * kThreads + threadIdx.x] = to_float(ahead[r]);
    } else {
      for (int place = threadIdx.x; place < kKeep * 2 * padded; place += kThreads)
        shared[place] = to_float(read(in, chunk, end, place));
    }
    __syncthreads();
  }

  __device__ __forceinline__ const float* B(int t, int slab) const { return shared + 2 * t * padded + slab * kStates; }
  __device__ __forceinline__ const float* C(int t, int slab) const { return B(t, slab) + padded; }
};

// 16 floats of shared memory, read four at a time.
__device__ __forceinline__ void load_states(float (&to)[kStates], const float* from) {
#pragma unroll
  for (int i = 0; i < kStates; i += 4) {
    const float4 four = *reinterpret_cast<const float4*>(from + i);
    to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
  }
}

// A log2(e), so that decays are powers of two.
template <bool kOne, typename T>
__device__ __forceinline__ void load_exponents(float (&a2)[kStates], const Lane<kOne>& lane, const ScanArgs<T>& in) {
  lane.load_by_channel(a2, in.A, 0, in.channels, in.states);
#pragma unroll
  for (int i = 0; i < kStates; ++i) a2[i] *= static_cast<float>(kLog2E);
}

// The step delta' of a token.
__device__ __forceinline__ float time_step(float raw, bool with_softplus) {
  return with_softplus ? softplus(raw) : raw;
}

// kLocal: from a zero state to `local` and `elapsed`, where another segment of the document follows. Else y, final and
// kept states, from the segment's true state.
template <typename T, bool kOne, bool kLocal>
__global__ void __launch_bounds__(kThreads, 4) scan_forward_kernel(ScanForward<T> args) {
  const ScanArgs<T>& in = args.in;
  const int segment = blockIdx.x, document = in.document[segment];
  if (document < 0) return;
  const int start = in.start[segment], end = in.end[segment], border = in.borders[document];
  const bool last = end == in.borders[document + 1], softplus = in.softplus;
  if (kLocal && last) return;
  const Lane<kOne> lane(in);
  const float bias = lane.of_channel(in.bias), skip = lane.of_channel(in.D);
  float a2[kStates], h[kStates] = {}, elapsed = 0.f;
  load_exponents(a2, lane, in);
  if (!kLocal && start > border)
    lane.load_by_state(h, args.carried, segment, in.channels, in.states);
  else if (!kLocal && in.initial)
    lane.load_by_channel(h, in.initial, document, in.channels, in.states);

  Maps<T, kOne> maps{reinterpret_cast<float*>(sambay_shared), lane.padded(), {}};
  Ahead<T, kAhead> u, delta, z;
  maps.ask(in, start, end);
  u.load(in.u, start, start, end, lane.channel, lane.here);
  delta.load(in.delta, start, start, end, lane.channel, lane.here);
  int64_t row = border / kKeep + document + (start - border) / kKeep;
  for (int chunk = start; chunk < end; chunk += kKeep, ++row) {
    maps.put(in, chunk, end);
    maps.ask(in, chunk + kKeep, end);
    if (!kLocal && args.kept) lane.store_by_state(args.kept, h, row, in.channels, in.states);
#pragma unroll 1
    for (int group = chunk; group < chunk + kKeep && group < end; group += kAhead) {
      const Ahead<T, kAhead> u_now = u, delta_now = delta;
      u.load(in.u, group + kAhead, start, end, lane.channel, lane.here);
      delta.load(in.delta, group + kAhead, start, end, lane.channel, lane.here);
      if (!kLocal && in.z.data) z.load(in.z, group, start, end, lane.channel, lane.here);
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int token = group + j;
        if (token >= end) break;
        const float x = u_now.at(j), step = time_step(delta_now.at(j) + bias, softplus), drive = step * x;
        float b[kStates], c[kStates], y[2] = {0.f, 0.f};  // two sums: half the wait for additions
        load_states(b, maps.B(token - chunk, lane.slab));
        if (!kLocal) load_states(c, maps.C(token - chunk, lane.slab));
#pragma unroll
        for (int i = 0; i < kStates; ++i) {
          h[i] = scan_step(h[i], decay_of(step, a2[i]), drive, b[i]);
          if (!kLocal) y[i % 2] += h[i] * c[i];
        }
        elapsed += step;
        if (kLocal) continue;
        float out = lane.over_slabs(y[0] + y[1]) + skip * x;
        if (in.z.data) out = gate_value(z.at(j), out);
        if (lane.writes) args.y[token * in.channels + lane.channel] = from_float<T>(out);
      }
    }
  }
  if (kLocal) {
    lane.store_by_state(args.local, h, segment, in.channels, in.states);
    if (lane.writes) args.elapsed[segment * in.channels + lane.channel] = elapsed;
  } else if (last) {
    lane.store_by_channel(args.final_state, h, document, in.channels, in.states);
  }
}

// The gradient of the state before each segment that nothing follows, and the sum of its steps; where another segment
// of the same document comes before.
template <typename T, bool kOne>
__global__ void __launch_bounds__(kThreads, 4) scan_local_backward_kernel(ScanBackward<T> args) {
  const ScanArgs<T>& in = args.in;
  const int segment = blockIdx.x, document = in.document[segment];
  if (document < 0) return;
  const int start = in.start[segment], end = in.end[segment];
  if (start == in.borders[document]) return;
  const bool softplus = in.softplus;
  const Lane<kOne> lane(in);
  const float bias = lane.of_channel(in.bias);
  float a2[kStates], g[kStates] = {}, elapsed = 0.f;
  load_exponents(a2, lane, in);

  Maps<T, kOne> maps{reinterpret_cast<float*>(sambay_shared), lane.padded(), {}};
  Ahead<T, kAhead> up, delta, z;
  const bool upstream = args.grad_y.data && lane.here;
  int chunk = start + (end - start - 1) / kKeep * kKeep, group = start + (end - start - 1) / kAhead * kAhead;
  maps.ask(in, chunk, end);
  up.load(args.grad_y, group, start, end, lane.channel, upstream);
  delta.load(in.delta, group, start, end, lane.channel, lane.here);
  for (; chunk >= start; chunk -= kKeep) {
    maps.put(in, chunk, end);
    if (chunk > start) maps.ask(in, chunk - kKeep, end);
#pragma unroll 1
    for (; group >= chunk; group -= kAhead) {
      const Ahead<T, kAhead> up_now = up, delta_now = delta;
      up.load(args.grad_y, group - kAhead, start, end, lane.channel, upstream);
      delta.load(in.delta, group - kAhead, start, end, lane.channel, lane.here);
      if (in.z.data) z.load(in.z, group, start, end, lane.channel, lane.here);
#pragma unroll
      for (int j = kAhead - 1; j >= 0; --j) {
        const int token = group + j;
        if (token >= end) continue;
        const float step = time_step(delta_now.at(j) + bias, softplus);
        const float grad_y = in.z.data ? gate_value(z.at(j), up_now.at(j)) : up_now.at(j);
        float c[kStates];
        load_states(c, maps.C(token - chunk, lane.slab));
#pragma unroll
        for (int i = 0; i < kStates; ++i) g[i] = (g[i] + grad_y * c[i]) * decay_of(step, a2[i]);
        elapsed += step;
      }
    }
  }
  lane.store_by_state(args.local, g, segment, in.channels, in.states);
  if (lane.writes) args.elapsed[segment * in.channels + lane.channel] = elapsed;
}

struct Carry {
  int64_t channels, states;
  const int32_t* first;
  const float *A, *edge;  // edge: the initial state (backward: the final state's gradient), (S, D, N), may be null
  const float *local, *elapsed;
  float* carried;
};

// The state before every segment of a document but its first, the cuts one after another; backward the gradient of the
// state after every segment but the last, from the end. A thread is one state of one channel.
template <bool kBackward>
__global__ void __launch_bounds__(kThreads) scan_carry_kernel(Carry args) {
  const int64_t document = blockIdx.x, plane = args.channels * args.states;
  const int64_t place = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x;
  if (place >= plane) return;
  const int64_t channel = place % args.channels, n = place / args.channels;
  const float a2 = args.A[channel * args.states + n] * static_cast<float>(kLog2E);
  float h = args.edge ? args.edge[(document * args.channels + channel) * args.states + n] : 0.f;
  const int count = args.first[document + 1] - args.first[document] - 1;
  int64_t segment = kBackward ? args.first[document + 1] - 1 : args.first[document];
  for (int i = 0; i < count; ++i) {
    const float decay = decay_of(args.elapsed[segment * args.channels + channel], a2);
    h = scan_step(h, decay, 1.f, args.local[segment * plane + place]);
    segment += kBackward ? -1 : 1;
    args.carried[segment * plane + place] = h;
  }
}

// Sums of 32 values over the lanes of a warp by 31 exchanges; lane v gets that of value v. Each round halves the values
// that a lane still has to do with. (Rounds by recursion: an array stays in registers only if every index is known.)
template <int kHalf = kWarp / 2>
__device__ __forceinline__ float transposed_sum(float (&value)[kWarp], int lane) {
  const bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float away = upper ? value[i] : value[i + kHalf], stays = upper ? value[i + kHalf] : value[i];
    value[i] = stays + __shfl_xor_sync(kAll, away, kHalf);
  }
  if constexpr (kHalf > 1) return transposed_sum<kHalf / 2>(value, lane);
  return value[0];
}

// Gradients of B and C on their way out: summed over a warp's channels by exchange, over the warps in shared memory.
template <bool kOne>
struct MapSums {
  static constexpr int kTokens = kOne ? kBlock : 1;  // between two flushes
  float* shared;                                     // (kTokens, kWarps, 2, padded)
  int padded;

  // `value`: a lane's 16 of B, then its 16 of C.
  __device__ __forceinline__ void add(const Lane<kOne>& lane, int slot, float (&value)[kWarp]) {
    float* to = shared + (slot * kWarps + lane.warp) * 2 * padded;
    if constexpr (kOne) {
      to[lane.index] = transposed_sum(value, lane.index);
    } else {
#pragma unroll
      for (int i = 0; i < kWarp; ++i) {
        for (int mask = 1; mask < lane.width; mask *= 2) value[i] += __shfl_xor_sync(kAll, value[i], mask);
        if (lane.index % lane.width == 0) to[i / kStates * padded + lane.slab * kStates + i % kStates] = value[i];
      }
    }
  }

  // Write the sums of tokens first .. first + count - 1.
  template <typename T>
  __device__ __forceinline__ void flush(const ScanBackward<T>& args, int64_t first, int count) {
    __syncthreads();
    for (int place = threadIdx.x; place < count * 2 * padded; place += kThreads) {
      const int slot = place / (2 * padded), of = place % (2 * padded), n = of % padded;
      const float* from = shared + slot * kWarps * 2 * padded + of;
      float sum = from[0];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) sum += from[warp * 2 * padded];
      float* to = of < padded ? args.B : args.C;
      if (n < args.in.states) to[(blockIdx.y * args.in.tokens + first + slot) * args.in.states + n] = sum;
    }
    __syncthreads();
  }
};

// Shared memory of the backward: states and steps of a block of tokens, each thread its own; maps; sums of maps.
constexpr int kStateFloats = kBlock * kStates * kThreads, kStepFloats = kBlock * kThreads;

inline size_t forward_shared(int64_t slabs) { return sizeof(float) * kKeep * 2 * slabs * kStates; }

inline size_t backward_shared(int64_t slabs, int tokens) {
  return sizeof(float) * (kStateFloats + kStepFloats + tokens * kWarps * 2 * slabs * kStates) + forward_shared(slabs);
}

template <typename T, bool kOne>
struct Backward {
  const ScanBackward<T>& args;
  const ScanArgs<T>& in;
  const Lane<kOne> lane;
  const int start, end;
  const float bias, skip;
  float a2[kStates], h[kStates], g[kStates], sum_A[kStates], sum_D, sum_bias;
  float4* states;  // (kBlock, kStates / 4, kThreads): before each token
  float* steps;    // (kBlock, kThreads)
  Maps<T, kOne> maps;
  MapSums<kOne> sums;

  __device__ __forceinline__ Backward(const ScanBackward<T>& given, int first, int stop)
      : args(given), in(given.in), lane(given.in), start(first), end(stop), bias(lane.of_channel(in.bias)),
        skip(lane.of_channel(in.D)), sum_D(0.f), sum_bias(0.f) {
    load_exponents(a2, lane, in);
#pragma unroll
    for (int i = 0; i < kStates; ++i) g[i] = sum_A[i] = 0.f;
    states = sambay_shared;
    steps = reinterpret_cast<float*>(sambay_shared) + kStateFloats;
    maps.shared = steps + kStepFloats;
    maps.padded = sums.padded = lane.padded();
    sums.shared = maps.shared + kKeep * 2 * maps.padded;
  }

  // Run through a block of tokens and keep the state before each; a token beyond the end changes nothing.
  __device__ __forceinline__ void replay(int block, int chunk) {
    Ahead<T, kBlock> u, delta;
    u.load(in.u, block, start, end, lane.channel, lane.here);
    delta.load(in.delta, block, start, end, lane.channel, lane.here);
#pragma unroll
    for (int t = 0; t < kBlock; ++t) {
      const float step = block + t < end ? time_step(delta.at(t) + bias, in.softplus) : 0.f, drive = step * u.at(t);
      float b[kStates];
      load_states(b, maps.B(block + t - chunk, lane.slab));
      steps[t * kThreads + threadIdx.x] = step;
#pragma unroll
      for (int i = 0; i < kStates; i += 4)
        states[(t * kStates + i) / 4 * kThreads + threadIdx.x] = make_float4(h[i], h[i + 1], h[i + 2], h[i + 3]);
#pragma unroll
      for (int i = 0; i < kStates; ++i) h[i] = scan_step(h[i], decay_of(step, a2[i]), drive, b[i]);
    }
  }

  struct Token {
    Ahead<T, 1> u, delta, z, up;
  };

  __device__ __forceinline__ void ask(Token& token, int at) const {
    token.u.load(in.u, at, start, end, lane.channel, lane.here);
    token.delta.load(in.delta, at, start, end, lane.channel, lane.here);
    token.up.load(args.grad_y, at, start, end, lane.channel, lane.here && args.grad_y.data);
    token.z.load(in.z, at, start, end, lane.channel, lane.here && in.z.data);
  }

  // Below the gate: the gradient of the scan's own output; that of z leaves here. h is the state after the token.
  __device__ __forceinline__ float below_gate(const Token& token, const float (&c)[kStates], float x, int64_t place) {
    const float up = token.up.at(0);
    if (!in.z.data) return up;
    float y = 0.f;
#pragma unroll
    for (int i = 0; i < kStates; ++i) y += h[i] * c[i];
    const GateGrads<float> out = gate_backward_value(up, token.z.at(0), lane.over_slabs(y) + skip * x);
    if (lane.writes) args.z[place] = from_float<T>(out.gate);
    return out.memory;
  }

  // One token backwards; h goes from the state after it to the state before it, g the same way.
  __device__ __forceinline__ void token(const Token& given, int at, int t, int chunk) {
    float b[kStates], c[kStates], of_maps[kWarp];
    load_states(b, maps.B(at - chunk, lane.slab));
    load_states(c, maps.C(at - chunk, lane.slab));
    const int64_t place = at * in.channels + lane.channel;
    const float x = given.u.at(0), raw = given.delta.at(0) + bias, step = steps[t * kThreads + threadIdx.x];
    const float grad_y = below_gate(given, c, x, place), drive = step * x;
    float of_drive = 0.f, of_exponent = 0.f;
#pragma unroll
    for (int first = 0; first < kStates; first += 4) {
      const float4 four = states[(t * kStates + first) / 4 * kThreads + threadIdx.x];
      const float before[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int i = first; i < first + 4; ++i) {
        const float a = decay_of(step, a2[i]);
        const ScanGrads<float> out =
            scan_step_backward(g[i], grad_y, a, before[i - first], h[i], drive, b[i], c[i]);
        of_maps[i] = out.b;
        of_maps[kStates + i] = out.c;
        of_drive += out.delta_u;
        of_exponent += out.decay * a2[i];
        sum_A[i] += out.decay * step;
        g[i] = out.h;
        h[i] = before[i - first];
      }
    }
    const float slope = in.softplus ? softplus_slope(raw) : 1.f, of_delta = lane.over_slabs(of_exponent) * kLn2;
    const TokenGrads<float> out = token_backward(lane.over_slabs(of_drive), of_delta, grad_y, x, step, slope, skip);
    sum_D += grad_y * x;
    sum_bias += out.delta;
    if (lane.writes) {
      args.u[place] = from_float<T>(out.u);
      args.delta[place] = from_float<T>(out.delta);
    }
    sums.add(lane, t % MapSums<kOne>::kTokens, of_maps);
  }

  // A block of tokens backwards, after its replay.
  __device__ __forceinline__ void back(int block, int chunk) {
    const int count = end - block < kBlock ? end - block : kBlock;
    Token next;
    ask(next, block + count - 1);
#pragma unroll 1
    for (int t = count - 1; t >= 0; --t) {
      const Token now = next;
      if (t > 0) ask(next, block + t - 1);
      token(now, block + t, t, chunk);
      if (t % MapSums<kOne>::kTokens == 0) sums.flush(args, block + t, kOne ? count : 1);
    }
  }

  // A chunk of kKeep tokens from its kept state. A later block is reached by replaying the earlier ones.
  __device__ __forceinline__ void chunk(int first, int64_t row) {
    maps.ask(in, first, end);
    maps.put(in, first, end);
    const int count = end - first < kKeep ? end - first : kKeep;
#pragma unroll 1
    for (int block = first + (count - 1) / kBlock * kBlock; block >= first; block -= kBlock) {
      lane.load_by_state(h, args.kept, row, in.channels, in.states);
#pragma unroll 1
      for (int from = first; from <= block; from += kBlock) replay(from, first);
      back(block, first);
    }
  }
};

// Three blocks on a multiprocessor of an H100 as far as shared memory goes, so registers for as many.
template <typename T, bool kOne>
__global__ void __launch_bounds__(kThreads, kOne ? 3 : 2) scan_backward_kernel(ScanBackward<T> args) {
  const ScanArgs<T>& in = args.in;
  const int segment = blockIdx.x, document = in.document[segment];
  const int start = in.start[segment], end = in.end[segment];
  Backward<T, kOne> sweep(args, start, end);
  const Lane<kOne>& lane = sweep.lane;
  if (document >= 0) {
    const int border = in.borders[document];
    if (end < in.borders[document + 1])
      lane.load_by_state(sweep.g, args.carried, segment, in.channels, in.states);
    else if (args.grad_final)
      lane.load_by_channel(sweep.g, args.grad_final, document, in.channels, in.states);
    const int chunks = (end - start + kKeep - 1) / kKeep;
    const int64_t row = border / kKeep + document + (start - border) / kKeep;
#pragma unroll 1
    for (int i = chunks - 1; i >= 0; --i) sweep.chunk(start + i * kKeep, row + i);
    if (args.initial && start == border)
      lane.store_by_channel(args.initial, sweep.g, document, in.channels, in.states);
  }
  lane.store_by_state(args.A, sweep.sum_A, segment, in.channels, in.states);
  if (!lane.writes) return;
  if (args.D) args.D[segment * in.channels + lane.channel] = sweep.sum_D;
  if (args.bias) args.bias[segment * in.channels + lane.channel] = sweep.sum_bias;
}

// Sum over the first dimension, one term after another: the bits depend on nothing else.
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(SumParts args) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= args.size) return;
  float sum = 0.f;
#pragma unroll 8
  for (int64_t part = 0; part < args.count; ++part) sum += args.parts[part * args.size + place];
  args.sum[place] = sum;
}

template <bool kBackward, typename T>
cudaError_t carry(const ScanArgs<T>& in, const float* edge, const float* local, const float* elapsed, float* carried,
                  void* stream) {
  const Carry args{in.channels, in.states, in.first, in.A, edge, local, elapsed, carried};
  const int64_t blocks = divide_up(in.channels * in.states, kThreads);
  return launch(scan_carry_kernel<kBackward>, in.documents, blocks, kThreads, 0, args, stream);
}

template <bool kOne>
using One = std::integral_constant<bool, kOne>;

template <typename T, bool kOne>
cudaError_t scan_forward(const ScanForward<T>& args, One<kOne>, void* stream) {
  const ScanArgs<T>& in = args.in;
  const size_t shared = forward_shared(in.slabs);
  cudaError_t error = cudaSuccess;
  if (args.carried) {
    error = launch(scan_forward_kernel<T, kOne, true>, in.segments, in.tiles, kThreads, shared, args, stream);
    if (error == cudaSuccess) error = carry<false>(in, in.initial, args.local, args.elapsed, args.carried, stream);
  }
  if (error != cudaSuccess) return error;
  return launch(scan_forward_kernel<T, kOne, false>, in.segments, in.tiles, kThreads, shared, args, stream);
}

template <typename T, bool kOne>
cudaError_t scan_backward(const ScanBackward<T>& args, One<kOne>, void* stream) {
  const ScanArgs<T>& in = args.in;
  cudaError_t error = cudaSuccess;
  if (args.carried) {
    error = launch(scan_local_backward_kernel<T, kOne>, in.segments, in.tiles, kThreads, forward_shared(in.slabs), args,
                   stream);
    if (error == cudaSuccess) error = carry<true>(in, args.grad_final, args.local, args.elapsed, args.carried, stream);
  }
  if (error != cudaSuccess) return error;
  const size_t shared = backward_shared(in.slabs, MapSums<kOne>::kTokens);
  return launch(scan_backward_kernel<T, kOne>, in.segments, in.tiles, kThreads, shared, args, stream);
}

// Half-precision kernels exist for 16 states, as the published models have; others are given float32.
template <template <typename> class Args, typename Run>
int with_type(const void* args, size_t size, int type, int device, const Run& run) {
  static_assert(sizeof(Args<float>) == sizeof(Args<__half>));
  if (size != sizeof(Args<float>)) return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const auto& single = *static_cast<const Args<float>*>(args);
  if (type == kFloat32) return single.in.states == kStates ? run(single, One<true>()) : run(single, One<false>());
  if (single.in.states != kStates) return cudaErrorInvalidValue;
  if (type == kBfloat16) return run(*static_cast<const Args<__nv_bfloat16>*>(args), One<true>());
  if (type == kFloat16) return run(*static_cast<const Args<__half>*>(args), One<true>());
  return cudaErrorInvalidValue;
}

}  // namespace
}  // namespace sambay

// The C interface: a structure, its size as the caller knows it, the type of the tensors by token, device, stream.

extern "C" int sambay_cuda_scan_forward(const void* args, size_t size, int type, int device, void* stream) {
  return sambay::with_type<sambay::ScanForward>(args, size, type, device, [=](const auto& given, auto one) {
    return sambay::scan_forward(given, one, stream);
  });
}

extern "C" int sambay_cuda_scan_backward(const void* args, size_t size, int type, int device, void* stream) {
  return sambay::with_type<sambay::ScanBackward>(args, size, type, device, [=](const auto& given, auto one) {
    return sambay::scan_backward(given, one, stream);
  });
}

extern "C" int sambay_cuda_sum_parts(const void* args, size_t size, int type, int device, void* stream) {
  using namespace sambay;
  if (size != sizeof(SumParts) || type != kFloat32) return cudaErrorInvalidValue;
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  const auto& given = *static_cast<const SumParts*>(args);
  return launch(sum_parts_kernel, divide_up(given.size, kThreads), 1, kThreads, 0, given, stream);
}

// Whether this library's kernels can run on a device: the driver is new enough, the architecture is the device's.
extern "C" int sambay_cuda_check(int device) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, sambay::sum_parts_kernel);
}

extern "C" const char* sambay_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
