// Between the passes over segments: states at the cuts. And after them: sums of partial sums.
#pragma once

#include "scan_parts.cuh"

namespace sambay {

struct SumParts {
  int64_t count, size;
  const float* parts;  // (count, size)
  float* sum;          // (size,)
};

namespace {

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

// Sum over the first dimension, one term after another: the bits depend on nothing else.
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(SumParts args) {
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= args.size) return;
  float sum = 0.f;
#pragma unroll 8
  for (int64_t part = 0; part < args.count; ++part) sum += args.parts[part * args.size + place];
  args.sum[place] = sum;
}

}  // namespace

}  // namespace sambay
