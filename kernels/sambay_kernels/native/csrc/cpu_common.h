// What the sources of the CPU backend share.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace sambay {
namespace {

constexpr int64_t kSmall = 1 << 15;  // elements below which threads cost more than they give

#define SAMBAY_SIMD _Pragma("omp simd")

// Denormal numbers are flushed to zero inside a task: a decaying state meets them and they are a hundred times slower.
struct FlushDenormals {
#if defined(__SSE__)
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

}  // namespace
}  // namespace sambay
