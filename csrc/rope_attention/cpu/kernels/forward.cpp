// The forward pass of rope_attention: rotate and pack the keys once per (sequence, key head), then blocks of queries with the
// online softmax (blocked as in FlashAttention, arXiv 2205.14135).
#include <cmath>
#include <limits>

#include "common/cpu/parallel.h"
#include "common/cpu/scratch.h"
#include "common/cpu/subnormals.h"
#include "../schedule.h"
#include "forward_scratch.h"
#include "half_vectors.h"
#include "rows.h"
#include "softmax.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

constexpr double kLn2 = 0.693147180559945309417;

template <typename S, typename T>
void pack_keys_and_values(const Params& p, const AttentionItem& item, ForwardScratch<T>& scratch) {
  if (scratch.packed_key == item.key_begin && scratch.packed_key_end == item.key_end && scratch.packed_head == item.head_k) return;
  scratch.packed_key = item.key_begin;
  scratch.packed_key_end = item.key_end;
  scratch.packed_head = item.head_k;
  constexpr int L = kLanes<T>;
  const int64_t stride = channel_stride<T>(p.head_dim), count = item.key_end - item.key_begin;
  const Depth depth = channel_depth(p.head_dim);
  const int64_t step = keys_per_block<T>(item);
  for (int64_t block = 0; block < count; block += step) {
    const int64_t in_block = min(count - block, step);
    for (int64_t j = 0; j < in_block; j += L) {
      const int64_t rows = min(in_block - j, L), token = item.key_begin + block + j;
      load_rows<S, Operand::right>(p.k, p.k_stride_token, p.k_stride_head, token, rows, block + j, count, item.head_k,
                                   key_tables<T>(p), scratch.rows, stride, p);
      for (int64_t i = rows * stride; i < L * stride; ++i) scratch.rows[i] = 0;
      transpose_into_panels(scratch.rows, stride, depth, scratch.key_panels + block * depth.elements(),
                            round_up_to_lanes<T>(in_block), j);
    }
  }
  const ValueRows<T> layout(p.head_dim);
  const auto load_values = [&](int64_t j, int64_t rows, T* to, int64_t to_stride) {
    load_right_rows<S>(p.v, p.v_stride_token, p.v_stride_head, item.key_begin + j, rows, j, count, item.head_k, to, to_stride, p);
  };
  if (!layout.halves) {
    load_values(0, count, scratch.values, layout.value_stride);
    return;
  }
  for (int64_t j = 0; j < count; j += kRowsTogether<T>) {
    const int64_t rows = min(count - j, kRowsTogether<T>);
    load_values(j, rows, scratch.rows, stride);
    zip_rows(scratch.rows, (rows + kPack - 1) / kPack, stride, layout, scratch.values + j / layout.tokens * layout.value_stride);
  }
}

// Divides by the sums and writes out and lse.
template <typename S, typename T>
void store_outputs(const Params& p, const AttentionItem& item, ForwardScratch<T>& scratch, int64_t token, int64_t queries,
                   int64_t head, T scale_log2) {
  const int64_t D = p.head_dim;
  const bool any_keys = item.key_end > item.key_begin;
  const ValueRows<T> layout(D);
  for (int64_t i = 0; i < queries; ++i) {
    T* output = scratch.output + i * layout.stride;
    S* to = static_cast<S*>(p.out) + ((token + i) * p.num_heads + head) * D;
    keep_tiles_awake(i);
    ask_ahead<Rows::written>(to, p.num_heads * D, token - item.query_begin + i, item.query_end - item.query_begin, D);
    if (any_keys) {
      if (layout.halves) add_zipped(output, layout);
      narrow_row(output, 1 / scratch.row_sum[i], to, D);
    } else {
      std::memset(to, 0, D * sizeof(S));
    }
  }
  double* lse = static_cast<double*>(p.lse) + head * p.num_tokens + token;
  constexpr int L = kLanes<double>;
  for (int64_t i = 0; i < queries; i += L) {
    Vec<double> shift, sum;
    for (int n = 0; n < L; ++n) shift[n] = scratch.row_shift[i + n], sum[n] = scratch.row_sum[i + n];
    const Vec<double> value =
        any_keys ? (shift * double(scale_log2) + log2<double>(sum)) * kLn2 : broadcast(-std::numeric_limits<double>::infinity());
    std::memcpy(lse + i, &value, min(queries - i, L) * sizeof(double));
  }
}

template <typename S, typename T>
void load_queries(const Params& p, const AttentionItem& item, ForwardScratch<T>& scratch, int64_t token, int64_t queries,
                  int64_t head) {
  const int64_t stride = channel_stride<T>(p.head_dim);
  load_rows<S, Operand::left>(p.q, p.q_stride_token, p.q_stride_head, token, queries, token - item.query_begin,
                              item.query_end - item.query_begin, head, query_tables<T>(p), scratch.query, stride, p);
  if (p.scale < 0) {
    for (int64_t i = 0; i < queries * stride; i += kLanes<T>) store(scratch.query + i, negated(load(scratch.query + i)));
  }
}

template <typename S, typename T>
void forward_block(const Params& p, const AttentionItem& item, ForwardScratch<T>& scratch, int64_t token, int64_t queries,
                   int64_t head) {
  constexpr int L = kLanes<T>;
  const int64_t D = p.head_dim, stride = channel_stride<T>(D);
  const int64_t count = item.key_end - item.key_begin;
  const Depth depth = channel_depth(D);
  const ValueRows<T> layout(D);
  const T scale_log2 = std::fabs(scale_in_bits<T>(p));
  load_queries<S>(p, item, scratch, token, queries, head);
  const int64_t step = keys_per_block<T>(item);
  for (int64_t block = 0; block < count; block += step) {
    const int64_t keys = min(count - block, step);
    const T *panels = scratch.key_panels + block * depth.elements(),
            *values = scratch.values + block / layout.tokens * layout.value_stride;
    for (int64_t at = 0; at < queries; at += kQueriesTogether) {
      const int64_t together = min(queries - at, kQueriesTogether);
      if (!softmax_by_parts(scratch, at, together, keys, panels, depth, stride, scale_log2, block == 0)) {
        product<T, RowsOfA::strided, RowsOfB::in_panels>(Result::overwritten, together, round_up_to_lanes<T>(keys) / L, depth,
                                                         scratch.query + at * stride, stride, panels, 0, scratch.scores,
                                                         kScoreStride<T>, scratch.ahead);
        online_softmax(scratch, at, together, keys, layout, scale_log2, block == 0);
      }
      product_with_values(block == 0 ? Result::overwritten : Result::accumulated, together, operand_depth(keys), scratch.weights,
                          kWeightStride<T>, values, layout, scratch.output + at * layout.stride, scratch.ahead);
    }
  }
  store_outputs<S>(p, item, scratch, token, queries, head, scale_log2);
}

// Plans what the products of one block ask for: the rows the next block reads, of `item` or of `next` (null: none), and
// those this one writes.
template <typename S, typename T>
void look_ahead(const Params& p, const AttentionItem& item, const AttentionItem* next, ForwardScratch<T>& scratch, int64_t token,
                int64_t queries, int64_t head) {
  if (!tiles_ask()) return;
  const int64_t D = p.head_dim, group = p.num_heads / p.num_heads_k, keys = item.key_end - item.key_begin, end = token + queries;
  RowsAhead& ahead = scratch.ahead;
  const auto add_queries = [&](const AttentionItem& of, int64_t begin, int64_t of_head) {
    add_rows<S>(ahead, p.q, p.q_stride_token, p.q_stride_head, begin, min(of.query_end - begin, queries_per_block(of)), of_head);
  };
  ahead.plan(D * static_cast<int64_t>(sizeof(S)));
  add_rows<S>(ahead, p.out, p.num_heads, token, queries, head, p);
  if (end < item.query_end) {
    add_queries(item, end, head);
  } else if (head + 1 < (item.head_k + 1) * group) {
    add_queries(item, item.query_begin, head + 1);
  } else if (next != nullptr) {
    const int64_t next_keys = next->key_end - next->key_begin;
    add_rows<S>(ahead, p.k, p.k_stride_token, p.k_stride_head, next->key_begin, next_keys, next->head_k);
    add_rows<S>(ahead, p.v, p.v_stride_token, p.v_stride_head, next->key_begin, next_keys, next->head_k);
    add_queries(*next, next->query_begin, next->head_k * group);
  }
  ahead.spread(count_tiles<T>(queries, keys) + (keys + kKeys - 1) / kKeys * count_tiles<T>(queries, D));
}

template <typename S>
const char* forward(const Params& p) {
  using T = Compute<S>;
  const int64_t workers = num_workers(), group = p.num_heads / p.num_heads_k;
  const std::vector<AttentionItem> items = forward_items(p, workers, {kQueries, kKeys});
  if (items.empty()) return nullptr;
  PerWorker<ForwardScratch<T>> scratch(workers, max_keys(p), p.head_dim);
  if (!scratch.allocated()) return "out of memory for the packed keys";
  const int64_t count = static_cast<int64_t>(items.size());
  parallel_draws(workers, count, items_together(p, count, workers), [&](int64_t worker, auto draw) {
    ForwardScratch<T>& mine = scratch[worker];
    [[maybe_unused]] const TileRegisters tiles;
    const NoSubnormalResults none;
    for (int64_t index = draw(), next = -1; index >= 0; index = next) {
      const AttentionItem& item = items[index];
      pack_keys_and_values<S>(p, item, mine);
      const int64_t last_head = (item.head_k + 1) * group - 1, step = queries_per_block(item);
      for (int64_t head = item.head_k * group; head <= last_head; ++head) {
        for (int64_t token = item.query_begin; token < item.query_end; token += step) {
          const int64_t queries = min(item.query_end - token, step);
          // The next item is drawn when this one's last block begins: early enough to ask for its rows, late enough to balance.
          const bool last = head == last_head && token + queries == item.query_end;
          if (last) next = draw();
          look_ahead<S>(p, item, last && next >= 0 ? &items[next] : nullptr, mine, token, queries, head);
          forward_block<S>(p, item, mine, token, queries, head);
        }
      }
    }
  });
  return nullptr;
}

}  // namespace

const char* rope_attention_forward(const Params& params) {
#if defined(COMP_KERNELS_TERMS)
  return params.dtype == COMP_KERNELS_FLOAT16 ? forward<float16>(params) : forward<float>(params);
#elif defined(COMP_KERNELS_PAIRS)
  return forward<COMP_KERNELS_PAIRS>(params);
#else
  switch (params.dtype) {
    case COMP_KERNELS_FLOAT64: return forward<double>(params);
    case COMP_KERNELS_BFLOAT16: return forward<bfloat16>(params);
    case COMP_KERNELS_FLOAT16: return forward<float16>(params);
    default: return forward<float>(params);
  }
#endif
}

}  // namespace comp_kernels::COMP_KERNELS_ISA
