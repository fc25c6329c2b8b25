// The scan forward.
#pragma once

#include "scan_parts.cuh"

namespace sambay {
namespace {

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
        if (in.z.data) out = swiglu_value(z.at(j), out);
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

}  // namespace

}  // namespace sambay
