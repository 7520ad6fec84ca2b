// Runs kernels of the CPU library for another process: reads calls from standard input, writes results to standard output.
//
// It is compiled for another processor together with the library and started by an emulator of it; the tests run on this one and
// send their calls (tests/emulated_cpu/plugin.py, which describes the messages). Every buffer ends at the end of a page before
// one that cannot be touched, and what a kernel is to write is NaN before.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "comp_kernels/alignment_loss.h"
#include "comp_kernels/rope_attention.h"
#include "comp_kernels/sinkhorn.h"
#include "comp_kernels/sinkhorn_small.h"

extern "C" {
const char* comp_kernels_cpu_isa(void);
void comp_kernels_cpu_set_threads(void* parallel_for, void* get_num_threads);
const char* comp_kernels_cpu_rope_attention_forward(const comp_kernels_rope_attention_params*);
const char* comp_kernels_cpu_rope_attention_backward(const comp_kernels_rope_attention_params*);
const char* comp_kernels_cpu_sinkhorn_solve(const comp_kernels_sinkhorn_params*);
const char* comp_kernels_cpu_sinkhorn_iterate(const comp_kernels_sinkhorn_step_params*);
const char* comp_kernels_cpu_sinkhorn_column_statistics(const comp_kernels_sinkhorn_step_params*);
const char* comp_kernels_cpu_sinkhorn_row_statistics(const comp_kernels_sinkhorn_step_params*);
const char* comp_kernels_cpu_sinkhorn_plan(const comp_kernels_sinkhorn_step_params*);
const char* comp_kernels_cpu_sinkhorn_small(const comp_kernels_sinkhorn_small_params*);
const char* comp_kernels_cpu_sinkhorn_small_backward(const comp_kernels_sinkhorn_small_params*);
const char* comp_kernels_cpu_alignment_loss_tile(const comp_kernels_alignment_loss_params*);
}

namespace {

const char* isa(const void*) { return comp_kernels_cpu_isa(); }

using Function = const char* (*)(const void* params);
#define FUNCTION(name) {#name, reinterpret_cast<Function>(name)}
const struct {
  const char* name;
  Function function;
} kFunctions[] = {
    {"comp_kernels_cpu_isa", isa},
    FUNCTION(comp_kernels_cpu_rope_attention_forward),
    FUNCTION(comp_kernels_cpu_rope_attention_backward),
    FUNCTION(comp_kernels_cpu_sinkhorn_solve),
    FUNCTION(comp_kernels_cpu_sinkhorn_iterate),
    FUNCTION(comp_kernels_cpu_sinkhorn_column_statistics),
    FUNCTION(comp_kernels_cpu_sinkhorn_row_statistics),
    FUNCTION(comp_kernels_cpu_sinkhorn_plan),
    FUNCTION(comp_kernels_cpu_sinkhorn_small),
    FUNCTION(comp_kernels_cpu_sinkhorn_small_backward),
    FUNCTION(comp_kernels_cpu_alignment_loss_tile),
};

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "serve_calls: %s\n", what);
  std::exit(1);
}

void read_all(void* to, size_t size) {
  for (char* at = static_cast<char*>(to); size > 0;) {
    const ssize_t got = read(STDIN_FILENO, at, size);
    if (got == 0) std::exit(0);  // the other side is gone
    if (got < 0) fail("cannot read");
    at += got, size -= got;
  }
}

void write_all(const void* from, size_t size) {
  for (const char* at = static_cast<const char*>(from); size > 0;) {
    const ssize_t done = write(STDOUT_FILENO, at, size);
    if (done <= 0) fail("cannot write");
    at += done, size -= done;
  }
}

int64_t read_number() {
  int64_t x;
  read_all(&x, sizeof x);
  return x;
}

// Memory of exactly `size` bytes.
class GuardedBuffer {
 public:
  GuardedBuffer(int64_t size, int64_t flags) : size(size), flags(flags) {
    const int64_t page = sysconf(_SC_PAGESIZE), pages = (size + page - 1) / page * page;
    mapped_ = pages + page;
    begin_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (begin_ == MAP_FAILED || mprotect(begin_ + pages, page, PROT_NONE) != 0) fail("out of memory");
    data = begin_ + pages - size;
    std::memset(data, 0xff, size);
  }
  ~GuardedBuffer() { munmap(begin_, mapped_); }
  GuardedBuffer(const GuardedBuffer&) = delete;

  char* data;
  const int64_t size, flags;

 private:
  char* begin_;
  int64_t mapped_;
};

constexpr int64_t kSent = 1, kReturned = 2;

uint32_t threads = 1;

int32_t get_num_threads(uint32_t* result) {
  *result = threads;
  return 0;
}

// One thread per part of begin .. end, the first on the caller.
int32_t parallel_for(int64_t begin, int64_t end, int64_t, void (*function)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> others;
  for (int64_t i = begin + 1; i < end; ++i) others.emplace_back(function, i, i + 1, context);
  function(begin, begin + 1, context);
  for (std::thread& other : others) other.join();
  return 0;
}

void serve_one(uint32_t most_threads) {
  std::string name(read_number(), '\0');
  read_all(name.data(), name.size());
  threads = static_cast<uint32_t>(read_number());
  if (threads > most_threads) threads = most_threads;
  comp_kernels_cpu_set_threads(threads > 1 ? reinterpret_cast<void*>(parallel_for) : nullptr,
                               reinterpret_cast<void*>(get_num_threads));
  std::vector<char> params(read_number());
  read_all(params.data(), params.size());
  std::vector<GuardedBuffer*> buffers(read_number());
  for (GuardedBuffer*& buffer : buffers) {
    const int64_t size = read_number(), flags = read_number();
    buffer = new GuardedBuffer(size, flags);
    if (flags & kSent) read_all(buffer->data, size);
  }
  for (int64_t pointers = read_number(); pointers > 0; --pointers) {
    const int64_t offset = read_number(), index = read_number();
    std::memcpy(params.data() + offset, &buffers[index]->data, sizeof(char*));
  }

  const char* message = "no such function";
  for (const auto& known : kFunctions) {
    if (name == known.name) message = known.function(params.data());
  }
  const int64_t length = message == nullptr ? -1 : static_cast<int64_t>(std::strlen(message));
  write_all(&length, sizeof length);
  if (length > 0) write_all(message, length);
  for (GuardedBuffer* buffer : buffers) {
    if (buffer->flags & kReturned) write_all(buffer->data, buffer->size);
    delete buffer;
  }
}

}  // namespace

// The argument: the largest number of threads, default 1.
int main(int argc, char** argv) {
  const uint32_t most_threads = argc > 1 ? static_cast<uint32_t>(std::atoi(argv[1])) : 1;
  for (;;) serve_one(most_threads);
}
