#include "fibers.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
// Under TSan every CUDA thread is a fiber of its own, and only barriers and __syncwarp order what they do. This file itself is
// compiled without -fsanitize=thread (build.py): the scheduler's own bookkeeping is no access of a kernel.
#if defined(TP_TSAN)
#include <sanitizer/tsan_interface.h>
#define TP_TSAN_RELEASE(p) __tsan_release(p)
#define TP_TSAN_ACQUIRE(p) __tsan_acquire(p)
#else
#define TP_TSAN_RELEASE(p) (void)(p)
#define TP_TSAN_ACQUIRE(p) (void)(p)
#endif

namespace tp_emulator {

constinit thread_local Context current{};

namespace {

std::vector<Kernel>& kernels() {
    static std::vector<Kernel> list;
    return list;
}

// Saves the callee-saved registers on the old stack and takes those of the new one (System V ABI, x86-64).
extern "C" void tp_emulator_switch(void** from, void* to);
asm(".text\n.hidden tp_emulator_switch\n.type tp_emulator_switch,@function\n.globl tp_emulator_switch\ntp_emulator_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n.size tp_emulator_switch,.-tp_emulator_switch\n");

constexpr size_t kStackBytes = 64 << 10, kGuardBytes = 4096;

enum class State : unsigned char { kReady, kAtBarrier, kInCollective, kAtPartialBarrier, kDone };

struct Fiber {
    char* stack = nullptr;
    void* sp = nullptr;
    Dim3 thread{};
    Collective op{};
    float value = 0, result = 0;
    int source = 0;
    WarpFunction call = nullptr;
    void* pointer = nullptr;
    struct Product {
        ProductFunction function;
        float* d;
        u64 a, b;
    };
    std::vector<Product> products;       // begun and not waited for
    std::vector<size_t> product_groups;  // the ends of those that are committed
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
#endif
#if defined(TP_TSAN)
    void* tsan = nullptr;
#endif
};

/// One OS thread's block: its fibers and their scheduler.
class Block {
  public:
    ~Block() {
        for (Fiber& f : fibers_) {
#if defined(TP_TSAN)
            if (f.tsan) __tsan_destroy_fiber(f.tsan);
#endif
            if (f.stack) munmap(f.stack, kStackBytes);
        }
    }
    bool run(const Kernel& kernel, Dim3 grid, Dim3 block, Dim3 index, size_t shared_bytes, const void* args);
    void sync_block() {
        TP_TSAN_RELEASE(&barrier_);
        states_[running_] = State::kAtBarrier;
        yield();
        TP_TSAN_ACQUIRE(&barrier_);
    }
    void sync_some(unsigned n) {
        TP_TSAN_RELEASE(&some_);
        if (++some_arrived_ < n) {
            states_[running_] = State::kAtPartialBarrier;
            yield();
        } else {
            some_arrived_ = 0;
            for (unsigned i = 0; i < n_; ++i)
                if (states_[i] == State::kAtPartialBarrier) states_[i] = State::kReady;
        }
        TP_TSAN_ACQUIRE(&some_);
    }
    void spin() {
        const int next = next_ready();
        if (next >= 0 && next != static_cast<int>(running_)) switch_to(static_cast<unsigned>(next));
        // Once around: whoever can go on has gone; other blocks' threads get the core.
        if (++spins_ % n_ == 0) std::this_thread::yield();
    }
    void call(WarpFunction function, void* pointer) {
        fibers_[running_].call = function;
        fibers_[running_].pointer = pointer;
        collective(Collective::kCall, ~0u, 0, 0);
    }
    void product_begin(const Fiber::Product& product) { fibers_[running_].products.push_back(product); }
    void product_commit() { fibers_[running_].product_groups.push_back(fibers_[running_].products.size()); }
    void product_wait(size_t groups_left) {
        Fiber& f = fibers_[running_];
        if (f.product_groups.size() <= groups_left) return;
        const size_t groups = f.product_groups.size() - groups_left, end = f.product_groups[groups - 1];
        for (size_t i = 0; i < end; ++i) {
            const Fiber::Product& p = f.products[i];
            p.function(p.d, reinterpret_cast<const char*>(p.a), reinterpret_cast<const char*>(p.b), static_cast<int>(running_ % 128));
        }
        f.products.erase(f.products.begin(), f.products.begin() + static_cast<std::ptrdiff_t>(end));
        f.product_groups.erase(f.product_groups.begin(), f.product_groups.begin() + static_cast<std::ptrdiff_t>(groups));
        for (size_t& group : f.product_groups) group -= end;
    }
    float collective(Collective op, u32 mask, float value, int source) {
        Fiber& f = fibers_[running_];
        const unsigned warp = running_ / 32 * 32, lanes = std::min(32u, n_ - warp);
        if (lanes < 32) mask &= (1u << lanes) - 1;
        f.op = op, f.value = value, f.source = source, states_[running_] = State::kInCollective;
        waits_[running_] = (static_cast<u64>(op) + 1) << 32 | mask;
        // Of the collectives only __syncwarp orders memory accesses; a shuffle does not. A call does here: its function reads and writes
        // the lanes' registers, which on a GPU are nobody else's to see.
        const bool orders = op == Collective::kSync || op == Collective::kCall;
        if (orders) TP_TSAN_RELEASE(&fibers_[warp]);
        if (!complete(warp, mask)) yield();
        if (orders) TP_TSAN_ACQUIRE(&fibers_[warp]);
        return fibers_[running_].result;
    }

  private:
    static void trampoline();
    void body() {
        TP_TSAN_ACQUIRE(&begin_);
        kernel_->entry(args_);
        TP_TSAN_RELEASE(&end_);
        states_[running_] = State::kDone;
        yield();
    }
    bool complete(unsigned warp, u32 mask);
    void yield();
    void switch_to(unsigned next);
    int next_ready() {
        for (unsigned k = 1; k <= n_; ++k) {
            const unsigned i = running_ + k < n_ ? running_ + k : running_ + k - n_;
            if (states_[i] == State::kReady) return static_cast<int>(i);
        }
        return -1;
    }
    void enter(unsigned i) {
        running_ = i;
        context_->linear = i;
        context_->thread = fibers_[i].thread;
    }

    std::vector<Fiber> fibers_;
    // Theirs, side by side: looked through at every wait. waits_: the collective (above) and the mask that a fiber waits with, or 0.
    std::vector<State> states_;
    std::vector<u64> waits_;
    std::vector<char> shared_;
    unsigned n_ = 0, running_ = 0, some_arrived_ = 0, spins_ = 0;
    Context* const context_ = &current;  // the thread's own: a thread-local's address is a call from a library
    void* home_ = nullptr;
    const Kernel* kernel_ = nullptr;
    const void* args_ = nullptr;
    char barrier_ = 0, some_ = 0, begin_ = 0, end_ = 0;  // their addresses stand for what orders memory accesses
#if defined(TP_TSAN)
    void* home_tsan_ = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
    const void* home_stack_ = nullptr;
    size_t home_bytes_ = 0;
    void* home_fake_ = nullptr;
#endif
    friend Block& block_of_thread();
};

/// By a pointer: every use of a thread-local object with a destructor asks whether it is there.
Block& block_of_thread() {
    constinit thread_local Block* there = nullptr;
    if (!there) {
        thread_local Block block;
        there = &block;
    }
    return *there;
}

void Block::trampoline() {
    Block& block = block_of_thread();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, block.home_stack_ ? nullptr : &block.home_stack_, block.home_stack_ ? nullptr : &block.home_bytes_);
#endif
    block.body();
    __builtin_unreachable();
}

/// When every lane of the mask has arrived: computes for all of them and makes them ready.
bool Block::complete(unsigned warp, u32 mask) {
    const u64 mine = waits_[running_];
    for (unsigned l = 32; l-- > 0;)  // lanes run in this order's reverse: who is missing is found at once
        if (mask >> l & 1 && waits_[warp + l] != mine) return false;
    const Fiber& me = fibers_[running_];
    float in[32] = {}, next[32];
    auto gather = [&] {
        for (unsigned l = 0; l < 32; ++l)
            if (mask >> l & 1) in[l] = fibers_[warp + l].value;
    };
    if (me.op == Collective::kCall) {
        void* pointers[32];
        for (unsigned l = 0; l < 32; ++l) pointers[l] = fibers_[warp + l].pointer;
        TP_TSAN_ACQUIRE(&fibers_[warp]);
        me.call(pointers);
        TP_TSAN_RELEASE(&fibers_[warp]);
    } else if (me.op == Collective::kSum || me.op == Collective::kMax) {
        gather();
        // In the order of the xor butterfly, so that results match the GPU's bit for bit.
        for (int o = 16; o; o >>= 1) {
            for (int l = 0; l < 32; ++l) next[l] = me.op == Collective::kSum ? in[l] + in[l ^ o] : std::max(in[l], in[l ^ o]);
            std::memcpy(in, next, sizeof in);
        }
        for (unsigned l = 0; l < 32; ++l)
            if (mask >> l & 1) fibers_[warp + l].result = in[l];
    } else if (me.op == Collective::kShuffle) {
        gather();
        for (unsigned l = 0; l < 32; ++l)
            if (mask >> l & 1) fibers_[warp + l].result = in[fibers_[warp + l].source & 31];
    }
    for (unsigned l = 0; l < 32; ++l)
        if (mask >> l & 1) states_[warp + l] = State::kReady, waits_[warp + l] = 0;
    return true;
}

void Block::switch_to(unsigned next) {
    [[maybe_unused]] const unsigned was = running_;
    Fiber& from = fibers_[was];
    Fiber& to = fibers_[next];
    enter(next);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(states_[was] == State::kDone ? nullptr : &from.fake, to.stack + kGuardBytes, kStackBytes - kGuardBytes);
#endif
#if defined(TP_TSAN)
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);
#endif
    tp_emulator_switch(&from.sp, to.sp);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
#endif
}

/// The running fiber cannot go on: to the next that can; with none, past a complete barrier, or home.
void Block::yield() {
    int next = next_ready();
    if (next < 0) {
        bool barrier = true, any = false;
        for (unsigned i = 0; i < n_; ++i) {
            barrier &= states_[i] != State::kInCollective && states_[i] != State::kAtPartialBarrier;
            any |= states_[i] == State::kAtBarrier;
        }
        if (barrier && any) {
            for (unsigned i = 0; i < n_; ++i)
                if (states_[i] == State::kAtBarrier) states_[i] = State::kReady;
            next = next_ready();
        }
    }
    if (next == static_cast<int>(running_)) return;
    if (next >= 0) return switch_to(static_cast<unsigned>(next));
    [[maybe_unused]] const unsigned was = running_;
    Fiber& from = fibers_[was];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(states_[was] == State::kDone ? nullptr : &from.fake, home_stack_, home_bytes_);
#endif
#if defined(TP_TSAN)
    __tsan_switch_to_fiber(home_tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    tp_emulator_switch(&from.sp, home_);
}

bool Block::run(const Kernel& kernel, Dim3 grid, Dim3 block, Dim3 index, size_t shared_bytes, const void* args) {
    n_ = block.x * block.y * block.z;
    kernel_ = &kernel;
    args_ = args;
    some_arrived_ = 0;
    if (fibers_.size() < n_) fibers_.resize(n_), states_.resize(n_), waits_.resize(n_);
    // Of exactly this size, so that a sanitizer sees a write beyond it.
    std::vector<char>(shared_bytes + 16).swap(shared_);
    context_->block = index;
    context_->block_dim = block;
    context_->grid_dim = grid;
    context_->dynamic_shared = shared_.data() + (16 - reinterpret_cast<uintptr_t>(shared_.data()) % 16) % 16;
    for (unsigned i = 0; i < n_; ++i) {
        Fiber& f = fibers_[i];
        if (!f.stack) {
            f.stack = static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
            if (f.stack == MAP_FAILED) return false;
            mprotect(f.stack, kGuardBytes, PROT_NONE);
#if defined(TP_TSAN)
            f.tsan = __tsan_create_fiber(0);
#endif
        }
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(f.stack + kGuardBytes, kStackBytes - kGuardBytes);
#endif
        // Staggered tops: equal offsets of all stacks would fall into the same cache sets. The entry's return address slot keeps
        // the stack 16-byte aligned as at a call.
        char* top = f.stack + kStackBytes - 256 - i % 61 * 64;
        void** frame = reinterpret_cast<void**>(top) - 2;
        frame[0] = reinterpret_cast<void*>(&Block::trampoline);
        frame[1] = nullptr;
        for (int k = 1; k <= 6; ++k) frame[-k] = nullptr;
        f.sp = frame - 6;
        states_[i] = State::kReady;
        f.thread = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
        f.products.clear();
        f.product_groups.clear();
    }
    enter(0);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&home_fake_, fibers_[0].stack + kGuardBytes, kStackBytes - kGuardBytes);
#endif
#if defined(TP_TSAN)
    home_tsan_ = __tsan_get_current_fiber();
    TP_TSAN_RELEASE(&begin_);
    __tsan_switch_to_fiber(fibers_[0].tsan, __tsan_switch_to_fiber_no_sync);
#endif
    tp_emulator_switch(&home_, fibers_[0].sp);
    TP_TSAN_ACQUIRE(&end_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(home_fake_, nullptr, nullptr);
#endif
    for (unsigned i = 0; i < n_; ++i)
        if (states_[i] != State::kDone) return false;
    return true;
}

}  // namespace

Registration::Registration(const Kernel& kernel) { kernels().push_back(kernel); }

const Kernel* find_kernel(const char* name, int compute_capability) {
    const Kernel* best = nullptr;
    for (const Kernel& k : kernels())
        if (!std::strcmp(k.name, name) && k.arch_class <= compute_capability && (!best || k.arch_class > best->arch_class)) best = &k;
    return best;
}

void sync_block() { block_of_thread().sync_block(); }
float warp_float(Collective op, u32 mask, float value, int source) { return block_of_thread().collective(op, mask, value, source); }
void warp_call(WarpFunction function, void* lane) { block_of_thread().call(function, lane); }
void product_begin(ProductFunction function, float* d, u64 a, u64 b) { block_of_thread().product_begin({function, d, a, b}); }
void product_commit() { block_of_thread().product_commit(); }
void product_wait(int groups_left) { block_of_thread().product_wait(static_cast<size_t>(groups_left)); }
u32 warp_ballot(u32 mask, bool predicate) {
    // Lanes' predicates as distinct powers of two, exact in a float sum of 24 bits at a time.
    const unsigned lane = current.linear & 31;
    const float low = warp_float(Collective::kSum, mask, predicate && lane < 16 ? static_cast<float>(1u << lane) : 0.0f, 0);
    const float high = warp_float(Collective::kSum, mask, predicate && lane >= 16 ? static_cast<float>(1u << (lane - 16)) : 0.0f, 0);
    return static_cast<u32>(low) | static_cast<u32>(high) << 16;
}

void sync_some(unsigned n) { block_of_thread().sync_some(n); }
void spin() { block_of_thread().spin(); }
u32 count(u32* p) {
    TP_TSAN_RELEASE(p);
    const u32 v = __atomic_fetch_add(p, 1u, __ATOMIC_ACQ_REL);
    TP_TSAN_ACQUIRE(p);
    return v;
}
void signal(u32* p) { count(p); }
void signal_peer(u32* p, u32 v) {
    TP_TSAN_RELEASE(p);
    __atomic_store_n(p, v, __ATOMIC_RELEASE);
}
u32 read_signal(const u32* p) {
    const u32 v = __atomic_load_n(p, __ATOMIC_ACQUIRE);
    TP_TSAN_ACQUIRE(const_cast<u32*>(p));
    return v;
}
void barrier_arrive(TpBarrier* b, int bytes_expected, int bytes_done, int arrivals) {
    TP_TSAN_RELEASE(b);
    b->bytes += bytes_expected - bytes_done;
    b->pending -= arrivals;
    if (b->pending == 0 && b->bytes == 0) ++b->phase, b->pending = b->count;
}
void barrier_wait(TpBarrier* b, int parity) {
    while (static_cast<int>(b->phase & 1) == parity) spin();
    TP_TSAN_ACQUIRE(b);
}

namespace {

/// OS threads for the blocks of cooperative kernels, one each, kept for the next launch.
class Crew {
  public:
    ~Crew() {
        {
            std::lock_guard lock(mutex_);
            stop_ = true;
        }
        start_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }
    bool run(unsigned n, const std::function<bool(unsigned)>& work) {
        while (threads_.size() < n) {
            const unsigned i = static_cast<unsigned>(threads_.size());
            threads_.emplace_back([this, i] { loop(i); });
        }
        std::unique_lock lock(mutex_);
        work_ = &work;
        left_ = n_ = n;
        ok_ = true;
        ++generation_;
        start_.notify_all();
        done_.wait(lock, [&] { return left_ == 0; });
        return ok_;
    }

  private:
    void loop(unsigned i) {
        unsigned seen = 0;
        std::unique_lock lock(mutex_);
        for (;;) {
            start_.wait(lock, [&] { return stop_ || (generation_ != seen && i < n_); });
            if (stop_) return;
            seen = generation_;
            const auto* work = work_;
            lock.unlock();
            const bool ok = (*work)(i);
            lock.lock();
            ok_ &= ok;
            if (--left_ == 0) done_.notify_all();
        }
    }
    std::mutex mutex_;
    std::condition_variable start_, done_;
    const std::function<bool(unsigned)>* work_ = nullptr;
    unsigned n_ = 0, left_ = 0, generation_ = 0;
    bool ok_ = true, stop_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace

bool run(const Kernel& kernel, Dim3 grid, Dim3 block, size_t dynamic_shared_bytes, const void* args, const char** error) {
    if (kernel.cooperative) {
        thread_local Crew crew;
        *error = "threads of a block wait for each other";
        return crew.run(grid.x, [&](unsigned i) { return block_of_thread().run(kernel, grid, block, {i, 0, 0}, dynamic_shared_bytes, args); });
    }
    const u64 n_blocks = static_cast<u64>(grid.x) * grid.y * grid.z;
    for (u64 i = 0; i < n_blocks; ++i) {
        const Dim3 index{static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y), static_cast<unsigned>(i / grid.x / grid.y)};
        if (!block_of_thread().run(kernel, grid, block, index, dynamic_shared_bytes, args)) {
            *error = "threads of a block wait for each other";
            return false;
        }
    }
    return true;
}

}  // namespace tp_emulator
