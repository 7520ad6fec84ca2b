// The backward pass of rope_attention: probabilities are recomputed from lse, block by block. Each item runs over its queries
// outside and its keys inside, so every sum is taken in the order of the tokens, whatever the number of threads.
//
//   P = exp(scale S - lse)    dP = dO V'    dS = P (dP - delta + dlse)    delta = sum_d dO O
//   dV = P' dO                dK = scale dS' Q        dQ = scale dS K        then the transposed rotation
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "common/cpu/parallel.h"
#include "common/cpu/scratch.h"
#include "common/cpu/subnormals.h"
#include "../schedule.h"
#include "rows.h"
#include "weights.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

// Of a block, about.
constexpr BlockSizes kBlocks{/*queries=*/kTerms > 1 ? 128 : kPack > 1 && !kTiles ? 192 : 96, /*keys=*/kTerms > 1 ? 64 : 96};
// With terms, queries of a block where K has no more than so many numbers: an item's operands then stay in the second-level cache.
constexpr int64_t kFewQueries = kTerms > 1 ? 64 : kBlocks.queries, kFewNumbers = 48 * 1024;

// Queries are rows of products, keys are columns of some and rows of others.
template <typename T>
constexpr BlockSizes kMultiple{std::lcm(kTileRows, kPack* kDepthStep), std::lcm(kTileRows, kRowsTogether<T>)};
template <typename T>
constexpr BlockSizes kMost{longest_block(kBlocks.queries, kMultiple<T>.queries), longest_block(kBlocks.keys, kMultiple<T>.keys)};
template <typename T>
BlockSizes blocks_of(const AttentionItem& item, int64_t head_dim) {
  const int64_t keys = item.key_end - item.key_begin, about = keys * head_dim > kFewNumbers ? kBlocks.queries : kFewQueries;
  return {block_length(item.query_end - item.query_begin, about, kMultiple<T>.queries),
          block_length(keys, kBlocks.keys, kMultiple<T>.keys)};
}

// Rows of scores are this far apart.
template <typename T>
constexpr int64_t kMostScores = whole_scores<T>(kMost<T>.keys);
template <typename T>
constexpr int64_t kScoreStride = row_stride<T>(kMostScores<T>);
template <typename T>
constexpr int64_t kRightStride =
    kTerms == 1 ? kPack * kScoreStride<T> : operand_stride<T>(kMostScores<T>);  // of weights_right, dscores_right
template <typename T>
constexpr int64_t kLeftStride = operand_stride<T>(kMostScores<T> / kPack);  // of dscores_left
template <typename T>
constexpr int64_t kColumnStride = operand_stride<T>(operand_depth(kMost<T>.queries));  // of query_columns, dout_columns

// Scratch of one worker. Rows are row_stride apart; panels as in the forward pass. Operands of products are in elements
// (pairs.h): what is summed over has operand_depth of its length. With one number per element, left and right operands share
// memory. Tiles (tiles.h) read left operands by rows alone, so P' dO and dS' Q are computed as their transposes dO' P, Q' dS.
template <typename T>
struct BackwardScratch {
  T* keys;                           // [operand_depth(keys), D], rotated, right operand of dQ
  T *dkeys, *dvalues;                // [keys, D]; tiles: [D, keys], key_stride apart
  T *key_panels, *value_panels;      // [operand_depth(D), keys] by blocks, right operands of S and dP
  T *query, *dout;                   // [most queries, operand_depth(D)], left operands of S and dP
  T *query_right, *dout_right;       // [operand_depth(queries), D], right operands of dK and dV
  T *query_columns, *dout_columns;   // tiles: their transposes, left operands of dK' and dV'
  T* dquery;                         // [most queries, D]
  T *scores, *dweights;              // [most queries, most keys], S, dP
  T *weights_right, *dscores_right;  // P, dS by pairs of queries, for dV, dK; in the place of S, dP but where there are terms
  T* dscores_left;                   // [most queries, most keys / kPack], left operand of dQ
  T *row_lse, *row_lse_rest;         // [most queries], the exponent is (S - lse) scale_log2 - rest
  T *row_delta, *row_dlse;           // [most queries]
  T *key_rows, *value_rows;          // [kRowsTogether, D], on their way into operands; the second for dout and for dK, dV, too
  T* out;                            // [kLanes, D], rows of out
  int64_t key_stride;                // of dkeys and dvalues
  RowsAhead ahead;
  int64_t packed_key = -1, packed_key_end = -1, packed_head = -1;  // what the keys and panels hold

  void carve(Carver& carver, const int64_t& most_keys, const int64_t& head_dim) {
    const int64_t stride = channel_stride<T>(head_dim), padded = round_up_to_lanes<T>(most_keys);
    const int64_t sums = row_stride<T>(head_dim);  // stride of rows of results
    constexpr int64_t kRows = round_up_to_lanes<T>(kMost<T>.queries);  // of a block, whole vectors of rows
    carver.take(keys, operand_depth(padded) * stride);
    key_stride = kTiles ? row_stride<T>(most_keys) : sums;
    for (T** rows : {&dkeys, &dvalues}) carver.take(*rows, kTiles ? round_up_to_lanes<T>(head_dim) * key_stride : padded * sums);
    for (T** panels : {&key_panels, &value_panels}) carver.take(*panels, padded * channel_depth(head_dim).elements());
    for (T** rows : {&query, &dout, &dquery}) carver.take(*rows, kRows * stride);
    for (T** tile : {&scores, &dweights}) carver.take(*tile, kRows * kScoreStride<T>);
    weights_right = scores, dscores_right = dweights;
    if constexpr (kTerms > 1) {
      for (T** rows : {&weights_right, &dscores_right}) carver.take(*rows, kRows / kPack * kRightStride<T>);
    }
    for (T** row : {&row_lse, &row_lse_rest, &row_delta, &row_dlse}) carver.take(*row, kRows);
    for (T** rows : {&key_rows, &value_rows, &out}) carver.take(*rows, kRowsTogether<T> * stride);
    query_right = query, dout_right = dout, dscores_left = dweights;
    if constexpr (kPack > 1) {
      for (T** rows : {&query_right, &dout_right}) carver.take(*rows, kRows / kPack * stride);
      carver.take(dscores_left, kRows * kLeftStride<T>);
    }
    if constexpr (kTiles) {
      for (T** columns : {&query_columns, &dout_columns}) carver.take(*columns, round_up_to_lanes<T>(head_dim) * kColumnStride<T>);
    }
  }
};

template <typename S, typename T>
void pack_keys_and_values(const Params& p, const AttentionItem& item, BackwardScratch<T>& scratch) {
  if (scratch.packed_key == item.key_begin && scratch.packed_key_end == item.key_end && scratch.packed_head == item.head_k) return;
  scratch.packed_key = item.key_begin;
  scratch.packed_key_end = item.key_end;
  scratch.packed_head = item.head_k;
  constexpr int L = kLanes<T>;
  const int64_t D = p.head_dim, stride = channel_stride<T>(D), count = item.key_end - item.key_begin;
  const Depth depth = channel_depth(D);
  const int64_t step = blocks_of<T>(item, D).keys;
  for (int64_t block = 0; block < count; block += step) {
    const int64_t in_block = min(count - block, step);
    const int64_t columns = round_up_to_lanes<T>(in_block);
    for (int64_t j = 0; j < in_block; j += kRowsTogether<T>) {
      const int64_t rows = min(in_block - j, kRowsTogether<T>), whole = round_up_to_lanes<T>(rows);
      const int64_t token = item.key_begin + block + j;
      T *keys = kPack == 1 ? scratch.keys + (block + j) * stride : scratch.key_rows, *values = scratch.value_rows;
      load_rows<S, Operand::right>(p.k, p.k_stride_token, p.k_stride_head, token, rows, block + j, count, item.head_k,
                                   key_tables<T>(p), keys, stride, p);
      load_rows<S, Operand::right>(p.v, p.v_stride_token, p.v_stride_head, token, rows, block + j, count, item.head_k, Tables<T>{},
                                   values, stride, p);
      for (int64_t i = rows * stride; i < whole * stride; ++i) keys[i] = values[i] = 0;
      if constexpr (kPack > 1) as_right_operand(keys, whole, kApart, D, stride, scratch.keys + (block + j) / kPack * stride);
      for (int64_t i = 0; i < whole; i += L) {
        transpose_into_panels(keys + i * stride, stride, depth, scratch.key_panels + block * depth.elements(), columns, j + i);
        transpose_into_panels(values + i * stride, stride, depth, scratch.value_panels + block * depth.elements(), columns, j + i);
      }
    }
  }
}

// Loads rotated queries, dout, lse and delta of one block.
template <typename S, typename T>
void load_queries(const Params& p, BackwardScratch<T>& scratch, int64_t token, int64_t queries, int64_t head) {
  const int64_t D = p.head_dim, stride = channel_stride<T>(D);
  const double scale_log2 = scale_in_bits<T>(p);
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < queries; i += L) {
    const int64_t rows = min(queries - i, L);
    T* dout = scratch.dout + i * stride;
    load_rows<S, Operand::left>(p.q, p.q_stride_token, p.q_stride_head, token + i, rows, i, queries, head, query_tables<T>(p),
                                scratch.query + i * stride, stride, p);
    load_rows<S, Operand::left>(p.grad_out, p.grad_out_stride_token, p.grad_out_stride_head, token + i, rows, i, queries, head,
                                Tables<T>{}, dout, stride, p);
    load_rows<S, Operand::right>(p.out, p.num_heads * D, D, token + i, rows, i, queries, head, Tables<T>{}, scratch.out, stride, p);
    // delta in the order in which the products sum dP, so that the two cancel exactly where one key has all the weight.
    if constexpr (kTiles) {  // the diagonal of dO O'
      const Depth depth = channel_depth(D);
      T *columns = scratch.key_rows, *products = scratch.scores;
      transpose_into_panels(scratch.out, stride, depth, columns, L, 0);
      product<T, RowsOfA::strided, RowsOfB::in_panels>(Result::overwritten, L, 1, depth, dout, stride, columns, 0, products, L,
                                                       scratch.ahead);
      for (int64_t r = 0; r < L; ++r) scratch.row_delta[i + r] = products[r * L + r];
    } else {
      store(scratch.row_delta + i, row_dots(dout, scratch.out, stride, D / kPack));
    }
  }
  if constexpr (kPack > 1) {
    const int64_t padded = (queries + 1) / 2 * 2;
    for (T* rows : {scratch.query, scratch.dout}) std::fill(rows + queries * stride, rows + padded * stride, T(0));
    for (T* row : {scratch.row_delta, scratch.row_dlse, scratch.row_lse}) std::fill(row + queries, row + padded, T(0));
    std::fill(scratch.row_lse_rest + queries, scratch.row_lse_rest + padded, std::numeric_limits<T>::infinity());  // no weight
    as_right_operand(scratch.query, queries, 1, D, stride, scratch.query_right);
    as_right_operand(scratch.dout, queries, 1, D, stride, scratch.dout_right);
  }
  if constexpr (kTiles) {
    for (int64_t i = 0; i < operand_depth(queries); i += L) {
      keep_tiles_awake(i);
      for (int t = 0; t < kTerms; ++t) {
        const int64_t from = i * stride + t * (stride / kTerms), to = i + t * (kColumnStride<T> / kTerms);
        transpose(scratch.query_right + from, stride, round_up_to_lanes<T>(D), scratch.query_columns + to, kColumnStride<T>);
        transpose(scratch.dout_right + from, stride, round_up_to_lanes<T>(D), scratch.dout_columns + to, kColumnStride<T>);
      }
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    keep_tiles_awake(i, 32);
    const int64_t statistic = head * p.num_tokens + token + i;
    const double lse_log2 = static_cast<const double*>(p.lse)[statistic] * kLog2e;
    // The exponent is (S - lse) scale_log2 - rest: as in the forward pass, large numbers are subtracted before anything is
    // rounded.
    const double unscaled = lse_log2 / scale_log2;
    const bool in_range = std::fabs(unscaled) <= static_cast<double>(std::numeric_limits<T>::max());  // not of a scale of zero
    scratch.row_lse[i] = in_range ? static_cast<T>(unscaled) : T(0);
    scratch.row_lse_rest[i] = static_cast<T>(lse_log2 - static_cast<double>(scratch.row_lse[i]) * scale_log2);
    scratch.row_dlse[i] = p.grad_lse == nullptr ? T(0) : static_cast<T>(static_cast<const double*>(p.grad_lse)[statistic]);
  }
}

// Vectors j .. of P and dS of row i.
template <typename T>
CK_INLINE void weights_and_gradients(const BackwardScratch<T>& scratch, int64_t i, int64_t j, int64_t keys, T scale_log2,
                                     Vec<T> (&weights)[kTogether], Vec<T> (&gradients)[kTogether]) {
  constexpr int L = kLanes<T>;
  const T* scores = scratch.scores + i * kScoreStride<T> + j;
  const T* dweights = scratch.dweights + i * kScoreStride<T> + j;
  const T lse = scratch.row_lse[i], lse_rest = scratch.row_lse_rest[i], delta = scratch.row_delta[i], dlse = scratch.row_dlse[i];
#pragma GCC unroll 8
  for (int n = 0; n < kTogether; ++n) {
    weights[n] = (load(scores + n * L) - lse) * scale_log2 - lse_rest;
    weights[n] = min<T>(broadcast(T(0)), weights[n]);  // what rounding leaves of huge logits
  }
  if (j + kTogether * L > keys) {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    for (int n = 0; n < kTogether; ++n) weights[n] = select<T>(first_lanes<T>(keys - j - n * L), weights[n], broadcast(kLowest));
  }
  weights_of(weights);
#pragma GCC unroll 8
  for (int n = 0; n < kTogether; ++n) gradients[n] = weights[n] * (load(dweights + n * L) - delta + dlse);
  if (kTiles && j + kTogether * L > keys) {  // dP is not there for whole tiles
    for (int n = 0; n < kTogether; ++n) gradients[n] = select<T>(first_lanes<T>(keys - j - n * L), gradients[n], Vec<T>{});
  }
}

// S and dP of one block -> P and dS as the products read them; P becomes zero beyond the keys.
template <typename T>
void softmax_gradients(BackwardScratch<T>& scratch, int64_t queries, int64_t keys, T scale_log2) {
  constexpr int L = kLanes<T>;
  const int64_t padded = round_up_to_lanes<T>(keys);
  for (int64_t i = 0; i < queries; i += kPack) {
    keep_tiles_awake(i, 16);
    T* p = scratch.weights_right + i / kPack * kRightStride<T>;
    T* ds = scratch.dscores_right + i / kPack * kRightStride<T>;
    for (int64_t j = 0; j < padded; j += kTogether * L) {
      Vec<T> weights[kPack][kTogether], gradients[kPack][kTogether];
#pragma GCC unroll 2
      for (int r = 0; r < kPack; ++r) weights_and_gradients(scratch, i + r, j, keys, scale_log2, weights[r], gradients[r]);
      if constexpr (kPack == 1) {
        store_operands(p + j, kRightStride<T>, weights[0]);
        store_operands(ds + j, kRightStride<T>, gradients[0]);
      } else {
#pragma GCC unroll 8
        for (int n = 0; n < kTogether; ++n) {
#ifdef COMP_KERNELS_TERMS
          store_pairs(p + j + n * L, kRightStride<T> / kTerms, weights[0][n], weights[1][n]);
          store_pairs(ds + j + n * L, kRightStride<T> / kTerms, gradients[0][n], gradients[1][n]);
#else
          store(p + j + n * L, pair_rows(weights[0][n], weights[1][n]));
          store(ds + j + n * L, pair_rows(gradients[0][n], gradients[1][n]));
#endif
        }
        T* left = scratch.dscores_left + i * kLeftStride<T> + j / kPack;
        store_operands(left, kLeftStride<T>, gradients[0]);
        store_operands(left + kLeftStride<T>, kLeftStride<T>, gradients[1]);
      }
    }
  }
  for (int64_t i = (queries + 1) / kPack; i < operand_depth(queries); ++i) {  // pairs that only fill up a step
    for (T* rows : {scratch.weights_right, scratch.dscores_right}) {
      for (int t = 0; t < kTerms; ++t) std::fill_n(rows + i * kRightStride<T> + t * (kRightStride<T> / kTerms), padded, T(0));
    }
  }
}

template <typename S, typename T>
void backward_block(const Params& p, const AttentionItem& item, BackwardScratch<T>& scratch, int64_t token, int64_t queries,
                    int64_t head) {
  constexpr int L = kLanes<T>;
  const int64_t D = p.head_dim, stride = channel_stride<T>(D), sums = row_stride<T>(D), score_stride = kScoreStride<T>;
  const int64_t vectors = round_up_to_lanes<T>(D) / L, count = item.key_end - item.key_begin;
  const Depth depth = channel_depth(D);
  const int64_t rows = (queries + kPack - 1) / kPack * kPack;  // pairs of a query alone have zeros
  load_queries<S>(p, scratch, token, queries, head);
  // The first block of queries of the item's first head begins the sums over queries, the first block of keys those over keys.
  const bool first = token == item.query_begin && head == item.head_k * (p.num_heads / p.num_heads_k);
  const Result onto_keys = first ? Result::overwritten : Result::accumulated;
  const int64_t step = blocks_of<T>(item, D).keys;
  for (int64_t block = 0; block < count; block += step) {
    const int64_t keys = min(count - block, step);
    const int64_t key_vectors = round_up_to_lanes<T>(keys) / L;
    product<T, RowsOfA::strided, RowsOfB::in_panels>(Result::overwritten, rows, key_vectors, depth, scratch.query, stride,
                                                     scratch.key_panels + block * depth.elements(), 0, scratch.scores, score_stride,
                                                     scratch.ahead);
    product<T, RowsOfA::strided, RowsOfB::in_panels>(Result::overwritten, rows, key_vectors, depth, scratch.dout, stride,
                                                     scratch.value_panels + block * depth.elements(), 0, scratch.dweights,
                                                     score_stride, scratch.ahead);
    softmax_gradients(scratch, queries, keys, scale_in_bits<T>(p));
    if constexpr (kTiles) {
      if (item.key_gradients) {
        product<T, RowsOfA::strided, RowsOfB::in_rows>(onto_keys, D, key_vectors, operand_depth(queries), scratch.dout_columns,
                                                       kColumnStride<T>, scratch.weights_right, kRightStride<T>,
                                                       scratch.dvalues + block, scratch.key_stride, scratch.ahead);
        product<T, RowsOfA::strided, RowsOfB::in_rows>(onto_keys, D, key_vectors, operand_depth(queries), scratch.query_columns,
                                                       kColumnStride<T>, scratch.dscores_right, kRightStride<T>,
                                                       scratch.dkeys + block, scratch.key_stride, scratch.ahead);
      }
    } else if (item.key_gradients) {
      product<T, RowsOfA::transposed, RowsOfB::in_rows>(onto_keys, keys, vectors, rows / kPack, scratch.weights_right,
                                                        kRightStride<T>, scratch.dout_right, stride, scratch.dvalues + block * sums,
                                                        sums, scratch.ahead);
      product<T, RowsOfA::transposed, RowsOfB::in_rows>(onto_keys, keys, vectors, rows / kPack, scratch.dscores_right,
                                                        kRightStride<T>, scratch.query_right, stride, scratch.dkeys + block * sums,
                                                        sums, scratch.ahead);
    }
    if (item.query_gradients) {
      product<T, RowsOfA::strided, RowsOfB::in_rows>(
          block == 0 ? Result::overwritten : Result::accumulated, queries, vectors, operand_depth(keys), scratch.dscores_left,
          kLeftStride<T>, scratch.keys + block / kPack * stride, stride, scratch.dquery, sums, scratch.ahead);
    }
  }
  if (item.query_gradients) {
    if (count == 0) std::fill(scratch.dquery, scratch.dquery + queries * sums, T(0));
    store_rotated_gradients<S>(scratch.dquery, sums, static_cast<T>(p.scale), p.q, p.q_stride_token, p.q_stride_head, token,
                               queries, head, p.num_heads, query_tables<T>(p), p.dq, p);
  }
}

// Plans what the products of one block ask for: the rows the next block reads, of `item` or of `next` (null: none), and
// those that are written when this one is done.
template <typename S, typename T>
void look_ahead(const Params& p, const AttentionItem& item, bool last, const AttentionItem* next, BackwardScratch<T>& scratch,
                int64_t token, int64_t queries, int64_t head) {
  if (!tiles_ask()) return;
  const int64_t D = p.head_dim, group = p.num_heads / p.num_heads_k, keys = item.key_end - item.key_begin, end = token + queries;
  RowsAhead& ahead = scratch.ahead;
  const auto add_queries = [&](const AttentionItem& of, int64_t begin, int64_t of_head) {
    const int64_t rows = min(of.query_end - begin, blocks_of<T>(of, D).queries);
    add_rows<S>(ahead, p.q, p.q_stride_token, p.q_stride_head, begin, rows, of_head);
    add_rows<S>(ahead, p.grad_out, p.grad_out_stride_token, p.grad_out_stride_head, begin, rows, of_head);
    add_rows<S>(ahead, p.out, p.num_heads, begin, rows, of_head, p);
  };
  ahead.plan(D * static_cast<int64_t>(sizeof(S)));
  if (item.query_gradients) add_rows<S>(ahead, p.dq, p.num_heads, token, queries, head, p);
  if (last && item.key_gradients) {
    add_rows<S>(ahead, p.dk, p.num_heads_k, item.key_begin, keys, item.head_k, p);
    add_rows<S>(ahead, p.dv, p.num_heads_k, item.key_begin, keys, item.head_k, p);
  }
  if (end < item.query_end) {
    add_queries(item, end, head);
  } else if (!last) {
    add_queries(item, item.query_begin, head + 1);
  } else if (next != nullptr) {
    const int64_t next_keys = next->key_end - next->key_begin;
    add_rows<S>(ahead, p.k, p.k_stride_token, p.k_stride_head, next->key_begin, next_keys, next->head_k);
    add_rows<S>(ahead, p.v, p.v_stride_token, p.v_stride_head, next->key_begin, next_keys, next->head_k);
    add_queries(*next, next->query_begin, next->head_k * group);
  }
  const int64_t blocks = (keys + kBlocks.keys - 1) / kBlocks.keys;
  int64_t tiles = 2 * count_tiles<T>(queries, keys);
  if (item.key_gradients) tiles += 2 * blocks * count_tiles<T>(kBlocks.keys, D);
  if (item.query_gradients) tiles += blocks * count_tiles<T>(queries, D);
  ahead.spread(tiles);
}

// Writes dk and dv of an item.
template <typename S, typename T>
void store_key_gradients(const Params& p, const AttentionItem& item, BackwardScratch<T>& scratch) {
  const int64_t D = p.head_dim, stride = row_stride<T>(D), count = item.key_end - item.key_begin;
  const bool none = item.query_begin == item.query_end;  // no block of queries wrote any
  const int64_t step = kTiles ? kLanes<T> : count;
  for (int64_t first = 0; first < count; first += step) {
    const int64_t rows = min(count - first, step), token = item.key_begin + first;
    T *dkeys = scratch.dkeys, *dvalues = scratch.dvalues;
    if constexpr (kTiles) {
      for (int64_t d = 0; d < D; d += kLanes<T>) {
        transpose(scratch.dkeys + d * scratch.key_stride + first, scratch.key_stride, kLanes<T>, scratch.key_rows + d, stride);
        transpose(scratch.dvalues + d * scratch.key_stride + first, scratch.key_stride, kLanes<T>, scratch.value_rows + d, stride);
      }
      dkeys = scratch.key_rows, dvalues = scratch.value_rows;
    }
    if (none) {
      for (T* gradients : {dkeys, dvalues}) std::fill_n(gradients, rows * stride, T(0));
    }
    store_rotated_gradients<S>(dkeys, stride, static_cast<T>(p.scale), p.k, p.k_stride_token, p.k_stride_head, token, rows,
                               item.head_k, p.num_heads_k, key_tables<T>(p), p.dk, p);
    for (int64_t j = 0; j < rows; ++j) {
      S* dv = static_cast<S*>(p.dv) + ((token + j) * p.num_heads_k + item.head_k) * D;
      ask_ahead<Rows::written>(dv, p.num_heads_k * D, first + j, count, D);
      narrow_row(dvalues + j * stride, T(1), dv, D);
    }
  }
}

template <typename S>
const char* backward(const Params& p) {
  using T = Compute<S>;
  const int64_t workers = num_workers(), group = p.num_heads / p.num_heads_k;
  const std::vector<AttentionItem> items = backward_items(p, workers, kBlocks);
  if (items.empty()) return nullptr;
  PerWorker<BackwardScratch<T>> scratch(workers, max_keys(p), p.head_dim);
  if (!scratch.allocated()) return "out of memory for the packed keys and their gradients";
  const int64_t count = static_cast<int64_t>(items.size());
  parallel_draws(workers, count, items_together(p, count, workers), [&](int64_t worker, auto draw) {
    BackwardScratch<T>& mine = scratch[worker];
    [[maybe_unused]] const TileRegisters tiles;
    const NoSubnormalResults none;
    for (int64_t index = draw(), next = -1; index >= 0; index = next) {
      const AttentionItem& item = items[index];
      pack_keys_and_values<S>(p, item, mine);
      if (item.query_begin == item.query_end) next = draw();
      const int64_t last_head = (item.head_k + 1) * group - 1, step = blocks_of<T>(item, p.head_dim).queries;
      for (int64_t head = item.head_k * group; head <= last_head; ++head) {
        for (int64_t token = item.query_begin; token < item.query_end; token += step) {
          const int64_t queries = min(item.query_end - token, step);
          // The next item is drawn when this one's last block begins: early enough to ask for its rows, late enough to balance.
          const bool last = head == last_head && token + queries == item.query_end;
          if (last) next = draw();
          look_ahead<S>(p, item, last, last && next >= 0 ? &items[next] : nullptr, mine, token, queries, head);
          backward_block<S>(p, item, mine, token, queries, head);
        }
      }
      if (item.key_gradients) store_key_gradients<S>(p, item, mine);
    }
  });
  return nullptr;
}

}  // namespace

const char* rope_attention_backward(const Params& params) {
#if defined(COMP_KERNELS_TERMS)
  return params.dtype == COMP_KERNELS_FLOAT16 ? backward<float16>(params) : backward<float>(params);
#elif defined(COMP_KERNELS_PAIRS)
  return backward<COMP_KERNELS_PAIRS>(params);
#else
  switch (params.dtype) {
    case COMP_KERNELS_FLOAT64: return backward<double>(params);
    case COMP_KERNELS_BFLOAT16: return backward<bfloat16>(params);
    case COMP_KERNELS_FLOAT16: return backward<float16>(params);
    default: return backward<float>(params);
  }
#endif
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
