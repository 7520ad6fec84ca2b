// Memory of the workers, taken once per call of an operator and cut up before the loops start.
#pragma once

#include <cstdint>

namespace comp_kernels {

// A block of at least `bytes`, on a page boundary; null when memory ran out. The block that was given back last is kept for the
// next call: the first touch of a fresh page costs about as much as a thousand multiply-adds of a vector.
char* take_scratch(int64_t bytes);
void give_back_scratch(char* block);

// Hands out consecutive pieces of a block, each on a cache line of its own. With a null block it only measures.
class Carver {
 public:
  explicit Carver(char* block) : block_(block) {}

  template <typename T>
  void take(T*& piece, int64_t elements) {
    piece = block_ == nullptr ? nullptr : reinterpret_cast<T*>(block_ + size_);
    size_ += (elements * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
  }

  int64_t size() const { return size_; }

 private:
  char* block_;
  int64_t size_ = 0;
};

// One `Scratch` per worker, each with its pieces; Scratch has a member `void carve(Carver&, args...)` that takes them.
template <typename Scratch>
class PerWorker {
 public:
  template <typename... Args>
  PerWorker(int64_t workers, const Args&... args) : scratch_(new Scratch[workers]) {
    Carver measure(nullptr);
    scratch_[0].carve(measure, args...);
    // A page apart: neighbours share neither cache lines nor the prefetcher's reach.
    const int64_t bytes = (measure.size() + 4095) / 4096 * 4096 + 64;
    block_ = take_scratch(workers * bytes);
    if (block_ == nullptr) return;
    for (int64_t worker = 0; worker < workers; ++worker) {
      Carver carver(block_ + worker * bytes);
      scratch_[worker].carve(carver, args...);
    }
  }
  ~PerWorker() {
    if (block_ != nullptr) give_back_scratch(block_);
    delete[] scratch_;
  }
  PerWorker(const PerWorker&) = delete;
  PerWorker& operator=(const PerWorker&) = delete;

  bool allocated() const { return block_ != nullptr; }
  Scratch& operator[](int64_t worker) { return scratch_[worker]; }

 private:
  Scratch* scratch_;
  char* block_ = nullptr;
};

}  // namespace comp_kernels
