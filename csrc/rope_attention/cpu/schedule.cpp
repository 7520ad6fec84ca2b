// Cuts the work of rope_attention into items: one per (sequence, key head), the large ones into more when threads would idle.
#include "schedule.h"

#include <algorithm>

namespace comp_kernels {
namespace {

using Params = comp_kernels_rope_attention_params;

struct Lengths {
  int64_t queries, keys;
  int64_t scores() const { return queries * keys; }
};

Lengths lengths(const Params& p, int64_t sequence) {
  return {p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence], p.cu_seqlens_k[sequence + 1] - p.cu_seqlens_k[sequence]};
}

// Sequences with the most work first, so that the last items to finish are small ones. Empty ones are left out: of those there
// may be any number.
std::vector<int64_t> largest_first(const Params& p, int64_t workers) {
  std::vector<int64_t> order;
  order.reserve(std::min(p.num_sequences, p.num_tokens + p.num_tokens_k));
  for (int64_t b = 0; b < p.num_sequences; ++b) {
    if (lengths(p, b).queries + lengths(p, b).keys > 0) order.push_back(b);
  }
  if (workers > 1) {
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return lengths(p, a).scores() > lengths(p, b).scores(); });
  }
  return order;
}

// What every worker would do of all (sequence, key head) pairs if the work were spread evenly, in scores of one head.
double fair_share(const Params& p, int64_t workers) {
  double scores = 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) scores += static_cast<double>(lengths(p, b).scores());
  return scores * static_cast<double>(p.num_heads_k) / static_cast<double>(workers);
}

AttentionItem whole(const Params& p, int64_t b, int64_t head_k) {
  return {head_k, p.cu_seqlens[b], p.cu_seqlens[b + 1], p.cu_seqlens_k[b], p.cu_seqlens_k[b + 1], true, true};
}

// Appends `item` cut into about `parts` ranges of its queries (or keys), on block boundaries.
void append_cut(std::vector<AttentionItem>& items, AttentionItem item, int64_t parts, int64_t block, int64_t AttentionItem::* begin,
                int64_t AttentionItem::* end) {
  const int64_t first = item.*begin, last = item.*end;
  const int64_t step = ((last - first + parts - 1) / parts + block - 1) / block * block;
  for (int64_t at = first; at < last; at += step) {
    item.*begin = at;
    item.*end = std::min(at + step, last);
    items.push_back(item);
  }
}

}  // namespace

std::vector<AttentionItem> forward_items(const Params& p, int64_t workers, BlockSizes blocks) {
  const std::vector<int64_t> order = largest_first(p, workers);
  std::vector<AttentionItem> items;
  items.reserve(order.size() * p.num_heads_k);
  // Every part packs the keys again, so cut only what is large beside a worker's share.
  const double limit = fair_share(p, workers) / 4;
  for (int64_t b : order) {
    const Lengths n = lengths(p, b);
    if (n.queries == 0) continue;
    const double scores = static_cast<double>(n.scores());
    const int64_t parts = workers > 1 && scores > limit ? static_cast<int64_t>(scores / limit) + 1 : 1;
    for (int64_t head = 0; head < p.num_heads_k; ++head) {
      append_cut(items, whole(p, b, head), parts, blocks.queries, &AttentionItem::query_begin, &AttentionItem::query_end);
    }
  }
  return items;
}

std::vector<AttentionItem> backward_items(const Params& p, int64_t workers, BlockSizes blocks) {
  const std::vector<int64_t> order = largest_first(p, workers);
  std::vector<AttentionItem> items;
  items.reserve(order.size() * p.num_heads_k);
  // Computing dq apart from dk and dv repeats two of five products, and lets either be cut freely. It pays where one pair
  // would keep its thread busy for more than 7/5 of everybody's share.
  const double share = fair_share(p, workers);
  for (int64_t b : order) {
    const Lengths n = lengths(p, b);
    const double scores = static_cast<double>(n.scores());
    for (int64_t head = 0; head < p.num_heads_k; ++head) {
      AttentionItem item = whole(p, b, head);
      if (workers == 1 || scores <= share * 7 / 5) {
        items.push_back(item);
        continue;
      }
      const int64_t parts = static_cast<int64_t>(scores / share * 4) + 1;
      item.query_gradients = false;
      append_cut(items, item, parts, blocks.keys, &AttentionItem::key_begin, &AttentionItem::key_end);
      item.query_gradients = true;
      item.key_gradients = false;
      append_cut(items, item, parts, blocks.queries, &AttentionItem::query_begin, &AttentionItem::query_end);
    }
  }
  return items;
}

int64_t items_together(const Params& p, int64_t items, int64_t workers) {
  // All heads of a sequence where there are two for every worker, else each worker's part of them; of very many items more.
  const int64_t heads = items >= 2 * workers * p.num_heads_k ? p.num_heads_k : p.num_heads_k / workers;
  return std::min<int64_t>(std::max<int64_t>({heads, items / (8 * workers), 1}), 16);
}

int64_t max_keys(const Params& p) {
  int64_t longest = 0;
  for (int64_t b = 0; b < p.num_sequences; ++b) longest = std::max(longest, lengths(p, b).keys);
  return longest;
}

}  // namespace comp_kernels
