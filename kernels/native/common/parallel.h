// A loop over tasks on the threads that XLA lends to a custom call.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace iceformer {

// Calls body(i) for every i < count, on this thread and on the pool's, and returns when all are done. A helper that
// starts only after the last task was taken touches nothing, so nobody waits for a pool that is busy elsewhere.
template <class Body>
void parallel_for(xla::ffi::ThreadPool pool, int64_t count, const Body& body) {
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

}  // namespace iceformer
