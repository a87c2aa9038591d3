#include "runner.h"

namespace ggml_tp {
namespace {

std::exception_ptr attempt(const std::function<void(int)>& job, int rank) {
    try {
        job(rank);
    } catch (...) {
        return std::current_exception();
    }
    return nullptr;
}

}  // namespace

Workers::Workers(int n_ranks) : errors_(n_ranks) {
    for (int r = 0; r + 1 < n_ranks; ++r) threads_.emplace_back([this, r] { loop(r); });
}

Workers::~Workers() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    start_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Workers::run(const std::function<void(int)>& job) {
    std::unique_lock lock(mutex_);
    job_ = &job;
    pending_ = static_cast<int>(threads_.size());
    ++generation_;
    start_.notify_all();
    lock.unlock();
    const int last = static_cast<int>(errors_.size()) - 1;
    const std::exception_ptr own = attempt(job, last);
    lock.lock();
    errors_[last] = own;
    done_.wait(lock, [&] { return pending_ == 0; });
    for (const std::exception_ptr& error : errors_)
        if (error) std::rethrow_exception(error);
}

void Workers::loop(int rank) {
    unsigned seen = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
        start_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
        const auto* job = job_;
        lock.unlock();
        const std::exception_ptr error = attempt(*job, rank);
        lock.lock();
        errors_[rank] = error;
        if (--pending_ == 0) done_.notify_one();
    }
}

}  // namespace ggml_tp
