// The forward pass of rope_attention: rotate and pack the keys once per (sequence, key head), then blocks of queries with the
// online softmax (Milakov and Gimelshein, arXiv 1805.02867; blocked as in FlashAttention, arXiv 2205.14135).
#include <cmath>
#include <limits>

#include "../parallel.h"
#include "../rope_attention_schedule.h"
#include "../scratch.h"
#include "rope_attention_rows.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

constexpr BlockSizes kBlocks{/*queries=*/96, /*keys=*/128};
constexpr double kLog2e = 1.44269504088896340736, kLn2 = 0.693147180559945309417;

// Scratch of one worker. Rows are row_stride apart; the keys of a block are the columns of packed panels [D, keys].
template <typename T>
struct ForwardScratch {
  T* key_panels;  // all keys of the packed (sequence, head), block by block
  T* values;      // [keys, D]
  T* keys;        // [kLanes, D], rotated keys on their way into the panels
  T* query;       // [kBlocks.queries, D]
  T* scores;      // [kBlocks.queries, kBlocks.keys], then probabilities
  T* output;      // [kBlocks.queries, D], unnormalised
  T* row_max;     // [kBlocks.queries], of the scores before scaling
  T* row_sum;     // [kBlocks.queries], of exp2(scaled score - scaled maximum)
  int64_t packed_key = -1, packed_key_end = -1, packed_head = -1;  // what key_panels and values hold

  void carve(Carver& carver, const int64_t& most_keys, const int64_t& head_dim) {
    const int64_t stride = row_stride<T>(head_dim);
    carver.take(key_panels, round_up_to_lanes<T>(most_keys) * head_dim);
    carver.take(values, most_keys * stride);
    carver.take(keys, kLanes<T> * stride);
    carver.take(query, kBlocks.queries * stride);
    carver.take(scores, kBlocks.queries * row_stride<T>(kBlocks.keys));
    carver.take(output, kBlocks.queries * stride);
    carver.take(row_max, kBlocks.queries);
    carver.take(row_sum, kBlocks.queries);
  }
};

template <typename S, typename T>
void pack_keys_and_values(const Params& p, const AttentionItem& item, ForwardScratch<T>& scratch) {
  if (scratch.packed_key == item.key_begin && scratch.packed_key_end == item.key_end && scratch.packed_head == item.head_k) return;
  scratch.packed_key = item.key_begin;
  scratch.packed_key_end = item.key_end;
  scratch.packed_head = item.head_k;
  constexpr int L = kLanes<T>;
  const int64_t stride = row_stride<T>(p.head_dim), count = item.key_end - item.key_begin;
  for (int64_t block = 0; block < count; block += kBlocks.keys) {
    const int64_t in_block = min(count - block, kBlocks.keys);
    for (int64_t j = 0; j < in_block; j += L) {
      const int64_t rows = min(in_block - j, L), token = item.key_begin + block + j;
      prefetch_rows<S>(p.k, p.k_stride_token, p.k_stride_head, token + rows, min(item.key_end - token - rows, L), item.head_k, p);
      prefetch_rows<S>(p.v, p.v_stride_token, p.v_stride_head, token, rows, item.head_k, p);
      load_rows<S>(p.k, p.k_stride_token, p.k_stride_head, token, rows, item.head_k, key_tables<T>(p), scratch.keys, stride, p);
      for (int64_t i = rows * stride; i < L * stride; ++i) scratch.keys[i] = 0;
      transpose_into_panels(scratch.keys, stride, p.head_dim, scratch.key_panels + block * p.head_dim,
                            round_up_to_lanes<T>(in_block), j);
    }
  }
  for (int64_t j = 0; j < count; j += L) {
    const int64_t rows = min(count - j, L), token = item.key_begin + j;
    load_rows<S>(p.v, p.v_stride_token, p.v_stride_head, token, rows, item.head_k, Tables<T>{}, scratch.values + j * stride, stride,
                 p);
  }
}

// One block of scores -> probabilities, unnormalised; rescales what was accumulated before when a row's maximum grows.
template <typename T>
void online_softmax(ForwardScratch<T>& scratch, int64_t queries, int64_t keys, int64_t head_dim, T scale_log2, bool first) {
  constexpr int L = kLanes<T>;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  const int64_t score_stride = row_stride<T>(kBlocks.keys), stride = row_stride<T>(head_dim);
  const int64_t last = round_up_to_lanes<T>(keys) - L;  // the vector that may hold columns beyond the keys
  const BitVec<T> valid = first_lanes<T>(keys - last);
  for (int64_t i = 0; i < queries; ++i) {
    T* row = scratch.scores + i * score_stride;
    Vec<T> tops = select<T>(valid, load(row + last), broadcast(kLowest));
    for (int64_t j = 0; j < last; j += L) tops = max<T>(load(row + j), tops);
    T top = reduce_max<T>(tops);
    if (!first && !(top > scratch.row_max[i])) top = scratch.row_max[i];

    const T shift = top * scale_log2;
    Vec<T> sums{};
    for (int64_t j = 0; j < last; j += L) {
      const Vec<T> e = exp2(load(row + j) * scale_log2 - shift);
      sums += e;
      store(row + j, e);
    }
    const Vec<T> e = select<T>(valid, exp2(load(row + last) * scale_log2 - shift), Vec<T>{});
    store(row + last, e);
    T sum = reduce_sum<T>(sums + e);

    if (!first) {
      T fade = 1;
      if (top != scratch.row_max[i]) {
        fade = exp2(broadcast(scratch.row_max[i] * scale_log2 - shift))[0];
        T* out = scratch.output + i * stride;
        for (int64_t d = 0; d < head_dim; d += L) store(out + d, load(out + d) * fade);
      }
      sum += scratch.row_sum[i] * fade;
    }
    scratch.row_max[i] = top;
    scratch.row_sum[i] = sum;
  }
}

// Divides by the sums and writes out and lse.
template <typename S, typename T>
void store_outputs(const Params& p, ForwardScratch<T>& scratch, int64_t token, int64_t queries, int64_t head, bool any_keys,
                   T scale_log2) {
  const int64_t D = p.head_dim, stride = row_stride<T>(D);
  double* lse = static_cast<double*>(p.lse) + head * p.num_tokens + token;
  for (int64_t i = 0; i < queries; ++i) {
    T* row = scratch.output + i * stride;
    const T inverse = any_keys ? 1 / scratch.row_sum[i] : T(0);
    for (int64_t d = 0; d < D; ++d) row[d] = any_keys ? row[d] * inverse : T(0);
    narrow_row(row, static_cast<S*>(p.out) + ((token + i) * p.num_heads + head) * D, D);
    const double shift = static_cast<double>(scratch.row_max[i] * scale_log2);  // rounded as it was subtracted
    lse[i] = any_keys ? shift * kLn2 + std::log(static_cast<double>(scratch.row_sum[i]))
                      : -std::numeric_limits<double>::infinity();
  }
}

template <typename S, typename T>
void load_queries(const Params& p, ForwardScratch<T>& scratch, int64_t token, int64_t queries, int64_t head) {
  constexpr int L = kLanes<T>;
  const int64_t stride = row_stride<T>(p.head_dim);
  for (int64_t i = 0; i < queries; i += L) {
    const int64_t rows = min(queries - i, L);
    prefetch_rows<S>(p.q, p.q_stride_token, p.q_stride_head, token + i + rows, min(queries - i - rows, L), head, p);
    load_rows<S>(p.q, p.q_stride_token, p.q_stride_head, token + i, rows, head, query_tables<T>(p), scratch.query + i * stride,
                 stride, p);
  }
  if (p.scale < 0) {  // the maximum is taken before scaling
    for (int64_t i = 0; i < queries * stride; ++i) scratch.query[i] = -scratch.query[i];
  }
}

template <typename S, typename T>
void forward_block(const Params& p, const AttentionItem& item, ForwardScratch<T>& scratch, int64_t token, int64_t queries,
                   int64_t head) {
  constexpr int L = kLanes<T>;
  const int64_t D = p.head_dim, stride = row_stride<T>(D), score_stride = row_stride<T>(kBlocks.keys);
  const int64_t count = item.key_end - item.key_begin;
  const T scale_log2 = static_cast<T>(std::fabs(p.scale) * kLog2e);
  load_queries<S>(p, scratch, token, queries, head);
  for (int64_t block = 0; block < count; block += kBlocks.keys) {
    const int64_t keys = min(count - block, kBlocks.keys);
    product<T, RowsOfA::strided, RowsOfB::in_panels, Result::overwritten>(queries, round_up_to_lanes<T>(keys) / L, D, scratch.query,
                                                                         stride, scratch.key_panels + block * D, 0,
                                                                         scratch.scores, score_stride);
    online_softmax(scratch, queries, keys, D, scale_log2, block == 0);
    const T* values = scratch.values + block * stride;
    const int64_t vectors = round_up_to_lanes<T>(D) / L;
    if (block == 0) {
      product<T, RowsOfA::strided, RowsOfB::in_rows, Result::overwritten>(queries, vectors, keys, scratch.scores, score_stride,
                                                                         values, stride, scratch.output, stride);
    } else {
      product<T, RowsOfA::strided, RowsOfB::in_rows, Result::accumulated>(queries, vectors, keys, scratch.scores, score_stride,
                                                                         values, stride, scratch.output, stride);
    }
  }
  store_outputs<S>(p, scratch, token, queries, head, count > 0, scale_log2);
}

template <typename S>
const char* forward(const Params& p) {
  using T = Compute<S>;
  const int64_t workers = num_workers(), group = p.num_heads / p.num_heads_k;
  const std::vector<AttentionItem> items = forward_items(p, workers, kBlocks);
  if (items.empty()) return nullptr;
  PerWorker<ForwardScratch<T>> scratch(workers, max_keys(p), p.head_dim);
  if (!scratch.allocated()) return "out of memory for the packed keys";
  parallel_items(workers, static_cast<int64_t>(items.size()), [&](int64_t worker, int64_t index) {
    const AttentionItem& item = items[index];
    pack_keys_and_values<S>(p, item, scratch[worker]);
    for (int64_t head = item.head_k * group; head < (item.head_k + 1) * group; ++head) {
      for (int64_t token = item.query_begin; token < item.query_end; token += kBlocks.queries) {
        forward_block<S>(p, item, scratch[worker], token, min(item.query_end - token, kBlocks.queries), head);
      }
    }
  });
  return nullptr;
}

}  // namespace

const char* rope_attention_forward(const Params& params) {
  switch (params.dtype) {
    case COMP_KERNELS_FLOAT64: return forward<double>(params);
    case COMP_KERNELS_BFLOAT16: return forward<bfloat16>(params);
    case COMP_KERNELS_FLOAT16: return forward<float16>(params);
    default: return forward<float>(params);
  }
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
