// Products on AMX: C (+)= A B with tiles of 16 rows of 64 bytes, 16 x 16 numbers of C, 16 x 16 pairs (pairs.h) of A or B.
//
// Only the sets that are compiled with COMP_KERNELS_TILES, bf16 or fp16, have them. Operands are what the vector products read
// (matmul.h), but whole tiles: the depth is a multiple of kDepthStep elements, filled up with zeros, and rows of A and C up to the
// next multiple of 16 are memory that may be read and overwritten.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu/simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {

#ifdef COMP_KERNELS_TILES

// TILE_PRODUCT(c, a, b): C += A B in tile registers of these numbers. Few compilers know TDPFP16PS: VEX.128.F2.0F38.W0 5C /r.
#define TILE_PRODUCT_bf16 _tile_dpbf16ps
#ifndef TILE_PRODUCT_fp16
#define TILE_PRODUCT_fp16(c, a, b) \
  asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" ::"i"((~(b) & 0xf) << 3 | 3), "i"(0xc0 | (c) << 3 | (a)))
#endif
#define TILE_PRODUCT_OF(kind) TILE_PRODUCT_##kind
#define TILE_PRODUCT_OF_MACRO(kind) TILE_PRODUCT_OF(kind)
#define TILE_PRODUCT TILE_PRODUCT_OF_MACRO(COMP_KERNELS_TILES)

constexpr bool kTiles = true;
constexpr int64_t kTile = 16;  // rows of a tile, and numbers or pairs in a row of it
constexpr int64_t kDepthStep = kTile;  // elements of the depth that one instruction multiplies

// The calling thread's tile registers, all of full size, while this lives. Other code on the thread (oneDNN) sets its own.
class TileRegisters {
 public:
  TileRegisters() {
    struct alignas(64) Configuration {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } configuration;
    for (int tile = 0; tile < 8; ++tile) configuration.row_bytes[tile] = 64, configuration.rows[tile] = kTile;
    asm volatile("" ::"m"(configuration));  // to GCC _tile_loadconfig reads eight bytes, and the stores of all others are dropped
    _tile_loadconfig(&configuration);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// For step i of a loop without products that may take longer than half a microsecond: so long after its last product the unit that
// multiplies tiles falls asleep, and it takes a quarter of one to wake. Now and then a product of whatever the registers hold keeps it
// awake. With terms, whose blocks are large, that gains nothing.
CK_INLINE void keep_tiles_awake(int64_t i, int64_t every = 8) {
  if (kTerms == 1 && i % every == 0) TILE_PRODUCT(0, 4, 6);
}

// 2 x 2 tiles of C, of which registers 0 to 3 hold the sums.
CK_INLINE void store_four_tiles(float* c, int64_t c_stride) {
  const int64_t bytes = c_stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kTile, bytes);
  _tile_stored(2, c + kTile * c_stride, bytes);
  _tile_stored(3, c + kTile * c_stride + kTile, bytes);
}

// What is multiplied: a term of A (terms.h) and one of B. Of three terms six products count: what is left out is 2^-22 of |a b| at
// most, of either sign. Each shares an operand with the one before, and the largest comes last.
struct TermsMultiplied {
  int a, b;
};
#ifdef COMP_KERNELS_TERMS
constexpr TermsMultiplied kMultiplied[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 2}, {0, 0}};
#else
constexpr TermsMultiplied kMultiplied[] = {{0, 0}};
#endif
constexpr int kProducts = sizeof(kMultiplied) / sizeof(TermsMultiplied);

// Operands of a product on tiles. Terms of A lie a kTerms-th of its stride apart, terms of B b_term, its next kTile columns
// b_column. From a_tail and b_tail on, `tail` more elements of the depth have their terms side by side, in kMultiplied's order.
struct TileOperands {
  const float* a;
  int64_t a_stride;
  const float* b;
  int64_t b_stride, b_term, b_column;
  int64_t tail = 0, a_tail = 0, b_tail = 0;
};

// C tiles kRows x kColumns, at most 2 x 2 of them: tile registers 0 to 3 hold C, 4 and 5 A, 6 and 7 B, so that each tile loaded
// serves two products.
//
// Four tiles of C are not stored but left in their registers, for the next call to store among its products: a store takes as long
// as a product and goes beside it, but four in a row hold everything up that is behind them. `waiting` is where the block before is
// to go (null: nowhere); returns where this one is.
template <int kRows, int kColumns, bool kAccumulate>
float* multiply_tiles(int64_t depth, const TileOperands& x, float* c, int64_t c_stride, float* waiting) {
  constexpr int64_t kBytes = sizeof(float);
  constexpr bool kFour = kRows == 2 && kColumns == 2;
  const int64_t a_bytes = x.a_stride * kBytes, b_bytes = x.b_stride * kBytes, c_bytes = c_stride * kBytes;
  if (!kFour && waiting != nullptr) store_four_tiles(waiting, c_stride);
// A sum begins: with C, or with zero; what the register still holds goes first.
#define BEGIN_SUM(tile, offset)                                                       \
  if (begin) {                                                                        \
    if (kFour && waiting != nullptr) _tile_stored(tile, waiting + (offset), c_bytes); \
    if constexpr (kAccumulate) {                                                      \
      _tile_loadd(tile, c + (offset), c_bytes);                                       \
    } else {                                                                          \
      _tile_zero(tile);                                                               \
    }                                                                                 \
  }
  // One step of the depth; the tiles of A or B may be there already.
  const auto multiply = [&](const float* a, const float* b, bool load_a, bool load_b, bool begin) __attribute__((always_inline)) {
    if (load_b) _tile_loadd(6, b, b_bytes);
    if (load_a) _tile_loadd(4, a, a_bytes);
    BEGIN_SUM(0, 0)
    TILE_PRODUCT(0, 4, 6);
    if constexpr (kColumns > 1) {
      if (load_b) _tile_loadd(7, b + x.b_column, b_bytes);
      BEGIN_SUM(1, kTile)
      TILE_PRODUCT(1, 4, 7);
    }
    if constexpr (kRows > 1) {
      if (load_a) _tile_loadd(5, a + kTile * x.a_stride, a_bytes);
      BEGIN_SUM(2, kTile * c_stride)
      TILE_PRODUCT(2, 5, 6);
    }
    if constexpr (kFour) {
      BEGIN_SUM(3, kTile * c_stride + kTile)
      TILE_PRODUCT(3, 5, 7);
    }
  };
#undef BEGIN_SUM
  for (int64_t k = 0; k < depth; k += kDepthStep) {
#pragma GCC unroll 8
    for (int n = 0; n < kProducts; ++n) {
      const bool other_a = n == 0 || kMultiplied[n].a != kMultiplied[n - 1].a;
      const bool other_b = n == 0 || kMultiplied[n].b != kMultiplied[n - 1].b;
      const float *a = x.a + kMultiplied[n].a * (x.a_stride / kTerms) + k, *b = x.b + kMultiplied[n].b * x.b_term + k * x.b_stride;
      multiply(a, b, other_a, other_b, k == 0 && n == 0);
    }
  }
  if constexpr (kTerms > 1) {
    for (int64_t k = 0; k < x.tail; k += kDepthStep) {
      multiply(x.a + x.a_tail + k, x.b + x.b_tail + k * x.b_stride, true, true, false);
    }
  }
  if constexpr (kFour) return c;
  _tile_stored(0, c, c_bytes);
  if constexpr (kColumns > 1) _tile_stored(1, c + kTile, c_bytes);
  if constexpr (kRows > 1) _tile_stored(2, c + kTile * c_stride, c_bytes);
  return nullptr;
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns].
template <bool kAccumulate>
void product_on_tiles(int64_t rows, int64_t columns, int64_t depth, const TileOperands& operands, float* c, int64_t c_stride) {
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  float* waiting = nullptr;
  TileOperands x = operands;
  for (int64_t n = 0; n < columns; n += 2 * kTile, x.b += 2 * x.b_column) {
    for (int64_t m = 0; m < rows; m += 2 * kTile) {
      const auto of_rows = [&](auto multiply_two, auto multiply_one) { return m + kTile < rows ? multiply_two : multiply_one; };
      const auto multiply = n + kTile < columns ? of_rows(multiply_tiles<2, 2, kAccumulate>, multiply_tiles<1, 2, kAccumulate>)
                                                : of_rows(multiply_tiles<2, 1, kAccumulate>, multiply_tiles<1, 1, kAccumulate>);
      x.a = operands.a + m * x.a_stride;
      waiting = multiply(depth, x, c + m * c_stride + n, c_stride, waiting);
    }
  }
  if (waiting != nullptr) store_four_tiles(waiting, c_stride);
  asm volatile("" ::: "memory");
}

#else

constexpr bool kTiles = false;
constexpr int kProducts = 1;
constexpr int64_t kDepthStep = 1;

struct TileRegisters {};

CK_INLINE void keep_tiles_awake(int64_t, int64_t = 8) {}

#endif

}  // namespace comp_kernels::COMP_KERNELS_ISA
