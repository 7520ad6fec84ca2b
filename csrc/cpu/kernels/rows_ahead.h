// Rows of the caller's tensors that will be touched soon, asked for a few cache lines at a time between the tiles of products.
//
// One head's rows are a few hundred bytes, several kilobytes apart: no hardware prefetcher follows them, and with a page for each
// row the address alone takes time to translate. Products touch no memory beyond the caches, so the wait hides behind them.
#pragma once

#include <cstdint>

#include "simd.h"

namespace comp_kernels::COMP_KERNELS_ISA {

class RowsAhead {
 public:
  RowsAhead() { clear(); }

  // Forgets what was not asked for yet.
  void clear() {
    count_ = current_ = 0;
    lines_ = rounds_ = 0;
    close();
  }

  // Appends `rows` rows, `stride_bytes` apart. At most kMostRanges calls after clear().
  void add(const void* first_row, int64_t row_bytes, int64_t stride_bytes, int64_t rows) {
    if (rows <= 0) return;
    const int64_t lines = (row_bytes + kLine - 1) / kLine;
    ranges_[count_++] = {static_cast<const char*>(first_row), lines, 0, stride_bytes, rows};
    lines_ += lines * rows;
    close();
  }

  // All of it is asked for within the next `steps` calls of step().
  void spread(int64_t steps) {
    const int64_t lines = (steps > 1 ? steps : 1) * kLinesPerRound;
    rounds_ = (lines_ + lines - 1) / lines;
  }

  // A fixed number of lines without a branch: after the end of a tile's loop the processor has just mispredicted one.
  CK_INLINE void step() {
    for (int64_t round = 0; round < rounds_; ++round) {
      Range range = ranges_[current_];
#pragma GCC unroll 8
      for (int i = 0; i < kLinesPerRound; ++i) {
        __builtin_prefetch(range.row + range.line * kLine);
        ++range.line;
        const bool row_ends = range.line == range.lines;
        range.line = row_ends ? 0 : range.line;
        range.row += row_ends ? range.stride_bytes : 0;
        range.rows -= row_ends;
      }
      ranges_[current_] = range;
      if (range.rows <= 0) ++current_;
    }
  }

 private:
  struct Range {
    const char* row;
    int64_t lines, line;  // per row; the next one
    int64_t stride_bytes, rows;
  };
  static constexpr int kMostRanges = 9, kLinesPerRound = 4;
  static constexpr int64_t kLine = 64;

  // The last range never ends: it asks for a line that is there already.
  void close() { ranges_[count_] = {reinterpret_cast<const char*>(this), 1, 0, 0, int64_t{1} << 60}; }

  Range ranges_[kMostRanges + 1];
  int count_, current_;
  int64_t lines_, rounds_;
};

}  // namespace comp_kernels::COMP_KERNELS_ISA
