// A decoding step's convolution and scan, on the sums of a panel of a product: one row, some channels.
#pragma once

#include "decoder.h"

namespace sambay {
namespace {

// One token of the causal convolution, with SiLU; its last inputs move on. Kept: how many, if that is known.
template <typename S, int Kept, typename T = Compute<S>>
void conv_channels(const DecoderRows<S>& rows, const DecoderLayer<S>& layer, int64_t r, int64_t column, const T* sums) {
  const Decoder<S>& model = rows.model;
  const int64_t inner = model.inner, kept = Kept < 0 ? model.kept : Kept;
  const int64_t channels = std::min(kPanel<T>, inner - column);
  S* last = rows.slots.conv + ((layer.place * rows.slots.slots + rows.slot[r]) * inner + column) * kept;
  const T *weight = layer.conv_weight + column, *bias = layer.conv_bias + column;
  alignas(64) T out[kPanel<T>], taken[kPanel<T>];
  for (int64_t c = 0; c < channels; ++c) {
    taken[c] = rounded<S>(sums[c]);
    out[c] = bias[c] + taken[c] * weight[kept * inner + c];
  }
  for (int64_t k = 0; k < kept; ++k)
    for (int64_t c = 0; c < channels; ++c) out[c] += widen(last[c * kept + k]) * weight[k * inner + c];
  for (int64_t c = 0; c < channels && kept > 0; ++c) {
    for (int64_t k = 0; k + 1 < kept; ++k) last[c * kept + k] = last[c * kept + k + 1];
    last[c * kept + kept - 1] = narrow<S>(taken[c]);
  }
  S* to = rows.inner.at(r) + column;
  SAMBAY_SIMD
  for (int64_t c = 0; c < channels; ++c) to[c] = narrow<S>(out[c] * sigmoid(out[c]));
}

// One channel's states move on by a token; returns what adds up to its output, lane by lane.
template <typename S, typename T = Compute<S>>
SAMBAY_FN Vector<T> scan_channel(const DecoderRows<S>& rows, const T* decay, const T* maps, T step, T step_u,
                                 T* state) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const int64_t states = rows.model.states, padded = rows.padded_states;
  Vector<T> sum{};
  for (int64_t n = 0; n < states; n += kLanes) {
    const Vector<T> a = exp2_lanes(step * load_vector(decay + n));
    const Vector<T> h = a * load_first<Vector<T>>(state + n, states - n) + step_u * load_vector(maps + n);
    store_first(state + n, h, states - n);
    sum += h * load_vector(maps + padded + n);
  }
  return sum;
}

// One token of the scan with its time step, D and gate, for the channels of a panel of time steps.
template <typename S, typename T = Compute<S>>
void scan_channels(const DecoderRows<S>& rows, const DecoderLayer<S>& layer, int64_t r, int64_t column, const T* sums) {
  constexpr int64_t kLanes = Simd<T>::kLanes;
  const int64_t inner = rows.model.inner, states = rows.model.states;
  const int64_t channels = std::min(kPanel<T>, inner - column);
  const S *u = rows.inner.at(r) + column, *gate = rows.gate.at(r) + column;
  alignas(64) T step[kPanel<T>], step_u[kPanel<T>], y[kPanel<T>];
  SAMBAY_SIMD
  for (int64_t c = 0; c < channels; ++c) {
    step[c] = softplus(rounded<S>(sums[c]) + layer.step_bias[column + c]);
    step_u[c] = step[c] * widen(u[c]);
  }
  const int64_t place = (layer.place * rows.slots.slots + rows.slot[r]) * inner + column;
  // The next row's lie somewhere else.
  if (r + 1 < rows.count) {
    const int64_t next = (layer.place * rows.slots.slots + rows.slot[r + 1]) * inner + column;
    fetch(rows.slots.scan + next * states, channels * states);
  }
  for (int64_t c = 0; c < channels; c += kLanes) {
    Vector<T> found[kLanes] = {};
    for (int64_t i = 0; i < std::min(kLanes, channels - c); ++i)
      found[i] = scan_channel(rows, layer.decay + (column + c + i) * rows.padded_states, rows.maps.at(r), step[c + i],
                              step_u[c + i], rows.slots.scan + (place + c + i) * states);
    store_vector(y + c, sums_of_lanes<T>(found));
  }
  S *memory = rows.memory.at(r) + column, *gated = rows.gated.at(r) + column;
  SAMBAY_SIMD
  for (int64_t c = 0; c < channels; ++c) {
    memory[c] = narrow<S>(y[c] + layer.skip[column + c] * widen(u[c]));
    gated[c] = narrow<S>(swiglu_value(widen(gate[c]), widen(memory[c])));
  }
}

}  // namespace
}  // namespace sambay
