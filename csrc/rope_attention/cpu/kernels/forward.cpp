// The forward pass of rope_attention: rotate and pack the keys once per (sequence, key head), then blocks of queries with the
// online softmax (Milakov and Gimelshein, arXiv 1805.02867; blocked as in FlashAttention, arXiv 2205.14135).
#include <cmath>
#include <limits>

#include "common/cpu/parallel.h"
#include "common/cpu/scratch.h"
#include "common/cpu/subnormals.h"
#include "../schedule.h"
#include "half_vectors.h"
#include "rows.h"
#include "weights.h"

namespace comp_kernels::COMP_KERNELS_ISA {
namespace {

// Of a block, about. Pairs halve the depth of P V and with it the time that a tile's loads and stores of C have.
constexpr int64_t kQueries = kTiles ? 64 : kPack > 1 ? 144 : 96, kKeys = kTiles ? 256 : kPack > 1 ? 384 : 192;
template <typename T>
constexpr int64_t kKeysMultiple = kWidePanels ? kLanes<T> : 2 * kLanes<T>;  // wide panels share any number of vectors well

// Lengths of the blocks of queries and keys. Those of the keys decide how a row is summed, so they depend on the sequence alone,
// not on the number of threads.
int64_t queries_per_block(const AttentionItem& item) {
  return block_length(item.query_end - item.query_begin, kQueries, kTileRows);
}
template <typename T>
int64_t keys_per_block(const AttentionItem& item) {
  return block_length(item.key_end - item.key_begin, kKeys, kKeysMultiple<T>);
}
constexpr int64_t kMostQueries = longest_block(kQueries, kTileRows);
template <typename T>
constexpr int64_t kMostKeys = longest_block(kKeys, kKeysMultiple<T>);

// Rows of scores are this far apart.
template <typename T>
constexpr int64_t kScoreStride = row_stride<T>(whole_scores<T>(kMostKeys<T>));
constexpr double kLn2 = 0.693147180559945309417;

// Scratch of one worker. Rows are row_stride apart; the keys of a block are the columns of packed panels [D, keys].
template <typename T>
struct ForwardScratch {
  T* key_panels;  // all keys of the packed (sequence, head), block by block
  T* values;      // rows as ValueRows has them (half_vectors.h), operand_depth(keys) of them or half as many
  T* rows;        // [kRowsTogether, D], rotated keys on their way into the panels, values on their way into pairs
  T* query;       // [kMostQueries, operand_depth(D)], negated if the scale is negative: the maximum is taken before scaling
  T* scores;      // [kMostQueries, kMostKeys], then probabilities [kMostQueries, kMostKeys / kPack]
  T* output;      // [kMostQueries, D] likewise, unnormalised
  T* row_shift;   // [kMostQueries], maximum of the scores so far, not scaled
  T* row_sum;     // [kMostQueries], of exp2((score - shift) * scale_log2)
  RowsAhead ahead;
  int64_t packed_key = -1, packed_key_end = -1, packed_head = -1;  // what key_panels and values hold

  void carve(Carver& carver, const int64_t& most_keys, const int64_t& head_dim) {
    const int64_t stride = row_stride<T>(head_dim);
    carver.take(key_panels, round_up_to_lanes<T>(most_keys) * operand_depth(head_dim));
    const ValueRows<T> layout(head_dim);
    carver.take(values, (operand_depth(most_keys) * kPack + layout.tokens - 1) / layout.tokens * layout.stride);
    carver.take(rows, kRowsTogether<T> * stride);
    carver.take(query, kMostQueries * stride);
    carver.take(scores, kMostQueries * kScoreStride<T>);
    carver.take(output, kMostQueries * layout.stride);
    carver.take(row_shift, round_up_to_lanes<T>(kMostQueries));
    carver.take(row_sum, round_up_to_lanes<T>(kMostQueries));
  }
};

template <typename S, typename T>
void pack_keys_and_values(const Params& p, const AttentionItem& item, ForwardScratch<T>& scratch) {
  if (scratch.packed_key == item.key_begin && scratch.packed_key_end == item.key_end && scratch.packed_head == item.head_k) return;
  scratch.packed_key = item.key_begin;
  scratch.packed_key_end = item.key_end;
  scratch.packed_head = item.head_k;
  constexpr int L = kLanes<T>;
  const int64_t stride = row_stride<T>(p.head_dim), depth = operand_depth(p.head_dim), count = item.key_end - item.key_begin;
  const int64_t step = keys_per_block<T>(item);
  for (int64_t block = 0; block < count; block += step) {
    const int64_t in_block = min(count - block, step);
    for (int64_t j = 0; j < in_block; j += L) {
      const int64_t rows = min(in_block - j, L), token = item.key_begin + block + j;
      load_rows<S>(p.k, p.k_stride_token, p.k_stride_head, token, rows, block + j, count, item.head_k, key_tables<T>(p),
                   scratch.rows, stride, p);
      for (int64_t i = rows * stride; i < L * stride; ++i) scratch.rows[i] = 0;
      as_left_operand(scratch.rows, L, p.head_dim, stride);
      transpose_into_panels(scratch.rows, stride, depth, scratch.key_panels + block * depth, round_up_to_lanes<T>(in_block), j);
    }
  }
  const ValueRows<T> layout(p.head_dim);
  const auto load_values = [&](int64_t j, int64_t rows, T* to) {
    load_rows<S>(p.v, p.v_stride_token, p.v_stride_head, item.key_begin + j, rows, j, count, item.head_k, Tables<T>{}, to, stride,
                 p);
  };
  if (layout.tokens == 1) {
    load_values(0, count, scratch.values);
    return;
  }
  for (int64_t j = 0; j < count; j += kRowsTogether<T>) {
    const int64_t rows = min(count - j, kRowsTogether<T>);
    T* to = scratch.values + j / layout.tokens * layout.stride;
    load_values(j, rows, scratch.rows);
    as_right_operand(scratch.rows, rows, p.head_dim, stride, layout.halves ? scratch.rows : to);
    if (layout.halves) zip_rows(scratch.rows, (rows + kPack - 1) / kPack, stride, layout, to);
  }
}

// One block of scores -> probabilities, unnormalised; rescales what was accumulated before where a row's maximum grows. kLanes
// rows go together: what is one number per row is one lane of a vector, and no row waits for another's maximum.
//
// The maximum is subtracted before scaling, exactly zero where it is reached: score * scale - maximum * scale, one rounded and
// one fused, can be off by more than a float's exponent for scores beyond 5e9.
template <typename T>
void online_softmax(ForwardScratch<T>& scratch, int64_t queries, int64_t keys, const ValueRows<T>& layout, T scale_log2,
                    bool first) {
  constexpr int L = kLanes<T>;
  constexpr T kLowest = -std::numeric_limits<T>::infinity();
  const int64_t last = round_up_to_lanes<T>(keys) - L;  // the vector that may hold columns beyond the keys
  const BitVec<T> valid = first_lanes<T>(keys - last);
  for (int64_t i = 0; i < queries; i += L) {
    const int64_t rows = min(queries - i, L);
    T* scores[L];
    for (int64_t r = 0; r < L; ++r) scores[r] = scratch.scores + (i + min(r, rows - 1)) * kScoreStride<T>;

    Vec<T> tops[L], sums[L];
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) tops[r] = select<T>(valid, load(scores[r] + last), broadcast(kLowest));
    for (int64_t j = 0; j < last; j += L) {
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) tops[r] = max<T>(load(scores[r] + j), tops[r]);
    }
    const Vec<T> top = across_lanes<T>(tops, [](Vec<T> a, Vec<T> b) { return max<T>(a, b); });
    const Vec<T> old_shift = first ? broadcast(kLowest) : load(scratch.row_shift + i);
    const Vec<T> shift = max<T>(top, old_shift), fade = exp2((old_shift - shift) * scale_log2);
    store(scratch.row_shift + i, shift);

    for (int64_t r = 0; r < rows; ++r) {
      T* row = scores[r];
      const T shift_r = scratch.row_shift[i + r];
      Vec<T> sum[kTogether] = {};
      for (int64_t j = 0; j < keys; j += kTogether * L) {
        Vec<T> e[kTogether];
#pragma GCC unroll 8
        for (int n = 0; n < kTogether; ++n) e[n] = (load(row + j + n * L) - shift_r) * scale_log2;
        if (j + kTogether * L > keys) {
          for (int n = 0; n < kTogether; ++n) e[n] = select<T>(first_lanes<T>(keys - j - n * L), e[n], broadcast(kLowest));
        }
        if constexpr (kVectorBytes == 64) {  // the next rows' scores, which their maxima would wait for; AVX2 gains nothing
          for (int n = 0; n < kTogether; ++n) __builtin_prefetch(row + L * kScoreStride<T> + j + n * L);
        }
        weights_of(e);
#pragma GCC unroll 8
        for (int n = 0; n < kTogether; ++n) sum[n] += e[n];
        store_operands(row + j / kPack, e);
      }
      static_assert(kTogether == 2);
      sums[r] = sum[0] + sum[1];
    }
    for (int64_t r = rows; r < L; ++r) sums[r] = Vec<T>{};
    Vec<T> sum = across_lanes<T>(sums, [](Vec<T> a, Vec<T> b) { return a + b; });
    if (!first) {
      sum += load(scratch.row_sum + i) * fade;
      for (int64_t r = 0; r < rows; ++r) {
        if (fade[r] == 1) continue;
        T* out = scratch.output + (i + r) * layout.stride;
        for (int64_t d = 0; d < layout.vectors * L; d += L) store(out + d, load(out + d) * fade[r]);
      }
    }
    store(scratch.row_sum + i, sum);
  }
}

// Divides by the sums and writes out and lse.
template <typename S, typename T>
void store_outputs(const Params& p, ForwardScratch<T>& scratch, int64_t token, int64_t queries, int64_t head, T scale_log2,
                   bool any_keys) {
  const int64_t D = p.head_dim;
  const ValueRows<T> layout(D);
  for (int64_t i = 0; i < queries; ++i) {
    T* output = scratch.output + i * layout.stride;
    S* to = static_cast<S*>(p.out) + ((token + i) * p.num_heads + head) * D;
    ask_ahead(to, p.num_heads * D, i, queries, D);
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
void load_queries(const Params& p, ForwardScratch<T>& scratch, int64_t token, int64_t queries, int64_t head) {
  const int64_t stride = row_stride<T>(p.head_dim);
  load_rows<S>(p.q, p.q_stride_token, p.q_stride_head, token, queries, 0, queries, head, query_tables<T>(p), scratch.query, stride,
               p);
  if (p.scale < 0) {
    for (int64_t i = 0; i < queries * stride; ++i) scratch.query[i] = -scratch.query[i];
  }
  as_left_operand(scratch.query, queries, p.head_dim, stride);
}

template <typename S, typename T>
void forward_block(const Params& p, const AttentionItem& item, ForwardScratch<T>& scratch, int64_t token, int64_t queries,
                   int64_t head) {
  constexpr int L = kLanes<T>;
  const int64_t D = p.head_dim, stride = row_stride<T>(D);
  const int64_t count = item.key_end - item.key_begin, depth = operand_depth(D);
  const ValueRows<T> layout(D);
  const T scale_log2 = std::fabs(scale_in_bits<T>(p));
  load_queries<S>(p, scratch, token, queries, head);
  const int64_t step = keys_per_block<T>(item);
  for (int64_t block = 0; block < count; block += step) {
    const int64_t keys = min(count - block, step);
    product<T, RowsOfA::strided, RowsOfB::in_panels>(Result::overwritten, queries, round_up_to_lanes<T>(keys) / L, depth,
                                                     scratch.query, stride, scratch.key_panels + block * depth, 0, scratch.scores,
                                                     kScoreStride<T>, scratch.ahead);
    online_softmax(scratch, queries, keys, layout, scale_log2, block == 0);
    product_with_values(block == 0 ? Result::overwritten : Result::accumulated, queries, operand_depth(keys), scratch.scores,
                        kScoreStride<T>, scratch.values + block / layout.tokens * layout.stride, layout, scratch.output,
                        scratch.ahead);
  }
  store_outputs<S>(p, scratch, token, queries, head, scale_log2, count > 0);
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
  parallel_draws(workers, static_cast<int64_t>(items.size()), [&](int64_t worker, auto draw) {
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
#ifdef COMP_KERNELS_PAIRS
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
