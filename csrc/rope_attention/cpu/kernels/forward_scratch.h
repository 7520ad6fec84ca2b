// What one worker of the forward pass keeps: the sizes of its blocks, and scratch memory for them.
#pragma once

#include "common/cpu/scratch.h"
#include "../schedule.h"
#include "half_vectors.h"
#include "rows.h"
#include "weights.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

// Of a block, about. Pairs halve the depth of P V and with it the time that a tile's loads and stores of C have. Tiles: P of 32
// queries, two tiles, and one part of their scores lie in the first-level cache; what they multiply with comes from the second
// level fast enough. Three terms of all keys of a long sequence do not fit there: more queries share each block of them.
constexpr int64_t kQueries = kTerms > 1 ? 256 : kTiles ? 32 : kPack > 1 ? 144 : 96;
constexpr int64_t kKeys = kTerms > 1 ? 128 : kTiles ? 256 : kPack > 1 ? 384 : 192;
template <typename T>
constexpr int64_t kKeysMultiple = kWidePanels ? kLanes<T> : 2 * kLanes<T>;  // wide panels share any number of vectors well

// Lengths of the blocks of queries and keys. Those of the keys decide how a row is summed, so they depend on the sequence alone,
// not on the number of threads.
inline int64_t queries_per_block(const AttentionItem& item) {
  return kTiles ? kQueries : block_length(item.query_end - item.query_begin, kQueries, kTileRows);
}
template <typename T>
int64_t keys_per_block(const AttentionItem& item) {
  return block_length(item.key_end - item.key_begin, kKeys, kKeysMultiple<T>);
}
constexpr int64_t kMostQueries = kTiles ? kQueries : longest_block(kQueries, kTileRows);
constexpr int64_t kQueriesTogether = kTiles ? 32 : kMostQueries;  // of a block, that meet a block of keys together
template <typename T>
constexpr int64_t kMostKeys = longest_block(kKeys, kKeysMultiple<T>);

// Rows of scores are this far apart.
template <typename T>
constexpr int64_t kScoreStride = row_stride<T>(whole_scores<T>(kMostKeys<T>));
// Rows of probabilities; they take the place of the scores where they need no more.
template <typename T>
constexpr int64_t kWeightStride = kTerms == 1 ? kScoreStride<T> : operand_stride<T>(whole_scores<T>(kMostKeys<T>) / kPack);
// Keys of a part of a block, about (tiles, softmax.h).
constexpr int64_t kPartKeys = 64, kPartMultiple = kPack * kDepthStep;
constexpr int64_t kMostPartKeys = longest_block(kPartKeys, kPartMultiple), kPartStride = row_stride<float>(kMostPartKeys);

// Scratch of one worker. Rows are row_stride apart; the keys of a block are the columns of packed panels [D, keys].
template <typename T>
struct ForwardScratch {
  T* key_panels;  // all keys of the packed (sequence, head), block by block
  T* values;      // rows as ValueRows has them (half_vectors.h), operand_depth(keys) of them or half as many
  T* rows;        // [kRowsTogether, D], keys on their way into the panels, values on their way into halves
  T* query;       // [kMostQueries, operand_depth(D)], negated if the scale is negative: the maximum is taken before scaling
  T* scores;      // [kQueriesTogether, kMostKeys]
  T* weights;     // [kQueriesTogether, kMostKeys / kPack], probabilities; in the place of the scores but where there are terms
  T* output;      // [kMostQueries, D] likewise, unnormalised
  T* row_shift;   // [kMostQueries], maximum of the scores so far, not scaled; tiles: of the first ones, while that will do
  T* row_sum;     // [kMostQueries], of exp2((score - shift) * scale_log2)
  T* part;        // tiles: [kQueriesTogether, kMostPartKeys], scores of a part of a block
  T* part_sums;   // tiles: [kQueriesTogether, kLanes], sums over the parts so far
  RowsAhead ahead;
  int64_t packed_key = -1, packed_key_end = -1, packed_head = -1;  // what key_panels and values hold

  void carve(Carver& carver, const int64_t& most_keys, const int64_t& head_dim) {
    const int64_t stride = channel_stride<T>(head_dim);
    carver.take(key_panels, round_up_to_lanes<T>(most_keys) * channel_depth(head_dim).elements());
    const ValueRows<T> layout(head_dim);
    carver.take(values, (operand_depth(most_keys) * kPack + layout.tokens - 1) / layout.tokens * layout.value_stride);
    carver.take(rows, kRowsTogether<T> * stride);
    carver.take(query, kMostQueries * stride);
    carver.take(scores, kQueriesTogether * kScoreStride<T>);
    weights = scores;
    if constexpr (kTerms > 1) carver.take(weights, kQueriesTogether * kWeightStride<T>);
    carver.take(output, kMostQueries * layout.stride);
    carver.take(row_shift, round_up_to_lanes<T>(kMostQueries));
    carver.take(row_sum, round_up_to_lanes<T>(kMostQueries));
    if constexpr (kTiles) {
      carver.take(part, kQueriesTogether * kPartStride);
      carver.take(part_sums, kQueriesTogether * kLanes<T>);
    }
  }
};

}  // namespace
}  // namespace comp_kernels::COMP_KERNELS_ISA
