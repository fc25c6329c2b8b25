// The arithmetic of one step, shared by the CPU and the CUDA backend: what the CPU's tests prove holds for both.
// Branch-free, so that loops over channels vectorise.
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

// 2^f for f in [-1/2, 1/2], of a number or of every lane of a vector: a minimax polynomial, error 6e-8.
template <typename F>
SAMBAY_FN F exp2_polynomial(F f) {
  F p = f * 0.00015353361959569156f + 0.0013398875016719103f;
  p = p * f + 0.00961843691766262f;
  p = p * f + 0.055503323674201965f;
  p = p * f + 0.24022647738456726f;
  p = p * f + 0.6931471824645996f;
  return p * f + 1.f;
}

constexpr float kExp2Shift = 12582912.f;  // 1.5 * 2^23: the low mantissa bits of x + this hold the nearest integer

// 2^x for float. On a GPU by its own unit: 2 units in the last place, denormal results are 0. On CPU: error 6e-8.
// Exact at 0 (a step with delta = 0 leaves the state as it is); 0 below 2^-126,
// infinite from 2^128, NaN for NaN. x = n + f with n the nearest integer: 2^f by a minimax polynomial, 2^n by adding n
// to the exponent bits.
SAMBAY_FN float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#else
  const float clipped = x > 128.f ? 128.f : x;
  const float bounded = clipped < -126.f ? -126.f : clipped;
  const float shifted = bounded + kExp2Shift;
  const float p = exp2_polynomial(bounded - (shifted - kExp2Shift));
  uint32_t n, bits;
  std::memcpy(&n, &shifted, 4);
  std::memcpy(&bits, &p, 4);
  bits += n << 23;
  float result;
  std::memcpy(&result, &bits, 4);
  return x < -126.f ? 0.f : result;
#endif
}

SAMBAY_FN double exp2_of(double x) { return std::exp2(x); }

template <typename T>
SAMBAY_FN T exp_of(T x) {
  return exp2_of(x * T(kLog2E));
}

// x / y. On a GPU without the branches of full precision: 2 units in the last place, 0 for y from 2^126 on.
SAMBAY_FN float divide(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

SAMBAY_FN double divide(double x, double y) { return x / y; }

// log(1 + y) for y in [0, 1], with small relative error down to y -> 0: 2 atanh(y / (2 + y)).
SAMBAY_FN float log1p_of(float y) {
  const float s = divide(y, 2.f + y);
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
  return divide(T(1), T(1) + exp_of(-x));
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

// silu(gate) * value: the gate of a GMU, of an MLP, and of the scan's output.
template <typename T>
SAMBAY_FN T swiglu_value(T gate, T value) {
  return gate * sigmoid(gate) * value;
}

template <typename T>
struct SwigluGrads {
  T gate, value;
};

template <typename T>
SAMBAY_FN SwigluGrads<T> swiglu_backward_value(T grad, T gate, T value) {
  const T s = sigmoid(gate);
  return {grad * value * silu_slope(gate, s), grad * gate * s};
}

// exp(delta A), given A log2(e).
template <typename T>
SAMBAY_FN T decay_of(T delta, T a2) {
  return exp2_of(delta * a2);
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

// One token of one channel: the gradients of u and of the stored delta (which is the bias's too) from those of delta u,
// of delta by way of the exponents, and of y. slope = d delta' / d delta.
template <typename T>
struct TokenGrads {
  T u, delta;
};

template <typename T>
SAMBAY_FN TokenGrads<T> token_backward(T grad_delta_u, T grad_delta, T grad_y, T u, T delta, T slope, T skip) {
  return {grad_delta_u * delta + grad_y * skip, (grad_delta + grad_delta_u * u) * slope};
}

}  // namespace sambay
