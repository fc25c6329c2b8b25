// The type of a tensor in memory and the one of its arithmetic: bfloat16 is widened as it is read, rounded as it is
// written, and nothing between is in it.
#pragma once

#include <cstdint>
#include <cstring>

namespace sambay {

struct BFloat16 {
  uint16_t bits;
};

template <typename S>
struct ComputeOf {
  using Type = S;
};
template <>
struct ComputeOf<BFloat16> {
  using Type = float;
};
template <typename S>
using Compute = typename ComputeOf<S>::Type;

template <typename S>
inline __attribute__((always_inline)) Compute<S> widen(S x) {
  return x;
}

template <>
inline __attribute__((always_inline)) float widen(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

template <typename S>
inline __attribute__((always_inline)) S narrow(Compute<S> x) {
  return x;
}

// To the nearest, ties to even, NaN stays one: torch's rounding. Without a branch, so that loops vectorise.
template <>
inline __attribute__((always_inline)) BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

}  // namespace sambay
