// Stand-ins in plain AVX-512 for the instructions that multiply 16-bit numbers, AVX512_BF16 and AMX, so that kernels which use them run,
// slowly, on processors without: `-include` this file and leave -mavx512bf16 and -mamx-* out.
//
// They round as Intel's Software Developer's Manual writes the operations down, VDPBF16PS, TDPBF16PS, TDPFP16PS and VCVTNEPS2BF16: to
// nearest, even on a tie, denormal numbers (but for float16's) zero before and after each step, in the manual's order of the steps. What differs: a step whose
// result rounds up to the smallest normal number may become zero or stay, as the rounding of denormal numbers has it; which of
// several NaN comes through is not said; the rounding mode is the thread's own, which nothing here changes.
//
// Stricter than the processor: tiles must be configured, and all of them at full size, or the program ends.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace software_pairs {

// Functions that are called and not inlined: kernels unroll their products, and what is here would be repeated hundreds of times.
#define SOFTWARE_FUNCTION inline __attribute__((noinline))

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

// Denormal numbers become zeros of their sign.
inline Bits flush(Bits x) { return (x & 0x7f800000) != 0 ? x : x & INT32_MIN; }
inline Floats flush(Floats x) { return (Floats)flush((Bits)x); }

// The lower or the upper number of each pair of bfloat16 or, with its name, float16.
struct Bfloat16 {
  static Floats lower(Bits pairs) { return (Floats)flush(pairs << 16); }
  static Floats upper(Bits pairs) { return (Floats)flush(pairs & -0x10000); }
};
struct Float16 {
  static Floats lower(Bits pairs) { return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)pairs)); }
  static Floats upper(Bits pairs) { return (Floats)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)(pairs >> 16))); }
};

inline Floats multiply_add(Floats x, Floats y, Floats sum) {
  return flush((Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)flush(sum)));
}
inline Floats add(Floats x, Floats y) { return flush(flush(x) + flush(y)); }

// VDPBF16PS: the upper product is added first, each in one rounding.
SOFTWARE_FUNCTION __m512 dot_product(__m512 sum, __m512i x, __m512i y) {
  const Bits a = (Bits)x, b = (Bits)y;
  using T = Bfloat16;
  return (__m512)multiply_add(T::lower(a), T::lower(b), multiply_add(T::upper(a), T::upper(b), (Floats)sum));
}

// VCVTNEPS2BF16.
SOFTWARE_FUNCTION __m256i narrow(__m512 x) {
  const Bits bits = flush((Bits)x), rounded = bits + 0x7fff + (bits >> 16 & 1), quiet = bits | 0x400000;
  const Bits is_nan = (bits & INT32_MAX) > 0x7f800000;
  return (__m256i) __builtin_convertvector((is_nan ? quiet : rounded) >> 16, Halves);
}

// VCVTNE2PS2BF16: the second operand becomes the lower half.
SOFTWARE_FUNCTION __m512i narrow(__m512 high, __m512 low) {
  const __m256i halves[2] = {narrow(low), narrow(high)};
  __m512i both;
  std::memcpy(&both, halves, sizeof both);
  return both;
}

#undef _mm512_dpbf16_ps
#undef _mm512_cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _mm512_dpbf16_ps(sum, x, y) ::software_pairs::dot_product((__m512)(sum), (__m512i)(x), (__m512i)(y))
#define _mm512_cvtneps_pbh(x) ((__m256bh)::software_pairs::narrow((__m512)(x)))
#define _mm512_cvtne2ps_pbh(high, low) ((__m512bh)::software_pairs::narrow((__m512)(high), (__m512)(low)))

// --- tiles ---------------------------------------------------------------------------------------------------------------

constexpr int kRows = 16;  // of a tile, 64 bytes each

struct TileState {
  bool configured;
  alignas(64) uint8_t bytes[8][kRows][64];
};
inline thread_local TileState state;

inline void require(bool condition, const char* message) {
  if (condition) return;
  std::fprintf(stderr, "software_pairs: %s\n", message);
  std::abort();
}

inline uint8_t (&tile(int index))[kRows][64] {
  require(state.configured, "a tile is used that is not configured");
  return state.bytes[index];
}

// LDTILECFG: byte 0 the palette, 16-bit lengths of rows from byte 16 on, numbers of rows from byte 48 on, of sixteen tiles.
SOFTWARE_FUNCTION void configure(const void* configuration) {
  uint8_t expected[64] = {1};
  for (int index = 0; index < 8; ++index) expected[16 + 2 * index] = 64, expected[48 + index] = kRows;
  require(std::memcmp(configuration, expected, sizeof expected) == 0, "only eight tiles of full size are supported");
  std::memset(&state, 0, sizeof state);
  state.configured = true;
}

SOFTWARE_FUNCTION void release() { state.configured = false; }

SOFTWARE_FUNCTION void zero(int index) { std::memset(tile(index), 0, sizeof state.bytes[index]); }

SOFTWARE_FUNCTION void load(int index, const void* memory, int64_t stride) {
  auto& rows = tile(index);
  for (int m = 0; m < kRows; ++m) std::memcpy(rows[m], static_cast<const char*>(memory) + m * stride, 64);
}

SOFTWARE_FUNCTION void store(int index, void* memory, int64_t stride) {
  auto& rows = tile(index);
  for (int m = 0; m < kRows; ++m) std::memcpy(static_cast<char*>(memory) + m * stride, rows[m], 64);
}

// TDPBF16PS, TDPFP16PS: sums of the lower and of the upper products apart, from zero, then their sum is added to c.
template <typename T>
SOFTWARE_FUNCTION void multiply_tiles(int c, int a, int b) {
  auto &sums = tile(c), &left = tile(a), &right = tile(b);
  for (int m = 0; m < kRows; ++m) {
    Floats lower_sum{}, upper_sum{}, sum;
    for (int k = 0; k < kRows; ++k) {
      int32_t pair;
      Bits y;
      std::memcpy(&pair, left[m] + 4 * k, sizeof pair);
      std::memcpy(&y, right[k], sizeof y);
      const Bits x = Bits{} + pair;
      lower_sum = multiply_add(T::lower(x), T::lower(y), lower_sum);
      upper_sum = multiply_add(T::upper(x), T::upper(y), upper_sum);
    }
    std::memcpy(&sum, sums[m], sizeof sum);
    sum = add(sum, add(lower_sum, upper_sum));
    std::memcpy(sums[m], &sum, sizeof sum);
  }
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::software_pairs::configure
#define _tile_release ::software_pairs::release
#define _tile_zero ::software_pairs::zero
#define _tile_loadd ::software_pairs::load
#define _tile_stored ::software_pairs::store
#define _tile_dpbf16ps ::software_pairs::multiply_tiles<::software_pairs::Bfloat16>
#define TILE_PRODUCT_fp16 ::software_pairs::multiply_tiles<::software_pairs::Float16>

}  // namespace software_pairs
