// A loop over tasks on several threads.
//
// A token of a decoder takes hundreds of short loops, and a thread that sleeps between them wakes later than its part of
// the work takes. So a team of threads stays: between loops its members look for the next one for a while, then sleep.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "xla/ffi/api/ffi.h"

namespace iceformer {

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // takes about as long; `yield` takes no time on most processors
#else
  std::this_thread::yield();
#endif
}

// Whether a condition comes true within a time that is short for people and long for a loop of a decoder.
template <class Condition>
bool spin_until(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(100);
  do {
    for (int i = 0; i < 32; ++i) {
      if (condition()) return true;
      pause_thread();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

// Threads that help whoever calls `run`, one caller at a time.
class Team {
 public:
  // The process's team; it never ends, because its threads do not.
  static Team& instance() {
    static Team* team = new Team;
    return *team;
  }

  // Calls body(i) for every i < count, on this thread and `helpers` others. False, and nothing done, if the team helps
  // somebody else or has another number of threads.
  template <class Body>
  bool run(int64_t helpers, int64_t count, const Body& body) {
    std::unique_lock<std::mutex> caller(callers_, std::try_to_lock);
    if (!caller.owns_lock() || count > kMostTasks || !grow(helpers)) return false;
    body_ = &body;
    call_ = [](const void* body, int64_t i) { (*static_cast<const Body*>(body))(i); };
    left_.store(count, std::memory_order_relaxed);
    ticket_.store(ticket(++loop_, count));
    if (asleep_.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    work();
    const auto done = [&] { return left_.load(std::memory_order_acquire) == 0; };
    if (!spin_until(done)) {
      std::unique_lock<std::mutex> lock(mutex_);
      finished_.wait(lock, done);
    }
    return true;
  }

 private:
  // A ticket holds the number of the loop, of its tasks, and of the next task: whoever takes a task learns at once which
  // loop it is of and whether there is one left. The last field has room for all threads to find that there is none.
  static constexpr int kBits = 20;
  static constexpr int64_t kMostTasks = (int64_t{1} << kBits) / 2, kMask = (int64_t{1} << kBits) - 1;
  static uint64_t ticket(uint64_t loop, int64_t count) {
    return loop << (2 * kBits) | static_cast<uint64_t>(count) << kBits;
  }
  static uint64_t loop_of(uint64_t ticket) { return ticket >> (2 * kBits); }

  bool grow(int64_t helpers) {
    if (size_ == 0)
      for (; size_ < helpers; ++size_) std::thread([this] { help(); }).detach();
    return size_ == helpers;
  }

  void work() {
    for (;;) {
      const uint64_t mine = ticket_.fetch_add(1);
      const int64_t task = mine & kMask, count = mine >> kBits & kMask;
      if (task >= count) return;
      call_(body_, task);
      if (left_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        std::lock_guard<std::mutex> lock(mutex_);
        finished_.notify_all();
      }
    }
  }

  void help() {
    uint64_t seen = 0;
    const auto called = [&] { return loop_of(ticket_.load()) != seen; };
    for (;;) {
      if (!spin_until(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        wake_.wait(lock, called);
        --asleep_;
      }
      seen = loop_of(ticket_.load());
      work();
    }
  }

  std::mutex callers_, mutex_;
  std::condition_variable wake_, finished_;
  std::atomic<uint64_t> ticket_{0};
  std::atomic<int64_t> left_{0}, asleep_{0};
  uint64_t loop_ = 0;
  int64_t size_ = 0;
  const void* body_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
};

// Calls body(i) for every i < count, on this thread and on the pool's, and returns when all are done. A helper that
// starts only after the last task was taken touches nothing, so nobody waits for a pool that is busy elsewhere.
template <class Body>
void run_on_pool(xla::ffi::ThreadPool pool, int64_t count, const Body& body) {
  struct Shared {
    std::atomic<int64_t> next{0}, left;
    std::mutex mutex;
    std::condition_variable finished;
  };
  auto shared = std::make_shared<Shared>();
  shared->left = count;
  auto work = [shared, count, &body] {
    int64_t done = 0;
    for (int64_t i; (i = shared->next.fetch_add(1)) < count; ++done) body(i);
    if (done && shared->left.fetch_sub(done) == done) {
      std::lock_guard<std::mutex> lock(shared->mutex);
      shared->finished.notify_all();
    }
  };
  const int64_t threads = pool.num_threads();
  for (int64_t helper = 1; helper < threads && helper < count; ++helper) pool.Schedule(decltype(work)(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->finished.wait(lock, [&] { return shared->left.load() == 0; });
}

// Calls body(i) for every i < count on as many threads as the pool has, and returns when all are done.
template <class Body>
void parallel_for(xla::ffi::ThreadPool pool, int64_t count, const Body& body) {
  const int64_t helpers = pool.num_threads() - 1;
  if (count <= 1 || helpers < 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
  } else if (!Team::instance().run(helpers, count, body)) {
    run_on_pool(pool, count, body);
  }
}

}  // namespace iceformer
