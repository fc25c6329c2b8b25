// The arithmetic of one step, shared by every compiled backend. Branch-free, so that loops over channels vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SAMBAY_FN __host__ __device__ __forceinline__
#else
#define SAMBAY_FN inline __attribute__((always_inline))
#endif

namespace sambay {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kSoftplusThreshold = 20.0;

// 2^x for float, relative error 6e-8. Exact at 0 (a step with delta = 0 leaves the state as it is); 0 below 2^-126,
// infinite from 2^128, NaN for NaN. x = n + f with n the nearest integer: 2^f by a minimax polynomial, 2^n by adding n
// to the exponent bits.
SAMBAY_FN float exp2_of(float x) {
  const float clipped = x > 128.f ? 128.f : x;
  const float bounded = clipped < -126.f ? -126.f : clipped;
  const float shifted = bounded + 12582912.f;  // 1.5 * 2^23: the low mantissa bits now hold n
  const float f = bounded - (shifted - 12582912.f);
  float p = 0.00015353361959569156f;
  p = p * f + 0.0013398875016719103f;
  p = p * f + 0.00961843691766262f;
  p = p * f + 0.055503323674201965f;
  p = p * f + 0.24022647738456726f;
  p = p * f + 0.6931471824645996f;
  p = p * f + 1.f;
  uint32_t n, bits;
  std::memcpy(&n, &shifted, 4);
  std::memcpy(&bits, &p, 4);
  bits += n << 23;
  float result;
  std::memcpy(&result, &bits, 4);
  return x < -126.f ? 0.f : result;
}

SAMBAY_FN double exp2_of(double x) { return std::exp2(x); }

template <typename T>
SAMBAY_FN T exp_of(T x) {
  return exp2_of(x * T(kLog2E));
}

// log(1 + y) for y in [0, 1], with small relative error down to y -> 0: 2 atanh(y / (2 + y)).
SAMBAY_FN float log1p_of(float y) {
  const float s = y / (2.f + y);
  const float q = s * s;
  float p = 0.1408916711807251f;
  p = p * q + 0.13980300724506378f;
  p = p * q + 0.20012454688549042f;
  p = p * q + 0.3333315849304199f;
  p = p * q + 1.f;
  return 2.f * s * p;
}

SAMBAY_FN double log1p_of(double y) { return std::log1p(y); }

template <typename T>
SAMBAY_FN T softplus(T x) {
  const T magnitude = x < T(0) ? -x : x;
  const T positive = x < T(0) ? T(0) : x;
  const T soft = positive + log1p_of(exp_of(-magnitude));
  return x > T(kSoftplusThreshold) ? x : soft;
}

template <typename T>
SAMBAY_FN T sigmoid(T x) {
  return T(1) / (T(1) + exp_of(-x));
}

// d softplus / dx.
template <typename T>
SAMBAY_FN T softplus_slope(T x) {
  return x > T(kSoftplusThreshold) ? T(1) : sigmoid(x);
}

// d silu / dx, given s = sigmoid(x).
template <typename T>
SAMBAY_FN T silu_slope(T x, T s) {
  return s * (T(1) + x * (T(1) - s));
}

// h' = a h + (delta u) B.
template <typename T>
SAMBAY_FN T scan_step(T h, T a, T delta_u, T b) {
  return a * h + delta_u * b;
}

// One state of one channel in the backward sweep: gradients that leave step t, and the one that goes on to step t - 1.
template <typename T>
struct ScanGrads {
  T b, c, delta_u, decay;  // of B, C, delta u; decay = gradient of the exponent delta A
  T h;                     // of the state before the step
};

template <typename T>
SAMBAY_FN ScanGrads<T> scan_step_backward(T grad_h_next, T grad_y, T a, T h_before, T h, T delta_u, T b, T c) {
  const T grad_h = grad_h_next + grad_y * c;
  ScanGrads<T> out;
  out.b = grad_h * delta_u;
  out.c = grad_y * h;
  out.delta_u = grad_h * b;
  out.h = grad_h * a;
  out.decay = out.h * h_before;
  return out;
}

}  // namespace sambay
