// One worker thread per rank: whatever all ranks do together (communicators, capture, launch) is done by them at the same time.
#pragma once
#include <condition_variable>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace ggml_tp {

class Workers {
  public:
    explicit Workers(int n_ranks);
    ~Workers();
    Workers(const Workers&) = delete;
    Workers& operator=(const Workers&) = delete;
    /// Runs job(rank) for every rank, the last one's on the calling thread, and waits for all of them. Rethrows the lowest rank's exception.
    void run(const std::function<void(int)>& job);

  private:
    void loop(int rank);

    std::mutex mutex_;
    std::condition_variable start_, done_;
    const std::function<void(int)>* job_ = nullptr;
    unsigned generation_ = 0;
    int pending_ = 0;
    bool stop_ = false;
    std::vector<std::exception_ptr> errors_;
    std::vector<std::thread> threads_;
};

}  // namespace ggml_tp
