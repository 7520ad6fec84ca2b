// C entry points of rope_attention on CUDA: check, lay out the workspace, fill the kernels' params, launch. No device code.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "backward.cuh"
#include "backward_sm90.cuh"
#include "forward.cuh"
#include "short_backward.cuh"
#include "short_forward.cuh"
#include "comp_kernels/export.h"
#include "comp_kernels/rope_attention.h"
#include "prepare.cuh"
#include "persistent_sm90.cuh"
#include "prepare_sm90.cuh"
#include "rope_attention.h"
#include "tile_images.cuh"

namespace comp_kernels {
namespace {

using Params = comp_kernels_rope_attention_params;

enum class Pass { kForward, kBackwardQueries, kBackwardKeys, kBackwardValues };

// kBackwardValues: one without a function where the kernel of kBackwardKeys makes both gradients.
template <typename T, int kHeadDim>
Kernel kernel_of(Pass pass) {
  if (pass == Pass::kForward) return forward_kernel<T, kHeadDim>();
  if (pass == Pass::kBackwardQueries) return backward_kernel<T, kHeadDim, Gradients::kQueries>();
  if constexpr (kHeadDim <= kSharedKeysHeadDim) {
    return pass == Pass::kBackwardKeys ? backward_kernel<T, kHeadDim, Gradients::kKeysAndValues>() : Kernel{};
  } else {
    return pass == Pass::kBackwardKeys ? backward_kernel<T, kHeadDim, Gradients::kKeys>()
                                       : backward_kernel<T, kHeadDim, Gradients::kValues>();
  }
}

template <typename T>
Kernel kernel_of(Pass pass, int64_t head_dim) {
  constexpr bool kHalves = std::is_same_v<T, bf16> || std::is_same_v<T, fp16>;  // float32 has fewer sizes of its own
  if (head_dim <= 32) return kernel_of<T, 32>(pass);
  if (head_dim <= 64) return kernel_of<T, 64>(pass);
  if (head_dim <= 72) return kernel_of<T, kHalves ? 72 : 80>(pass);
  if (head_dim <= 80) return kernel_of<T, 80>(pass);
  if (head_dim <= 96) return kernel_of<T, kHalves ? 96 : 128>(pass);
  if (head_dim <= 128) return kernel_of<T, 128>(pass);
  if (head_dim <= 192) return kernel_of<T, kHalves ? 192 : 256>(pass);
  return kernel_of<T, 256>(pass);
}

bool is_float32(const Params& p) { return p.dtype == COMP_KERNELS_FLOAT32; }

int64_t element_bytes(const Params& p) { return is_float32(p) ? 4 : 2; }

Kernel kernel_of(const Params& p, Pass pass) {
  if (is_float32(p)) return p.tf32 ? kernel_of<tf32>(pass, p.head_dim) : kernel_of<tf32x3>(pass, p.head_dim);
  return p.dtype == COMP_KERNELS_BFLOAT16 ? kernel_of<bf16>(pass, p.head_dim) : kernel_of<fp16>(pass, p.head_dim);
}

#if COMP_KERNELS_SM90A
template <typename T, int kHeadDim>
Kernel sm90_kernel_of(Pass pass) {
  if (pass == Pass::kForward) return forward_sm90_kernel<T, kHeadDim>();
  return pass == Pass::kBackwardQueries ? backward_sm90_kernel<T, kHeadDim, false>() : backward_sm90_kernel<T, kHeadDim, true>();
}
template <typename T>
Kernel sm90_kernel_of(Pass pass, int64_t head_dim) {
  switch (head_dim) {
    case 64: return sm90_kernel_of<T, 64>(pass);
    case 72: return sm90_kernel_of<T, 72>(pass);
    case 80: return sm90_kernel_of<T, 80>(pass);
    case 96: return sm90_kernel_of<T, 96>(pass);
    default: return sm90_kernel_of<T, 128>(pass);
  }
}
template <typename T>
Kernel persistent_kernel_of(int64_t head_dim) {
  switch (head_dim) {
    case 64: return persistent_sm90_kernel<T, 64>();
    case 72: return persistent_sm90_kernel<T, 72>();
    case 80: return persistent_sm90_kernel<T, 80>();
    case 96: return persistent_sm90_kernel<T, 96>();
    default: return persistent_sm90_kernel<T, 128>();
  }
}
#else
template <typename T>
Kernel sm90_kernel_of(Pass, int64_t) {
  return {};
}
template <typename T>
Kernel persistent_kernel_of(int64_t) {
  return {};
}
template <typename T>
Kernel prepare_persistent_kernel() {
  return {};
}
template <typename T>
Kernel prepare_sm90_kernel() {
  return {};
}
template <typename T>
Kernel images_kernel() {
  return {};
}
#endif

Kernel sm90_kernel_of(const Params& p, Pass pass) {
  return p.dtype == COMP_KERNELS_BFLOAT16 ? sm90_kernel_of<bf16>(pass, p.head_dim) : sm90_kernel_of<fp16>(pass, p.head_dim);
}

// Whether the sm_90a kernels serve: compiled in, on such a device, for this head size.
bool takes_sm90(const Params& p) {
  const int64_t d = p.head_dim;
  return COMP_KERNELS_SM90A && !is_float32(p) && compute_capability() == 90 &&
         (d == 64 || d == 72 || d == 80 || d == 96 || d == 128);
}

// Tiles of the sm_90a backward have 128 rows: for short sequences smaller ones do less in vain (197 tokens: 0.92x measured).
bool takes_sm90_backward(const Params& p) {
  const int64_t enough = 2 * kImageKeys * p.num_sequences;
  return takes_sm90(p) && p.num_tokens >= enough && p.num_tokens_k >= enough;
}

// Blocks of the persistent sm_90a forward; 0: it is not used, for it has not run on a GPU yet.
int persistent_blocks = 0;

Kernel persistent_kernel_of(const Params& p) {
  return p.dtype == COMP_KERNELS_BFLOAT16 ? persistent_kernel_of<bf16>(p.head_dim) : persistent_kernel_of<fp16>(p.head_dim);
}

// Whether kernels of sm_90a are launched before the one that prepares for them has ended (kernel.h), and whether their forwards read
// values where they are. Both are off: they have not run on a GPU yet.
bool dependent_launches = false, values_in_place = false;

// Calls whose sequences have at most this many rows on average go to the kernels for short sequences. They are right for any
// length: only speed depends on the guess. None do unless asked for: they have not run on a GPU yet.
int short_length = 0;

template <typename T, int kHeadDim, int kKeys>
Kernel short_kernel(bool backward) {
  return backward ? short_backward_kernel<T, kHeadDim, kKeys>() : short_forward_kernel<T, kHeadDim, kKeys>();
}
template <typename T, int kKeys>
Kernel short_kernel(int64_t head_dim, bool backward) {
  switch (head_dim) {
    case 64: return short_kernel<T, 64, kKeys>(backward);
    case 72: return short_kernel<T, 72, kKeys>(backward);
    case 80: return short_kernel<T, 80, kKeys>(backward);
    case 96: return short_kernel<T, 96, kKeys>(backward);
    case 128: return short_kernel<T, 128, kKeys>(backward);
    default: return {};
  }
}
template <typename T>
Kernel short_kernel(int64_t head_dim, bool backward, int64_t length) {
  return length <= 64 ? short_kernel<T, 64>(head_dim, backward) : short_kernel<T, 256>(head_dim, backward);
}

int64_t average_length(const Params& p) {
  return (std::max(p.num_tokens, p.num_tokens_k) + p.num_sequences - 1) / std::max<int64_t>(p.num_sequences, 1);
}

// Shared memory that a block may have on every device of this capability.
int most_shared_bytes() {
  switch (compute_capability()) {
    case 80:
    case 87: return 163 * 1024;
    case 90:
    case 100:
    case 103: return 227 * 1024;
    default: return 99 * 1024;
  }
}

// The kernel for short sequences if this call is one for it, else one without a function.
Kernel short_kernel_of(const Params& p, bool backward) {
  const int64_t length = average_length(p);
  if (p.num_sequences == 0 || length > short_length || is_float32(p)) return {};
  const Kernel kernel = p.dtype == COMP_KERNELS_BFLOAT16 ? short_kernel<bf16>(p.head_dim, backward, length)
                                                         : short_kernel<fp16>(p.head_dim, backward, length);
  return kernel.shared_bytes <= most_shared_bytes() ? kernel : Kernel{};
}

Kernel prepare_kernel_of(const Params& p) {
  if (is_float32(p)) return prepare_kernel<tf32>();
  return p.dtype == COMP_KERNELS_BFLOAT16 ? prepare_kernel<bf16>() : prepare_kernel<fp16>();
}

// Device memory between the kernels of one call, laid out the same way whether its size is asked for or it is used.
struct Workspace {
  char* next;  // null while only the size is wanted
  int64_t bytes = 0;

  explicit Workspace(void* memory) : next(static_cast<char*>(memory)) {}

  template <typename T>
  T* take(int64_t count) {
    const int64_t size = (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    bytes += size;
    if (next == nullptr) return nullptr;
    char* taken = next;
    next += size;
    return reinterpret_cast<T*>(taken);
  }
};

// A copy of a tensor; null while only the size is wanted.
char* take_copy(Workspace& memory, const Params& p, int64_t tokens, int64_t heads) {
  return memory.take<char>(tokens * heads * p.head_dim * element_bytes(p));
}

struct ForwardWorkspace {
  Tile* tiles;
  void* turned_k;  // null without rotation, as turned_q

  ForwardWorkspace(Workspace& memory, const Params& p)
      : tiles(memory.take<Tile>(max_tiles(p.num_tokens, p.num_sequences, kernel_of(p, Pass::kForward).rows))),
        turned_k(p.cos_k ? take_copy(memory, p, p.num_tokens_k, p.num_heads_k) : nullptr) {}
};

struct ForwardSm90Workspace {
  int64_t slots;  // key tiles per head
  uint16_t *k_images, *v_images;  // v_images: null where values stay where they are
  Tile* tiles;  // null where blocks find their own

  ForwardSm90Workspace(Workspace& memory, const Params& p) : slots(max_tiles(p.num_tokens_k, p.num_sequences, kImageKeys)) {
    const int64_t images = p.num_heads_k * slots * kImageKeys * p.head_dim;
    k_images = memory.take<uint16_t>(images);
    v_images = values_in_place ? nullptr : memory.take<uint16_t>(images);
    const int64_t num_tiles = max_tiles(p.num_tokens, p.num_sequences, sm90_kernel_of(p, Pass::kForward).rows);
    tiles = values_in_place || dependent_launches ? nullptr : memory.take<Tile>(num_tiles);
  }
};

struct PersistentWorkspace {
  int64_t slots, slots_k, num_tiles;
  LongestFirstTile* tiles;
  uint16_t *q, *k, *v;  // images; v: null where values stay where they are

  PersistentWorkspace(Workspace& memory, const Params& p)
      : slots(max_tiles(p.num_tokens, p.num_sequences, kImageKeys)),
        slots_k(max_tiles(p.num_tokens_k, p.num_sequences, kImageKeys)),
        num_tiles(max_tiles(p.num_tokens, p.num_sequences, persistent_kernel_of(p).rows)),
        tiles(memory.take<LongestFirstTile>(num_tiles)),
        q(memory.take<uint16_t>(p.num_heads * slots * kImageKeys * p.head_dim)),
        k(memory.take<uint16_t>(p.num_heads_k * slots_k * kImageKeys * p.head_dim)),
        v(values_in_place ? nullptr : memory.take<uint16_t>(p.num_heads_k * slots_k * kImageKeys * p.head_dim)) {}
};

struct BackwardWorkspace {
  Tile *query_tiles, *key_tiles;
  RowStats* stats;
  float* low;
  int* huge;
  void *turned_q, *turned_k;

  BackwardWorkspace(Workspace& memory, const Params& p)
      : query_tiles(memory.take<Tile>(max_tiles(p.num_tokens, p.num_sequences, kernel_of(p, Pass::kBackwardQueries).rows))),
        key_tiles(memory.take<Tile>(max_tiles(p.num_tokens_k, p.num_sequences, kernel_of(p, Pass::kBackwardKeys).rows))),
        stats(memory.take<RowStats>(p.num_tokens * p.num_heads)),
        low(memory.take<float>(p.num_tokens * p.num_heads)),
        huge(memory.take<int>(row_blocks(static_cast<int>(p.num_tokens), static_cast<int>(p.num_heads)))),
        turned_q(p.cos ? take_copy(memory, p, p.num_tokens, p.num_heads) : nullptr),
        turned_k(p.cos_k ? take_copy(memory, p, p.num_tokens_k, p.num_heads_k) : nullptr) {}
};

struct BackwardSm90Workspace {
  int64_t query_slots, key_slots;
  Tile *query_tiles, *key_tiles;
  RowStats* stats;
  float* low;
  int* huge;
  uint16_t *q, *grad_out, *k, *v;  // images

  BackwardSm90Workspace(Workspace& memory, const Params& p)
      : query_slots(max_tiles(p.num_tokens, p.num_sequences, kImageKeys)),
        key_slots(max_tiles(p.num_tokens_k, p.num_sequences, kImageKeys)),
        query_tiles(memory.take<Tile>(query_slots)),
        key_tiles(memory.take<Tile>(key_slots)),
        stats(memory.take<RowStats>(p.num_heads * query_slots * kImageKeys)),
        low(memory.take<float>(p.num_heads * query_slots * kImageKeys)),
        huge(memory.take<int>(p.num_heads * query_slots)),
        q(memory.take<uint16_t>(p.num_heads * query_slots * kImageKeys * p.head_dim)),
        grad_out(memory.take<uint16_t>(p.num_heads * query_slots * kImageKeys * p.head_dim)),
        k(memory.take<uint16_t>(p.num_heads_k * key_slots * kImageKeys * p.head_dim)),
        v(memory.take<uint16_t>(p.num_heads_k * key_slots * kImageKeys * p.head_dim)) {}
};

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

const char* check_operand(const Params& p, const char* name, const void* data, int64_t stride_token, int64_t stride_head) {
  const int64_t chunk = 16 / element_bytes(p);
  if (aligned(data) && stride_token % chunk == 0 && stride_head % chunk == 0) return nullptr;
  return failure("%s must start at a multiple of 16 bytes with strides that are multiples of %lld, got strides %lld, %lld", name,
                 static_cast<long long>(chunk), static_cast<long long>(stride_token), static_cast<long long>(stride_head));
}

const char* check(const Params& p, bool backward) {
  if (p.dtype != COMP_KERNELS_BFLOAT16 && p.dtype != COMP_KERNELS_FLOAT16 && !is_float32(p)) {
    return failure("dtype must be bfloat16, float16 or float32, got code %lld", static_cast<long long>(p.dtype));
  }
  if (p.head_dim <= 0 || p.head_dim % 8 != 0 || p.head_dim > kMaxHeadDim) {
    return failure("head_dim must be a multiple of 8 and at most %d, got %lld", kMaxHeadDim, static_cast<long long>(p.head_dim));
  }
  if (std::max(p.num_tokens, p.num_tokens_k) > INT32_MAX / 2) {
    return failure("at most %d tokens, got %lld and %lld", INT32_MAX / 2, static_cast<long long>(p.num_tokens),
                   static_cast<long long>(p.num_tokens_k));
  }
  if (const char* wrong = check_operand(p, "q", p.q, p.q_stride_token, p.q_stride_head)) return wrong;
  if (const char* wrong = check_operand(p, "k", p.k, p.k_stride_token, p.k_stride_head)) return wrong;
  if (const char* wrong = check_operand(p, "v", p.v, p.v_stride_token, p.v_stride_head)) return wrong;
  if (backward) {
    if (const char* wrong = check_operand(p, "grad_out", p.grad_out, p.grad_out_stride_token, p.grad_out_stride_head)) return wrong;
  }
  if (!aligned(p.cos) || !aligned(p.sin) || !aligned(p.cos_k) || !aligned(p.sin_k)) {
    return failure("the tables must start at multiples of 16 bytes");
  }
  return nullptr;
}

Tables tables_of(const Params& p, bool keys) {
  const int64_t heads = keys ? p.table_heads_k : p.table_heads;
  Tables tables{};
  tables.cos = static_cast<const float*>(keys ? p.cos_k : p.cos);
  tables.sin = static_cast<const float*>(keys ? p.sin_k : p.sin);
  tables.token_stride = static_cast<int>(heads * p.table_width);
  tables.head_stride = static_cast<int>(heads > 1 ? p.table_width : 0);
  tables.rotary_dim = static_cast<int>(p.rotary_dim);
  tables.pair_stride = static_cast<int>(p.pair_stride);
  tables.width = static_cast<int>(p.table_width);
  return tables;
}

// As the kernels take it: keys that do not exist are given an infinite score, and 0 times infinity is no number. With this in the
// place of 0 all weights are equal just as well.
float scale_of(const Params& p) { return std::abs(p.scale) < 1e-30 ? 1e-30f : static_cast<float>(p.scale); }

ListJob list_of(const Params& p, bool keys, Tile* tiles, int rows) {
  ListJob job{};
  job.tiles = tiles;
  job.cu_seqlens = keys ? p.cu_seqlens_k : p.cu_seqlens;
  job.cu_seqlens_other = keys ? p.cu_seqlens : p.cu_seqlens_k;
  job.tokens = static_cast<int>(keys ? p.num_tokens_k : p.num_tokens);
  job.tile = rows;
  return job;
}

RotateJob rotation_of(const Params& p, bool keys, void* turned) {
  RotateJob job{};
  job.x = keys ? p.k : p.q;
  job.turned = turned;
  job.cu_seqlens = keys ? p.cu_seqlens_k : p.cu_seqlens;
  job.tables = tables_of(p, keys);
  job.stride_token = keys ? p.k_stride_token : p.q_stride_token;
  job.stride_head = keys ? p.k_stride_head : p.q_stride_head;
  job.tokens = static_cast<int>(keys ? p.num_tokens_k : p.num_tokens);
  job.heads = static_cast<int>(keys ? p.num_heads_k : p.num_heads);
  return job;
}

const char* launch_prepare(const Params& p, PrepareParams& prepare, void* stream) {
  prepare.sequences = static_cast<int>(p.num_sequences);
  prepare.head_dim = static_cast<int>(p.head_dim);
  int64_t blocks = prepare.num_lists + row_blocks(prepare.stats.tokens, prepare.stats.heads);
  for (int i = 0; i < prepare.num_rotations; ++i) {
    blocks += row_blocks(prepare.rotations[i].tokens, prepare.rotations[i].heads);
  }
  return launch(prepare_kernel_of(p), blocks, 1, prepare, stream);
}

// A tensor, or its turned copy [heads, tokens, head_dim].
Operand operand(const void* data, int64_t stride_token, int64_t stride_head, const void* turned, int64_t tokens, int64_t head_dim) {
  if (turned != nullptr) return {turned, head_dim, tokens * head_dim};
  return {data, stride_token, stride_head};
}

// What both forward kernels need, but for their keys and values.
ForwardParams forward_params(const Params& p, const Tile* tiles) {
  ForwardParams params{};
  params.q = p.q;
  params.q_stride_token = p.q_stride_token, params.q_stride_head = p.q_stride_head;
  params.out = p.out;
  params.lse = static_cast<double*>(p.lse);
  params.tiles = tiles;
  params.tables = tables_of(p, false);
  params.num_tokens = static_cast<int>(p.num_tokens);
  params.num_heads = static_cast<int>(p.num_heads);
  params.heads_per_key_head = static_cast<int>(p.num_heads / p.num_heads_k);
  params.head_dim = static_cast<int>(p.head_dim);
  params.scale = scale_of(p);
  return params;
}

// Values where they are.
void take_values(const Params& p, ForwardParams& params) {
  params.v = p.v, params.v_stride_token = p.v_stride_token, params.v_stride_head = p.v_stride_head;
}

const char* forward_sm80(const Params& p, void* memory, void* stream) {
  Workspace workspace_memory(memory);
  const ForwardWorkspace workspace(workspace_memory, p);
  const Kernel kernel = kernel_of(p, Pass::kForward);

  PrepareParams prepare{};
  prepare.lists[prepare.num_lists++] = list_of(p, false, workspace.tiles, kernel.rows);
  if (p.cos_k != nullptr) prepare.rotations[prepare.num_rotations++] = rotation_of(p, true, workspace.turned_k);
  if (const char* wrong = launch_prepare(p, prepare, stream)) return wrong;

  ForwardParams params = forward_params(p, workspace.tiles);
  const Operand k = operand(p.k, p.k_stride_token, p.k_stride_head, workspace.turned_k, p.num_tokens_k, p.head_dim);
  params.k = k.data, params.k_stride_token = k.stride_token, params.k_stride_head = k.stride_head;
  take_values(p, params);
  return launch(kernel, max_tiles(p.num_tokens, p.num_sequences, kernel.rows), p.num_heads, params, stream);
}

const char* forward_sm90(const Params& p, void* memory, void* stream) {
  Workspace workspace_memory(memory);
  const ForwardSm90Workspace workspace(workspace_memory, p);
  const Kernel kernel = sm90_kernel_of(p, Pass::kForward);

  ImageParams images{};
  images.k = static_cast<const uint16_t*>(p.k), images.v = static_cast<const uint16_t*>(p.v);
  images.k_images = workspace.k_images, images.v_images = workspace.v_images;
  images.cu_seqlens_k = p.cu_seqlens_k;
  images.tables = tables_of(p, true);
  images.k_stride_token = p.k_stride_token, images.k_stride_head = p.k_stride_head;
  images.v_stride_token = p.v_stride_token, images.v_stride_head = p.v_stride_head;
  images.list = list_of(p, false, workspace.tiles, kernel.rows);
  images.sequences = static_cast<int>(p.num_sequences);
  images.slots = static_cast<int>(workspace.slots);
  images.head_dim = static_cast<int>(p.head_dim);
  const Kernel maker = p.dtype == COMP_KERNELS_BFLOAT16 ? images_kernel<bf16>() : images_kernel<fp16>();
  if (const char* wrong = launch(maker, workspace.slots + 1, p.num_heads_k, images, stream)) return wrong;

  ForwardSm90Params params{};
  ForwardParams& attention = params.attention = forward_params(p, workspace.tiles);
  attention.k = workspace.k_images;
  attention.k_stride_head = attention.v_stride_head = workspace.slots * kImageKeys * p.head_dim;
  attention.v = workspace.v_images;
  if (values_in_place) take_values(p, attention);
  params.cu_seqlens = p.cu_seqlens, params.cu_seqlens_k = p.cu_seqlens_k;
  params.sequences = static_cast<int>(p.num_sequences);
  params.values_in_place = values_in_place;
  return launch(kernel, max_tiles(p.num_tokens, p.num_sequences, kernel.rows), p.num_heads, params, stream, dependent_launches);
}

ImageJob image_of(const void* x, int64_t stride_token, int64_t stride_head, const Tables& tables, uint16_t* images) {
  return {static_cast<const uint16_t*>(x), images, tables, stride_token, stride_head};
}

const char* forward_persistent(const Params& p, void* memory, void* stream) {
  Workspace workspace_memory(memory);
  const PersistentWorkspace workspace(workspace_memory, p);
  const Kernel kernel = persistent_kernel_of(p);

  PersistentPrepareParams prepare{};
  prepare.q = image_of(p.q, p.q_stride_token, p.q_stride_head, tables_of(p, false), workspace.q);
  prepare.k = image_of(p.k, p.k_stride_token, p.k_stride_head, tables_of(p, true), workspace.k);
  prepare.v = image_of(p.v, p.v_stride_token, p.v_stride_head, {}, workspace.v);
  prepare.tiles = workspace.tiles;
  prepare.cu_seqlens = p.cu_seqlens, prepare.cu_seqlens_k = p.cu_seqlens_k;
  prepare.tokens = static_cast<int>(p.num_tokens);
  prepare.heads = static_cast<int>(p.num_heads), prepare.heads_k = static_cast<int>(p.num_heads_k);
  prepare.slots = static_cast<int>(workspace.slots), prepare.slots_k = static_cast<int>(workspace.slots_k);
  prepare.sequences = static_cast<int>(p.num_sequences);
  prepare.head_dim = static_cast<int>(p.head_dim);
  prepare.tile_rows = kernel.rows;
  const Kernel maker = p.dtype == COMP_KERNELS_BFLOAT16 ? prepare_persistent_kernel<bf16>() : prepare_persistent_kernel<fp16>();
  const int64_t images = workspace.slots * p.num_heads + (values_in_place ? 1 : 2) * workspace.slots_k * p.num_heads_k;
  if (const char* wrong = launch(maker, images + 1, 1, prepare, stream)) return wrong;

  PersistentParams params{};
  params.attention = forward_params(p, nullptr);
  params.attention.q = workspace.q, params.attention.k = workspace.k, params.attention.v = workspace.v;
  params.attention.q_stride_head = workspace.slots * kImageKeys * p.head_dim;
  params.attention.k_stride_head = params.attention.v_stride_head = workspace.slots_k * kImageKeys * p.head_dim;
  if (values_in_place) take_values(p, params.attention);
  params.values_in_place = values_in_place;
  params.tiles = workspace.tiles;
  params.num_tiles = static_cast<int>(workspace.num_tiles);
  const int64_t items = workspace.num_tiles * p.num_heads;
  if (items > INT32_MAX / 2)
    return failure("at most %d tiles of all heads, got %lld", INT32_MAX / 2, static_cast<long long>(items));
  return launch(kernel, std::min<int64_t>(persistent_blocks, items), 1, params, stream, dependent_launches);
}

const char* forward_short(const Params& p, const Kernel& kernel, void* stream) {
  ShortForwardParams params{};
  params.attention = forward_params(p, nullptr);
  params.attention.k = p.k, params.attention.v = p.v;
  params.attention.k_stride_token = p.k_stride_token, params.attention.k_stride_head = p.k_stride_head;
  params.attention.v_stride_token = p.v_stride_token, params.attention.v_stride_head = p.v_stride_head;
  params.key_tables = tables_of(p, true);
  params.cu_seqlens = p.cu_seqlens, params.cu_seqlens_k = p.cu_seqlens_k;
  params.sequences = static_cast<int>(p.num_sequences);
  return launch(kernel, short_blocks(p.num_tokens, p.num_sequences, kernel.rows), p.num_heads, params, stream);
}

const char* forward(const Params& p, void* memory, void* stream) {
  if (const char* wrong = check(p, false)) return wrong;
  if (const Kernel kernel = short_kernel_of(p, false); kernel.function != nullptr) return forward_short(p, kernel, stream);
  if (!takes_sm90(p)) return forward_sm80(p, memory, stream);
  return persistent_blocks > 0 ? forward_persistent(p, memory, stream) : forward_sm90(p, memory, stream);
}

GradientParams gradient_of(const Params& p, bool keys) {
  GradientParams gradient{};
  gradient.dx = keys ? p.dk : p.dq;
  gradient.x = keys ? p.k : p.q;
  gradient.x_stride_token = keys ? p.k_stride_token : p.q_stride_token;
  gradient.x_stride_head = keys ? p.k_stride_head : p.q_stride_head;
  gradient.tables = tables_of(p, keys);
  gradient.dcos = static_cast<float*>(keys ? p.dcos_k : p.dcos);
  gradient.dsin = static_cast<float*>(keys ? p.dsin_k : p.dsin);
  gradient.heads = static_cast<int>(keys ? p.num_heads_k : p.num_heads);
  return gradient;
}

template <typename Workspace>
StatsJob stats_of(const Params& p, const Workspace& workspace) {
  StatsJob job{};
  job.out = p.out;
  job.grad_out = p.grad_out;
  job.lse = static_cast<const double*>(p.lse);
  job.grad_lse = static_cast<const double*>(p.grad_lse);
  job.stats = workspace.stats, job.low = workspace.low, job.huge = workspace.huge;
  job.cu_seqlens = p.cu_seqlens;
  job.stride_token = p.grad_out_stride_token, job.stride_head = p.grad_out_stride_head;
  job.tokens = static_cast<int>(p.num_tokens);
  job.heads = static_cast<int>(p.num_heads);
  return job;
}

const char* backward_sm90(const Params& p, void* memory, void* stream) {
  Workspace workspace_memory(memory);
  const BackwardSm90Workspace workspace(workspace_memory, p);

  PrepareSm90Params prepare{};
  prepare.queries.first = image_of(p.q, p.q_stride_token, p.q_stride_head, tables_of(p, false), workspace.q);
  prepare.queries.second = image_of(p.grad_out, p.grad_out_stride_token, p.grad_out_stride_head, {}, workspace.grad_out);
  prepare.keys.first = image_of(p.k, p.k_stride_token, p.k_stride_head, tables_of(p, true), workspace.k);
  prepare.keys.second = image_of(p.v, p.v_stride_token, p.v_stride_head, {}, workspace.v);
  prepare.queries.cu_seqlens = p.cu_seqlens, prepare.keys.cu_seqlens = p.cu_seqlens_k;
  prepare.queries.tiles = workspace.query_tiles, prepare.keys.tiles = workspace.key_tiles;
  prepare.queries.tokens = static_cast<int>(p.num_tokens), prepare.keys.tokens = static_cast<int>(p.num_tokens_k);
  prepare.queries.heads = static_cast<int>(p.num_heads), prepare.keys.heads = static_cast<int>(p.num_heads_k);
  prepare.queries.slots = static_cast<int>(workspace.query_slots), prepare.keys.slots = static_cast<int>(workspace.key_slots);
  prepare.stats = stats_of(p, workspace);
  prepare.sequences = static_cast<int>(p.num_sequences);
  prepare.head_dim = static_cast<int>(p.head_dim);
  const Kernel preparation = p.dtype == COMP_KERNELS_BFLOAT16 ? prepare_sm90_kernel<bf16>() : prepare_sm90_kernel<fp16>();
  const int64_t blocks = 2 * (workspace.query_slots * p.num_heads + workspace.key_slots * p.num_heads_k);
  if (const char* wrong = launch(preparation, blocks, 1, prepare, stream)) return wrong;

  BackwardSm90Params params{};
  params.stats = workspace.stats, params.low = workspace.low, params.huge = workspace.huge;
  params.heads_per_key_head = static_cast<int>(p.num_heads / p.num_heads_k);
  params.scale = scale_of(p);

  params.row_one = workspace.k, params.row_two = workspace.v;
  params.column_one = workspace.q, params.column_two = workspace.grad_out;
  params.row_slots = static_cast<int>(workspace.key_slots), params.column_slots = static_cast<int>(workspace.query_slots);
  params.tiles = workspace.key_tiles;
  params.first = gradient_of(p, true);
  params.second.dx = p.dv;
  params.second.heads = static_cast<int>(p.num_heads_k);
  const Kernel of_keys = sm90_kernel_of(p, Pass::kBackwardKeys), of_queries = sm90_kernel_of(p, Pass::kBackwardQueries);
  if (const char* wrong = launch(of_keys, workspace.key_slots, p.num_heads_k, params, stream, dependent_launches)) return wrong;
  std::swap(params.row_one, params.column_one);
  std::swap(params.row_two, params.column_two);
  std::swap(params.row_slots, params.column_slots);
  params.tiles = workspace.query_tiles;
  params.first = gradient_of(p, false);
  return launch(of_queries, workspace.query_slots, p.num_heads, params, stream, dependent_launches);
}

const char* backward_short(const Params& p, const Kernel& kernel, void* stream) {
  ShortBackwardParams params{};
  params.q = operand(p.q, p.q_stride_token, p.q_stride_head, nullptr, 0, 0);
  params.k = operand(p.k, p.k_stride_token, p.k_stride_head, nullptr, 0, 0);
  params.v = operand(p.v, p.v_stride_token, p.v_stride_head, nullptr, 0, 0);
  params.grad_out = operand(p.grad_out, p.grad_out_stride_token, p.grad_out_stride_head, nullptr, 0, 0);
  params.out = p.out;
  params.lse = static_cast<const double*>(p.lse);
  params.grad_lse = static_cast<const double*>(p.grad_lse);
  params.dq = gradient_of(p, false);
  params.dk = gradient_of(p, true);
  params.dv.dx = p.dv;
  params.dv.heads = static_cast<int>(p.num_heads_k);
  params.cu_seqlens = p.cu_seqlens, params.cu_seqlens_k = p.cu_seqlens_k;
  params.sequences = static_cast<int>(p.num_sequences);
  params.num_tokens = static_cast<int>(p.num_tokens);
  params.num_tokens_k = static_cast<int>(p.num_tokens_k);
  params.heads_per_key_head = static_cast<int>(p.num_heads / p.num_heads_k);
  params.scale = scale_of(p);
  return launch(kernel, short_blocks(p.num_tokens_k, p.num_sequences, kernel.rows), p.num_heads_k, params, stream);
}

const char* backward_sm80(const Params& p, void* memory, void* stream) {
  Workspace workspace_memory(memory);
  const BackwardWorkspace workspace(workspace_memory, p);
  const Kernel of_queries = kernel_of(p, Pass::kBackwardQueries), of_keys = kernel_of(p, Pass::kBackwardKeys);
  const Kernel of_values = kernel_of(p, Pass::kBackwardValues);  // shares the tiles of of_keys

  PrepareParams prepare{};
  prepare.lists[prepare.num_lists++] = list_of(p, false, workspace.query_tiles, of_queries.rows);
  prepare.lists[prepare.num_lists++] = list_of(p, true, workspace.key_tiles, of_keys.rows);
  if (p.cos != nullptr) prepare.rotations[prepare.num_rotations++] = rotation_of(p, false, workspace.turned_q);
  if (p.cos_k != nullptr) prepare.rotations[prepare.num_rotations++] = rotation_of(p, true, workspace.turned_k);
  prepare.stats = stats_of(p, workspace);
  if (const char* wrong = launch_prepare(p, prepare, stream)) return wrong;

  BackwardParams params{};
  params.q = operand(p.q, p.q_stride_token, p.q_stride_head, workspace.turned_q, p.num_tokens, p.head_dim);
  params.k = operand(p.k, p.k_stride_token, p.k_stride_head, workspace.turned_k, p.num_tokens_k, p.head_dim);
  params.v = operand(p.v, p.v_stride_token, p.v_stride_head, nullptr, 0, 0);
  params.grad_out = operand(p.grad_out, p.grad_out_stride_token, p.grad_out_stride_head, nullptr, 0, 0);
  params.stats = workspace.stats, params.low = workspace.low, params.huge = workspace.huge;
  params.huge_blocks = row_blocks(static_cast<int>(p.num_tokens), 1);
  params.num_tokens = static_cast<int>(p.num_tokens);
  params.heads_per_key_head = static_cast<int>(p.num_heads / p.num_heads_k);
  params.head_dim = static_cast<int>(p.head_dim);
  params.scale = scale_of(p);

  params.tiles = workspace.key_tiles;
  params.first = gradient_of(p, true);
  params.second.dx = p.dv;
  params.second.heads = static_cast<int>(p.num_heads_k);
  for (const Kernel& kernel : {of_keys, of_values}) {
    if (kernel.function == nullptr) continue;
    const int64_t tiles = max_tiles(p.num_tokens_k, p.num_sequences, kernel.rows);
    if (const char* wrong = launch(kernel, tiles, p.num_heads_k, params, stream)) return wrong;
  }
  params.tiles = workspace.query_tiles;
  params.first = gradient_of(p, false);
  return launch(of_queries, max_tiles(p.num_tokens, p.num_sequences, of_queries.rows), p.num_heads, params, stream);
}

const char* backward(const Params& p, void* memory, void* stream) {
  if (const char* wrong = check(p, true)) return wrong;
  if (const Kernel kernel = short_kernel_of(p, true); kernel.function != nullptr) return backward_short(p, kernel, stream);
  return takes_sm90_backward(p) ? backward_sm90(p, memory, stream) : backward_sm80(p, memory, stream);
}

}  // namespace
}  // namespace comp_kernels

// Calls with at most `rows` rows per sequence on average take the kernels for short sequences; 0, as it is unless set: none does.
// Results agree within rounding. For tests and for measuring the kernels against each other.
COMP_KERNELS_EXPORT void comp_kernels_cuda_rope_attention_set_short(int32_t rows) { comp_kernels::short_length = rows; }

// Blocks, one per multiprocessor say, of the persistent forward of sm_90a; 0, as it is unless set: the one with a block per tile.
// Results agree within rounding. For tests and for measuring the kernels against each other.
COMP_KERNELS_EXPORT void comp_kernels_cuda_rope_attention_set_persistent(int32_t blocks) {
  comp_kernels::persistent_blocks = blocks;
}

// Not 0: kernels of sm_90a are launched before the kernel that prepares for them has ended. 0, as it is unless set: after it. The same
// bits. For tests and for measuring the kernels against each other.
COMP_KERNELS_EXPORT void comp_kernels_cuda_rope_attention_set_dependent(int32_t on) { comp_kernels::dependent_launches = on != 0; }

// Not 0: the forwards of sm_90a read values where they are; 0, as it is unless set: from a copy. The same bits.
// For tests and for measuring the kernels against each other.
COMP_KERNELS_EXPORT void comp_kernels_cuda_rope_attention_set_values_in_place(int32_t on) {
  comp_kernels::values_in_place = on != 0;
}

// Bytes of device memory that a forward or backward call needs besides its arguments; 256-byte aligned.
COMP_KERNELS_EXPORT int64_t comp_kernels_cuda_rope_attention_workspace(const comp_kernels_rope_attention_params* params,
                                                                       int32_t backward) {
  comp_kernels::Workspace memory(nullptr);
  if (comp_kernels::short_kernel_of(*params, backward != 0).function != nullptr) {
    // one launch, nothing between kernels
  } else if (backward != 0 && comp_kernels::takes_sm90_backward(*params)) {
    comp_kernels::BackwardSm90Workspace(memory, *params);
  } else if (backward != 0) {
    comp_kernels::BackwardWorkspace(memory, *params);
  } else if (comp_kernels::takes_sm90(*params)) {
    if (comp_kernels::persistent_blocks > 0) {
      comp_kernels::PersistentWorkspace(memory, *params);
    } else {
      comp_kernels::ForwardSm90Workspace(memory, *params);
    }
  } else {
    comp_kernels::ForwardWorkspace(memory, *params);
  }
  return memory.bytes;
}

// Pointers of params are device pointers, stream is a cudaStream_t of the current device. Both return null, or what is wrong
// (valid until the thread's next call); nothing waits for the device.
COMP_KERNELS_EXPORT const char* comp_kernels_cuda_rope_attention_forward(const comp_kernels_rope_attention_params* params,
                                                                         void* workspace, void* stream) {
  return comp_kernels::forward(*params, workspace, stream);
}

COMP_KERNELS_EXPORT const char* comp_kernels_cuda_rope_attention_backward(const comp_kernels_rope_attention_params* params,
                                                                          void* workspace, void* stream) {
  return comp_kernels::backward(*params, workspace, stream);
}
