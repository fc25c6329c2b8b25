// The scan backward.
#pragma once

#include "scan_parts.cuh"

namespace sambay {
namespace {

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
        const float grad_y = in.z.data ? swiglu_value(z.at(j), up_now.at(j)) : up_now.at(j);
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

inline size_t backward_shared(int64_t slabs, int tokens) {
  return sizeof(float) * (kStateFloats + kStepFloats + tokens * kWarps * 2 * slabs * kStates) + maps_shared(slabs);
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
    const SwigluGrads<float> out = swiglu_backward_value(up, token.z.at(0), lane.over_slabs(y) + skip * x);
    if (lane.writes) args.z[place] = from_float<T>(out.gate);
    return out.value;
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

}  // namespace

}  // namespace sambay
