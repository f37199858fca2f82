// Loops whose items are taken by several threads of XLA's pool.
//
// The thread of the call leads; helpers come when the pool has room. Items are
// taken one by one, so that nobody waits for a helper that has not begun: calls
// end on a busy pool too, and where all threads of the pool lead calls of their
// own, as those of virtual devices.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>

#include "ffi_frame.h"

#ifdef PROFILE
#include "profile.h"
#else
struct Timer {
  explicit Timer(const char*) {}
};
#endif

#ifndef MAX_THREADS  // more than processors, or than a phase has work for, would wait
#define MAX_THREADS std::min<long>(std::thread::hardware_concurrency(), 16)
#endif

static inline void wait_a_little(int spins) {
  if (spins > 1000) return std::this_thread::yield();  // after some 50 us
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// What leader and helpers share; helpers may outlive the call.
class Loop {
 public:
  void lead(long n, void (*call)(void*, long), void* data) {
    call_ = call, data_ = data;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t number = (ticket_.load(std::memory_order_relaxed) >> 48) + 1;
    ticket_.store(number << 48 | (uint64_t)n << 24, std::memory_order_release);
    take_items();
    for (int spins = 0; done_.load(std::memory_order_acquire) < n; spins++) wait_a_little(spins);
  }

  void help() {
    for (int spins = 0; !ended_.load(std::memory_order_acquire); spins++) {
      const uint64_t ticket = ticket_.load(std::memory_order_acquire);
      if (index(ticket) < size(ticket)) take_items(), spins = 0;
      wait_a_little(spins);
    }
  }

  void end() { ended_.store(true, std::memory_order_release); }
  const std::thread::id leader = std::this_thread::get_id();

 private:
  static constexpr uint64_t MASK = (1 << 24) - 1;
  static long index(uint64_t ticket) { return ticket & MASK; }
  static long size(uint64_t ticket) { return ticket >> 24 & MASK; }

  void take_items() {
    for (;;) {
      const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
      if (index(ticket) >= size(ticket)) return;
      call_(data_, index(ticket));
      done_.fetch_add(1, std::memory_order_acq_rel);
    }
  }

  std::atomic<uint64_t> ticket_{0};  // number of the loop, its items, the next item
  std::atomic<long> done_{0};
  std::atomic<bool> ended_{false};
  void (*call_)(void*, long) = nullptr;
  void* data_ = nullptr;
};

class Threads {
 public:
  explicit Threads(const Frame& frame) : count(std::min(frame.n_threads(), MAX_THREADS)) {
    if (count < 2) return;
    loop_ = std::make_shared<Loop>();
    for (long i = 1; i < count; i++) {
      auto* held = new std::shared_ptr<Loop>(loop_);
      const bool scheduled = frame.schedule(
          [](void* data) {
            std::unique_ptr<std::shared_ptr<Loop>> held((std::shared_ptr<Loop>*)data);
            // A pool may run a task in the thread that hands it over.
            if ((*held)->leader != std::this_thread::get_id()) (*held)->help();
          },
          held);
      if (!scheduled) delete held;
    }
  }
  ~Threads() {
    if (loop_) loop_->end();
  }
  Threads(const Threads&) = delete;

  // Calls f(i) for all i < n, in any order.
  template <class F>
  void each(const char* phase, long n, F&& f) {
    Timer timer(phase);
    if (loop_ && n > 1)
      return loop_->lead(
          n, [](void* data, long i) { (*(std::remove_reference_t<F>*)data)(i); }, &f);
    for (long i = 0; i < n; i++) f(i);
  }

  const long count;

 private:
  std::shared_ptr<Loop> loop_;
};
