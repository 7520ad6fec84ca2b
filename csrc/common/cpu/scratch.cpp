// The block of scratch memory that is kept between calls.
#include "scratch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace comp_kernels {
namespace {

constexpr int64_t kPage = 4096, kHugePage = int64_t{2} << 20;
constexpr int64_t kMostKept = int64_t{64} << 20;  // a larger block goes back to the system

// The page before a block holds its size.
int64_t& size_of(char* block) { return *reinterpret_cast<int64_t*>(block - kPage); }
void release(char* block) { std::free(block - kPage); }

struct Kept {
  std::atomic<char*> block{nullptr};  // whoever exchanges it owns it, so calls of several threads do not meet
  ~Kept() {
    if (char* last = block.exchange(nullptr)) release(last);
  }
} kept;

}  // namespace

char* take_scratch(int64_t bytes) {
  bytes = (bytes + kPage - 1) / kPage * kPage;
  if (char* block = kept.block.exchange(nullptr)) {
    if (size_of(block) >= bytes) return block;
    release(block);
  }
  const int64_t whole = (kPage + bytes + kHugePage - 1) / kHugePage * kHugePage;
  char* start = static_cast<char*>(std::aligned_alloc(kHugePage, whole));
  if (start == nullptr) return nullptr;
#ifdef MADV_HUGEPAGE
  madvise(start, whole, MADV_HUGEPAGE);  // packed keys and scores lie on more small pages than the processor has translations for
#endif
  size_of(start + kPage) = bytes;
#ifdef __SANITIZE_ADDRESS__
  std::memset(start + kPage, 0xff, bytes);  // NaN: what is read before it is written shows in the results
#endif
  return start + kPage;
}

void give_back_scratch(char* block) {
#ifdef __SANITIZE_ADDRESS__
  release(block);  // the next one is as large as asked for, so reads beyond its end are seen
#else
  char* spare = size_of(block) <= kMostKept ? kept.block.exchange(block) : block;
  if (spare != nullptr) release(spare);
#endif
}

}  // namespace comp_kernels
