// Key tiles as images for sm_90a: turned keys, and values where asked for, of every sequence laid out so that one bulk copy brings
// a tile in the order in which wgmma reads it.
//
// A tile holds kImageKeys keys of one sequence and head: [keys / 8][head_dim / 8][8 keys][8 channels]. Slot start / kImageKeys +
// b holds the first tile of sequence b: slots of different sequences never meet, and no prefix sum is needed. Keys that do not
// exist are zero up to a multiple of kImagePadding.
#pragma once

#include "rope_attention.h"
#include "rotate.cuh"
#include "tiles.cuh"

namespace comp_kernels {

constexpr int kImageKeys = 128;
constexpr int kImagePadding = 32;
constexpr int kImageThreads = 256;

struct ImageParams {
  const uint16_t* k;  // [Tk, Hkv, D]
  const uint16_t* v;
  uint16_t* k_images;  // [Hkv, slots, kImageKeys, head_dim]
  uint16_t* v_images;  // null: values stay where they are
  const int32_t* cu_seqlens_k;
  Tables tables;  // of the keys; cos == nullptr: not turned
  int64_t k_stride_token, k_stride_head, v_stride_token, v_stride_head;
  ListJob list;  // the first block of the first head lists the query tiles; tiles == nullptr: no list
  int sequences, slots, head_dim;
};

__device__ __forceinline__ int first_slot(const int32_t* cu_seqlens, int sequence) {
  return cu_seqlens[sequence] / kImageKeys + sequence;
}

// Grid: [slots + 1, Hkv].
template <typename T>
__device__ __forceinline__ void make_images(const ImageParams& params) {
  let_next_grid_start();  // no block of it reads anything of ours before all of ours have ended
  const int head = blockIdx.y, head_dim = params.head_dim, slot = static_cast<int>(blockIdx.x) - 1;
  if (slot < 0) {
    const ListJob& job = params.list;
    if (head == 0 && job.tiles != nullptr) {
      list_tiles<kImageThreads>(job.tiles, job.cu_seqlens, job.cu_seqlens_other, params.sequences, job.tokens, job.tile,
                                kImageKeys);
    }
    return;
  }
  int sequence = 0;  // the last one whose first slot is not beyond this slot
  for (int low = 1, high = params.sequences; low < high;) {
    const int middle = (low + high) / 2;
    if (first_slot(params.cu_seqlens_k, middle) <= slot) {
      sequence = middle, low = middle + 1;
    } else {
      high = middle;
    }
  }
  if (params.sequences == 0) return;
  const int start = params.cu_seqlens_k[sequence] + (slot - first_slot(params.cu_seqlens_k, sequence)) * kImageKeys;
  const int rows = min(kImageKeys, params.cu_seqlens_k[sequence + 1] - start);
  if (rows <= 0) return;  // a slot between two sequences

  const int64_t image = (static_cast<int64_t>(head) * params.slots + slot) * kImageKeys * head_dim;
  const uint16_t* k = params.k + start * params.k_stride_token + head * params.k_stride_head;
  auto place = [&](int row, int channel) {
    return image + ((row >> 3) * (head_dim >> 3) + (channel >> 3)) * 64 + (row & 7) * 8 + (channel & 7);
  };
  const int padded = (rows + kImagePadding - 1) / kImagePadding * kImagePadding;
  const bool turned = params.tables.cos != nullptr;
  auto copy = [&](const uint16_t* from, int64_t stride, uint16_t* images) {
    constexpr int kBatch = 4;
    uint4 chunks[kBatch];
    for_batches_in_rows<kBatch>(
        threadIdx.x, kImageThreads, rows, head_dim / 8,
        [&](int slot, int row, int chunk) { chunks[slot] = *reinterpret_cast<const uint4*>(from + row * stride + chunk * 8); },
        [&](int slot, int row, int chunk) { *reinterpret_cast<uint4*>(images + place(row, chunk * 8)) = chunks[slot]; });
  };
  const bool values = params.v_images != nullptr;
  if (values) {
    copy(params.v + start * params.v_stride_token + head * params.v_stride_head, params.v_stride_token, params.v_images);
  }
  if (!turned) copy(k, params.k_stride_token, params.k_images);
  for_each_in_rows(threadIdx.x, kImageThreads, padded - rows, head_dim / 8, [&](int row, int chunk) {
    const int64_t at = place(rows + row, chunk * 8);
    *reinterpret_cast<uint4*>(params.k_images + at) = uint4{0, 0, 0, 0};
    if (values) *reinterpret_cast<uint4*>(params.v_images + at) = uint4{0, 0, 0, 0};
  });
  if (!turned) return;
  const int64_t table = static_cast<int64_t>(start) * params.tables.token_stride + head * params.tables.head_stride;
  rotate_rows<T, true>(threadIdx.x, kImageThreads, rows, head_dim, params.tables, [&](int row, auto turn_row) {
    const int64_t table_row = table + static_cast<int64_t>(row) * params.tables.token_stride;
    turn_row([&](int channel) { return params.k_images + place(row, channel); }, k + row * params.k_stride_token,
             params.tables.cos + table_row, params.tables.sin + table_row);
  });
}

}  // namespace comp_kernels

#define INSTANTIATE_IMAGES(T)                                                                                                     \
  DEFINE_KERNEL(rope_attention_images_##T, ImageParams, make_images, images_kernel, (T), (FixedBlock<kImageThreads, kImageKeys>), \
                kRows, 2)
