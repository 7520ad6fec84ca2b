// Rows of the caller's tensors that will be touched soon, asked for one at a time while the tiles of products are computed, or in
// the loops that touch them.
//
// One head's rows are a few hundred bytes, several kilobytes apart: no hardware prefetcher follows them, and with a page for each
// row the address alone takes time to translate. Products touch no memory beyond the caches, so the wait hides behind them.
#pragma once

#include <cstdint>

#include "common/cpu/isa.h"
#include "common/cpu/simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {

// Who asks: tiles; loops only with AVX-512 in float32 and float64, and with AMX, where it gains. On Intel processors with AVX-512 a
// tile that asks waits until the row is there: 200 ns for one of five lines, a sixth of the time of all products, where a loop that
// only touches rows, many at a time, needs 17 ns for each. There loops alone ask, as with AMX; on Zen 5 both.
#if defined(__AVX512F__) && (!defined(COMP_KERNELS_PAIRS) || defined(COMP_KERNELS_TILES))
constexpr bool kLoopsAsk = true;
#else
constexpr bool kLoopsAsk = false;
#endif
#ifdef COMP_KERNELS_TILES
constexpr bool kTilesAsk = false;
#else
constexpr bool kTilesAsk = true;
#endif
CK_INLINE bool tiles_ask() { return kTilesAsk && (!kLoopsAsk || !tiles_wait_for_prefetches); }

enum class Rows { read, written };

// Before row i of `count`, which is at `row`, is read or written: asks for one some rows on; before the first, for all up to it. The
// loop may end before `count` and go on later, with the next block of an item. Rows come to the second-level cache: in the first,
// rows that are a power of two apart would drive each other out. With AMX those that are read come to the first: 16-bit rows are
// half as long, and 1 to 5 % are gained; those that are written, too, would lose more. `at_least` so many rows on, where they are
// not read one by one.
template <Rows kRows = Rows::read, typename S>
CK_INLINE void ask_ahead(const S* row, int64_t stride, int64_t i, int64_t count, int64_t columns, int64_t at_least = 0) {
  if constexpr (!kLoopsAsk) return;
  constexpr int kLocality = kRows == Rows::written || kTilesAsk ? 2 : 3;
  const auto ask = [&](int64_t n) __attribute__((always_inline)) {
    const char* ahead = reinterpret_cast<const char*>(row + n * stride);
    for (int64_t byte = 0; byte < columns * static_cast<int64_t>(sizeof(S)); byte += 64) {
      __builtin_prefetch(ahead + byte, /*rw=*/0, kLocality);
    }
  };
  const int64_t wanted = kTilesAsk && tiles_wait_for_prefetches ? 8 : 16, rows_ahead = wanted > at_least ? wanted : at_least;
  if (i == 0) {
    for (int64_t n = 1; n < min(rows_ahead, count); ++n) ask(n);
  }
  if (i + rows_ahead < count) ask(rows_ahead);
}

class RowsAhead {
 public:
  RowsAhead() { plan(0); }

  // Forgets what was not asked for yet, and takes rows of `row_bytes` from now on.
  void plan(int64_t row_bytes) {
    lines_ = (row_bytes + kLine - 1) / kLine;
    for (int64_t i = 0; i < 4; ++i) tail_[i] = min(4 + i, lines_ - 1) * kLine;
    count_ = current_ = 0;
    rows_ = rounds_ = 0;
    close();
  }

  // Appends `rows` rows, `stride_bytes` apart. At most kMostRanges calls after plan().
  void add(const void* first_row, int64_t stride_bytes, int64_t rows) {
    if (rows <= 0) return;
    ranges_[count_++] = {static_cast<const char*>(first_row), stride_bytes, rows};
    rows_ += rows;
    close();
  }

  // All rows are asked for within the next `steps` calls of step().
  void spread(int64_t steps) {
    steps = steps > 1 ? steps : 1;
    rounds_ = (rows_ + steps - 1) / steps;
  }

  // A row. Every branch goes the same way throughout a plan, so none is mispredicted. Of more than eight lines the first eight:
  // from there the hardware's prefetcher follows.
  CK_INLINE void step() {
    for (int64_t round = 0; round < rounds_; ++round) {
      Range& range = ranges_[current_];
      const char* row = range.row;
      __builtin_prefetch(row);
      __builtin_prefetch(row + kLine);
      if (lines_ > 2) {
        __builtin_prefetch(row + 2 * kLine);
        __builtin_prefetch(row + 3 * kLine);
      }
      if (lines_ > 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) __builtin_prefetch(row + tail_[i]);
      }
      range.row = row + range.stride_bytes;
      current_ += --range.rows == 0;
    }
  }

 private:
  struct Range {
    const char* row;
    int64_t stride_bytes, rows;
  };
  static constexpr int kMostRanges = 9;
  static constexpr int64_t kLine = 64;

  // The last range never ends: it asks for lines that are there already.
  void close() { ranges_[count_] = {reinterpret_cast<const char*>(this), 0, int64_t{1} << 60}; }

  Range ranges_[kMostRanges + 1];
  int64_t count_, current_;
  int64_t lines_, tail_[4];  // lines of a row; where the fifth to eighth begin, or once more the last
  int64_t rows_, rounds_;
};

}  // namespace comp_kernels::COMP_KERNELS_ISA
