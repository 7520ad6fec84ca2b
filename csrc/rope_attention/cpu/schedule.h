// How the work of rope_attention is cut into items that threads take one by one.
#pragma once

#include <cstdint>
#include <vector>

#include "comp_kernels/rope_attention.h"

namespace comp_kernels {

// Part of one (sequence, key head): all query heads that read it, a range of its queries, a range of its keys. Token ranges are
// rows of the packed tensors.
struct AttentionItem {
  int64_t head_k;
  int64_t query_begin, query_end;
  int64_t key_begin, key_end;
  bool query_gradients, key_gradients;  // backward: which of dq and (dk, dv) this item computes; ranges cover the others
};

// How finely items may be cut: ranges start at multiples of these within a sequence, so that the arithmetic of a row does not
// depend on the cut, nor on the number of threads.
struct BlockSizes {
  int64_t queries, keys;
};

std::vector<AttentionItem> forward_items(const comp_kernels_rope_attention_params& params, int64_t workers, BlockSizes blocks);
std::vector<AttentionItem> backward_items(const comp_kernels_rope_attention_params& params, int64_t workers, BlockSizes blocks);

// How many neighbours of so many items a worker takes: heads of one sequence, whose rows lie side by side and share cache lines
// and pages.
int64_t items_together(const comp_kernels_rope_attention_params& params, int64_t items, int64_t workers);

// The longest sequence of keys.
int64_t max_keys(const comp_kernels_rope_attention_params& params);

}  // namespace comp_kernels
