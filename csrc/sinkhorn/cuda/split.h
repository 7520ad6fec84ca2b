// How a problem is split over the blocks of the resident kernel: a model of its time, in nanoseconds on an H200, chooses.
//
// The model is arithmetic from the bandwidths, rates and latencies below; nothing in it was fitted. Another device has other
// numbers, but the order of the splits changes little: it is what an item's bytes, its exponentials and its barriers weigh.
#pragma once

#include <algorithm>
#include <cstdint>

#include "resident.h"

namespace comp_kernels {

struct Split {
  int lanes, team, teams, tiles, resident_steps, more_resident;  // the last two of the largest block, see ResidentParams
  int64_t shared_bytes, score_bytes;  // of a block, and of them scores
  bool merge_all;
  double nanoseconds;  // of a call, by the model; 0: the kernel does not serve the problem
};

struct Problem {
  int64_t items, rows, cols, iterations;
  int vec, bytes;  // scores per access, bytes per score
};

namespace split_model {

constexpr double kMemory = 4300, kCache = 5500, kOneBlock = 50;  // bytes per nanosecond: HBM and L2 of all, of L2 one SM
constexpr double kCacheBytes = 40e6;  // of the scores that the L2 still holds when they are read again
constexpr double kExponentials = 28;  // per nanosecond and SM: 16 per cycle
constexpr double kBarrier = 1500, kTile = 250, kLaunch = 5000;  // of blocks; of the block's threads, twice a tile; of a call
constexpr int64_t kMergedByAll = 16384;  // pairs of a row and a block up to which every block reads all of them
constexpr int64_t kMostRows = 8192;      // u and sums of a row take 8 bytes of shared memory

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The split with `lanes` threads per row and at most `most` blocks per item.
inline Split split_with(const Problem& p, const Device& device, int lanes, int64_t most) {
  Split split{};
  const int64_t tile = lanes * p.vec, step = kResidentThreads / lanes, padded = ceil_div(p.rows, step) * step;
  const int64_t tiles = ceil_div(p.cols, tile), per_block = ceil_div(tiles, std::min(most, tiles));
  const int64_t team = ceil_div(tiles, per_block), teams = std::min<int64_t>(p.items, device.multiprocessors / team);
  const int64_t fixed = ResidentShared(static_cast<int>(padded)).scores;
  if (fixed > device.shared_bytes) return split;
  const int64_t step_bytes = kResidentThreads * p.vec * p.bytes;
  const int64_t steps = std::min(padded / step * per_block, (device.shared_bytes - fixed) / step_bytes);  // of all its tiles
  split.lanes = lanes, split.team = static_cast<int>(team), split.teams = static_cast<int>(teams);
  split.tiles = static_cast<int>(tiles);
  split.resident_steps = static_cast<int>(steps / per_block), split.more_resident = static_cast<int>(steps % per_block);
  split.score_bytes = steps * step_bytes, split.shared_bytes = fixed + split.score_bytes;
  split.merge_all = p.rows * team <= kMergedByAll;

  const double waves = static_cast<double>(ceil_div(p.items, teams)), blocks = static_cast<double>(team * teams);
  const double memory = std::min(kOneBlock, kMemory / blocks), cache = std::min(kOneBlock, kCache / blocks);
  const double entries = static_cast<double>(p.rows * per_block * tile), iterations = static_cast<double>(p.iterations);
  const bool held = padded / step <= resident_rows_at_once(p.vec);
  const double sums = held ? 2 + (iterations - 1) : 2 * iterations;  // passes over the entries before the plan
  const double again = sums * (1 - static_cast<double>(steps * step) / static_cast<double>(padded * per_block));
  const bool cached = blocks * entries * p.bytes <= kCacheBytes;
  double wave = entries * p.bytes / memory + entries * p.bytes * again / (cached ? cache : memory) + entries * 4 / memory;
  wave += entries * (sums + 1) / kExponentials + static_cast<double>(per_block) * iterations * 2 * kTile;
  if (team > 1) wave += iterations * kBarrier * (split.merge_all ? 1 : 2);
  split.nanoseconds = kLaunch + waves * wave;
  return split;
}

}  // namespace split_model

// Threads that share a row at most: 128 columns in a tile, or 32 where they are read one by one.
inline int most_lanes(int vec) { return vec == 8 ? 16 : 32; }

// The best split; nanoseconds 0 where the kernel does not serve the problem.
inline Split split(const Problem& p, const Device& device) {
  using namespace split_model;
  Split best{};
  if (p.rows > kMostRows || p.rows == 0 || p.cols == 0 || p.items == 0) return best;
  int64_t last = 0;
  for (int64_t teams = 1; teams <= std::min<int64_t>(p.items, device.multiprocessors); ++teams) {
    const int64_t most = device.multiprocessors / teams;
    if (most == last) continue;
    last = most;
    for (int lanes = most_lanes(p.vec); lanes >= 2; lanes /= 2) {
      const Split found = split_with(p, device, lanes, most);
      if (found.nanoseconds > 0 && (best.nanoseconds == 0 || found.nanoseconds < best.nanoseconds)) best = found;
    }
  }
  return best;
}

}  // namespace comp_kernels
