// Memory of a thread for what a call computes, kept for the next call.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

class Arena {
 public:
  // n values that hold anything; valid until the scope ends in which they are made.
  template <class T>
  T* make(long n) {
    const size_t size = (n * sizeof(T) + 63) / 64 * 64;
    while (block_ < blocks_.size() && used_ + size > blocks_[block_].size) block_++, used_ = 0;
    if (block_ == blocks_.size()) {
      const size_t most = std::max<size_t>(size, 1 << 20);
      blocks_.push_back({std::unique_ptr<char[]>(new char[most + 64]), most});
    }
    char* start = blocks_[block_].bytes.get();
    start += -(uintptr_t)start & 63;  // a line of the cache begins there
    used_ += size;
    return (T*)(start + used_ - size);
  }

  // What is made during its life is free after it.
  class Scope {
   public:
    explicit Scope(Arena& arena) : arena_(arena), block_(arena.block_), used_(arena.used_) {}
    ~Scope() { arena_.block_ = block_, arena_.used_ = used_; }

   private:
    Arena& arena_;
    size_t block_, used_;
  };

 private:
  struct Block {
    std::unique_ptr<char[]> bytes;
    size_t size;
  };
  std::vector<Block> blocks_;
  size_t block_ = 0, used_ = 0;
};

static inline Arena& arena() {
  static thread_local Arena of_thread;
  return of_thread;
}

// Rows [m] that are n floats apart.
static inline float** make_rows(float* first, long m, long n) {
  float** rows = arena().make<float*>(m);
  for (long i = 0; i < m; i++) rows[i] = first + i * n;
  return rows;
}
static inline float** make_rows(long m, long n) {
  return make_rows(arena().make<float>(m * n), m, n);
}
