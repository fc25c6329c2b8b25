// Products of bfloat16 by a processor's matrix unit (Intel AMX): 16 rows, 16 outputs and 32 terms at once.
//
// The kernel lends it to a process that asks. Every thread sets its tiles before it uses them, and hands them back as
// it found them: other libraries in the process use them too.
#pragma once

#include <cstdint>

#include "compute_type.h"

#if defined(__AMX_BF16__) && defined(__AVX512F__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define SAMBAY_AMX

namespace sambay {
namespace {

constexpr int64_t kAmxRows = 16, kAmxTerms = 32;

inline bool amx_is_ours() {
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
}

struct alignas(64) AmxTiles {
  uint8_t palette = 0, first_row = 0, unused[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles for products of up to so many rows; none for 0. 0 to 3: sums; 4 and 5: rows; 6 and 7: outputs.
class AmxScope {
 public:
  explicit AmxScope(int64_t rows) : used(rows > 0 && amx_is_ours()) {
    if (!used) return;
    _tile_storeconfig(&found);
    AmxTiles wanted;
    wanted.palette = 1;
    for (int tile = 0; tile < 8; ++tile) {
      wanted.row_bytes[tile] = 64;
      wanted.rows[tile] = static_cast<uint8_t>(tile < 6 && rows < kAmxRows ? rows : kAmxRows);
    }
    _tile_loadconfig(&wanted);
  }
  ~AmxScope() {
    if (!used) return;
    if (found.palette)
      _tile_loadconfig(&found);
    else
      _tile_release();
  }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;

 private:
  const bool used;
  AmxTiles found;
};

// Sums of 16 rows (32 if Two), `row` elements apart, for a panel of 32 outputs whose terms lie in pairs.
template <bool Two>
void amx_sums(const BFloat16* x, int64_t row, const BFloat16* panel, int64_t terms, float (*out)[32]) {
  const int64_t row_bytes = row * 2;
  const BFloat16* more = x + kAmxRows * row;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (Two) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < terms; k += kAmxTerms, panel += 32 * kAmxTerms) {
    _tile_loadd(4, x + k, row_bytes);
    _tile_loadd(6, panel, 128);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, panel + 32, 128);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Two) {
      _tile_loadd(5, more + k, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out[0], 128);
  _tile_stored(1, out[0] + 16, 128);
  if constexpr (Two) {
    _tile_stored(2, out[16], 128);
    _tile_stored(3, out[16] + 16, 128);
  }
}

}  // namespace
}  // namespace sambay

#else

namespace sambay {
namespace {

struct AmxScope {
  explicit AmxScope(int64_t) {}
  ~AmxScope() {}
};

}  // namespace
}  // namespace sambay

#endif
