// Runs the threads of a block as fibers, one OS thread to a block at a time.
//
// A fiber runs until it waits for others. Then the other lanes of its warp run, until the whole warp
// waits at a block barrier or has ended; then the next warp. So a warp runs far ahead of the others, in
// an order that changes with the block and at every block barrier: what no barrier orders goes wrong.

#include "fibers.h"

#include <link.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

namespace emulation {
namespace {

constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_WARPS = MAX_THREADS / LANES;
constexpr unsigned NUM_BARRIERS = 16;
constexpr unsigned MAX_SHARED_BYTES = 227 << 10;
constexpr unsigned GUARD_BYTES = 4096;
constexpr uint64_t CANARY = 0x5afe57ac5afe57ac;

#if defined(__x86_64__)
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
    .text
    .type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size emulation_switch, . - emulation_switch
)");
inline void switch_context(Context& from, Context& to) { emulation_switch(&from, to); }
#else
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

struct Barrier {
    unsigned num_waiting;
    unsigned num_expected;
    Vote vote;
    int count;
    int result;
};

struct Launch {
    const EmulatedLaunch& config;
    const char* kernel;
    Entry entry;
    void** args;
    unsigned order;
    std::atomic<uint64_t> next_block{0};
    std::atomic<bool> has_failed{false};
    std::mutex error{};
};

std::atomic<unsigned> num_host_threads{1};
std::atomic<unsigned> order_seed{0};
// Where the stacks of the fibers are that this OS thread runs. Its initial value is not zero, so that it
// does not lie where `__shared__` variables do, see find_static_shared.
struct Running {
    volatile int touched;
    const unsigned char* stacks;
};
thread_local Running running{1, nullptr};

}  // namespace

struct Block {
    Launch* launch;
    Context scheduler;
    Warp warps[MAX_WARPS];
    Barrier barriers[NUM_BARRIERS];
    unsigned num_threads;
    unsigned num_warps;
    unsigned num_ended;
    unsigned phase;
    bool has_failed;
    unsigned char* shared;
};

namespace {

const char* const VOTE_NAMES[] = {"__syncthreads", "__syncthreads_and", "__syncthreads_or", "__syncthreads_count"};

std::string waits_for(const Fiber& fiber) {
    if (fiber.exchange) {
        return fiber.exchange->name;
    }
    return fiber.barrier ? "barrier " + std::to_string(fiber.barrier) : VOTE_NAMES[int(fiber.block->barriers[0].vote)];
}

std::string name_of(const Fiber& fiber) {
    char text[64];
    snprintf(text, sizeof text, "thread (%u, %u, %u)", fiber.index.x, fiber.index.y, fiber.index.z);
    return text;
}

void report(Launch& launch, const std::string& text) {
    const std::lock_guard<std::mutex> guard(launch.error);
    if (!launch.has_failed.exchange(true) && launch.config.error && launch.config.error_len) {
        snprintf(launch.config.error, launch.config.error_len, "kernel %s: %s", launch.kernel, text.c_str());
    }
}

}  // namespace

void report(const Fiber& fiber, const std::string& text) {
    char block[64];
    const uint3 index = fiber.block_index;
    snprintf(block, sizeof block, "block (%u, %u, %u), ", index.x, index.y, index.z);
    fiber.block->has_failed = true;
    report(*fiber.block->launch, block + name_of(fiber) + ": " + text);
}

namespace {

void check_stack(const Fiber& fiber) {
    if (fiber.canary != CANARY) {
        // What the fiber says of itself may be overwritten.
        fprintf(stderr, "emulation: a thread uses more than %zu bytes of stack\n", STACK_BYTES);
        abort();
    }
}

// Lets others run until this fiber is ready again.
void wait(Fiber& fiber) {
    check_stack(fiber);
    switch_context(fiber.context, fiber.block->scheduler);
}

}  // namespace

// The fibers of the block stay where they are.
void fail(Fiber& fiber, const std::string& text) {
    report(fiber, text);
    while (true) {
        wait(fiber);
    }
}

namespace {

void end(Fiber& fiber) {
    Block& block = *fiber.block;
    Warp& warp = *fiber.warp;
    warp.present &= ~(1u << fiber.lane);
    for (unsigned waiting = warp.waiting; waiting; waiting &= waiting - 1) {
        const Fiber& other = *warp.lanes[__builtin_ctz(waiting)];
        if (other.mask >> fiber.lane & 1) {
            fail(fiber, "ends while " + name_of(other) + " of its warp waits for it at " + waits_for(other));
        }
    }
    if (block.barriers[0].num_waiting) {
        fail(fiber, std::string("ends while others wait at ") + VOTE_NAMES[int(block.barriers[0].vote)]);
    }
    block.num_ended++;
}

void fiber_main() {
    Fiber& fiber = this_fiber();
    fiber.block->launch->entry(fiber.block->launch->args);
    end(fiber);
    while (true) {
        wait(fiber);
    }
}

struct sigaction handlers_before[NSIG];

// What a kernel does to memory that is not there is an error of the kernel, not the end of the program.
void on_fault(int signal, siginfo_t* info, void*) {
    const unsigned char here = 0;
    if (!running.stacks || &here < running.stacks || running.stacks + MAX_THREADS * STACK_BYTES <= &here) {
        // Not a fiber's: it happens again, and then others handle it.
        sigaction(signal, &handlers_before[signal], nullptr);
        return;
    }
    char text[160];
    if (signal == SIGFPE) {
        snprintf(text, sizeof text, "divides an integer by zero");
    } else if (signal == SIGILL) {
        // The compiler was told to check these, and to stop where a check fails.
        snprintf(text, sizeof text,
                 "accesses memory that is not aligned to the size of the access, indexes an array outside of its "
                 "bounds, or shifts too far");
    } else if (info->si_addr) {
        snprintf(text, sizeof text, "accesses the address %p, where there is no memory", info->si_addr);
    } else {
        snprintf(text, sizeof text, "accesses a null pointer, or memory that is not aligned to the size of the access");
    }
    fail(this_fiber(), text);
}

void handle_faults() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    // The handler does not return: it must not leave the signal blocked.
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
        sigaction(signal, &action, &handlers_before[signal]);
    }
}

// A place on a stack to start from. Stacks of neighbours start at other cache lines.
void start(Fiber& fiber, unsigned number) {
    unsigned char* const base = reinterpret_cast<unsigned char*>(&fiber);
    const size_t used = STACK_BYTES - (number % 16) * 320;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(base + used);
    // A return address, which also aligns the stack as a call does.
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&fiber_main);
    fiber.context = top - 6;
#else
    getcontext(&fiber.context);
    const size_t reserved = (sizeof(Fiber) + 63) / 64 * 64;
    fiber.context.uc_stack.ss_sp = base + reserved;
    fiber.context.uc_stack.ss_size = used - reserved;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
#endif
}

// Stacks and shared memory for one block at a time.
class Worker {
   public:
    Worker() : block(new Block) {
        void* const memory = mmap(nullptr, (MAX_THREADS + 1) * STACK_BYTES, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) {
            fprintf(stderr, "emulation: no memory for stacks\n");
            abort();
        }
        const uintptr_t start = reinterpret_cast<uintptr_t>(memory) + STACK_BYTES - 1;
        stacks = reinterpret_cast<unsigned char*>(start & ~uintptr_t(STACK_BYTES - 1));
        shared = static_cast<unsigned char*>(aligned_alloc(1024, MAX_SHARED_BYTES + GUARD_BYTES));
    }

    void run_blocks(Launch& launch) {
        const EmulatedLaunch& config = launch.config;
        find_static_shared();
        running.stacks = stacks;
        block->launch = &launch;
        block->num_threads = config.block[0] * config.block[1] * config.block[2];
        block->num_warps = (block->num_threads + LANES - 1) / LANES;
        block->shared = shared;
        const uint64_t num_blocks = uint64_t(config.grid[0]) * config.grid[1] * config.grid[2];
        while (!launch.has_failed.load(std::memory_order_relaxed)) {
            const uint64_t number = launch.next_block.fetch_add(1);
            if (num_blocks <= number) {
                break;
            }
            // The device promises no order of blocks.
            run_block(launch.order & 1 ? number : num_blocks - 1 - number);
        }
        running.stacks = nullptr;
    }

   private:
    std::unique_ptr<Block> block;
    unsigned char* stacks;
    unsigned char* shared;
    unsigned num_fibers = 0;
    unsigned char* static_shared = nullptr;
    size_t static_shared_bytes = 0;

    Fiber& fiber(unsigned number) { return *reinterpret_cast<Fiber*>(stacks + number * STACK_BYTES); }

    // `__shared__` variables are thread-local without an initial value: the zeroed end of this
    // library's thread-local storage holds nothing else.
    void find_static_shared() {
        running.touched = 1;
        dl_iterate_phdr(
            [](dl_phdr_info* info, size_t, void* data) {
                const uintptr_t here = reinterpret_cast<uintptr_t>(&fiber_main);
                const ElfW(Phdr)* storage = nullptr;
                bool is_this = false;
                for (int i = 0; i < info->dlpi_phnum; i++) {
                    const ElfW(Phdr)& part = info->dlpi_phdr[i];
                    const uintptr_t start = info->dlpi_addr + part.p_vaddr;
                    is_this |= part.p_type == PT_LOAD && start <= here && here < start + part.p_memsz;
                    storage = part.p_type == PT_TLS ? &part : storage;
                }
                if (!is_this) {
                    return 0;
                }
                if (storage && info->dlpi_tls_data) {
                    Worker& worker = *static_cast<Worker*>(data);
                    worker.static_shared = static_cast<unsigned char*>(info->dlpi_tls_data) + storage->p_filesz;
                    worker.static_shared_bytes = storage->p_memsz - storage->p_filesz;
                }
                return 1;
            },
            this);
    }

    void prepare(uint64_t number) {
        const EmulatedLaunch& config = block->launch->config;
        const dim3 size{config.block[0], config.block[1], config.block[2]};
        const dim3 grid{config.grid[0], config.grid[1], config.grid[2]};
        const uint3 index{unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                          unsigned(number / (uint64_t(grid.x) * grid.y))};
        for (; num_fibers < block->num_threads; num_fibers++) {
            new (&fiber(num_fibers)) Fiber();
        }
        for (unsigned i = 0; i < block->num_threads; i++) {
            Fiber& thread = fiber(i);
            thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
            thread.block_index = index;
            thread.block_dim = size;
            thread.grid_dim = grid;
            thread.dynamic_shared = shared;
            thread.shared_bytes = config.shared_bytes;
            thread.lane = i % LANES;
            thread.canary = CANARY;
            thread.block = block.get();
            thread.warp = &block->warps[i / LANES];
            thread.warp->lanes[thread.lane] = &thread;
            thread.exchange = nullptr;
            thread.barrier = -1;
            thread.groups.clear();
            thread.copies.clear();
            start(thread, i);
        }
        for (unsigned i = 0; i < block->num_warps; i++) {
            const unsigned num_lanes = std::min(block->num_threads - i * LANES, unsigned(LANES));
            block->warps[i].present = ~0u >> (LANES - num_lanes);
            block->warps[i].ready = block->warps[i].present;
            block->warps[i].waiting = 0;
        }
        for (Barrier& barrier : block->barriers) {
            barrier = Barrier();
        }
        block->num_ended = 0;
        block->has_failed = false;
        block->phase = unsigned(number) + block->launch->order / 2;
        memset(shared, POISON, config.shared_bytes + GUARD_BYTES);
        if (static_shared_bytes) {
            memset(static_shared, POISON, static_shared_bytes);
        }
    }

    void run_block(uint64_t number) {
        prepare(number);
        while (block->num_ended < block->num_threads && !block->has_failed) {
            if (!run_warps()) {
                report_deadlock();
            }
        }
        const unsigned char* const guard = shared + block->launch->config.shared_bytes;
        for (unsigned i = 0; i < GUARD_BYTES && !block->has_failed; i++) {
            if (guard[i] != POISON) {
                report(fiber(0), "the block has written byte " + std::to_string(i) + " behind its shared memory");
            }
        }
    }

    // Each warp once, as far as it gets.
    bool run_warps() {
        bool has_run = false;
        const unsigned first = block->phase * 5 % block->num_warps;
        const bool downwards = block->phase & 1;
        for (unsigned i = 0; i < block->num_warps && !block->has_failed; i++) {
            const unsigned warp = (first + (downwards ? block->num_warps - i : i)) % block->num_warps;
            has_run |= run_warp(block->warps[warp]);
        }
        return has_run;
    }

    bool run_warp(Warp& warp) {
        bool has_run = false;
        while (warp.ready && !block->has_failed) {
            const bool downwards = block->phase >> 1 & 1;
            const unsigned lane = downwards ? 31 - __builtin_clz(warp.ready) : __builtin_ctz(warp.ready);
            warp.ready &= ~(1u << lane);
            switch_context(block->scheduler, warp.lanes[lane]->context);
            has_run = true;
        }
        return has_run;
    }

    void report_deadlock() {
        for (unsigned i = 0; i < block->num_threads; i++) {
            const Fiber& thread = fiber(i);
            if (!(thread.warp->present >> thread.lane & 1)) {
                continue;
            }
            std::string text = "waits for ever at " + waits_for(thread);
            for (unsigned j = 0; j < block->num_threads; j++) {
                const Fiber& other = fiber(j);
                if (other.warp->present >> other.lane & 1 && waits_for(other) != waits_for(thread)) {
                    report(thread, text + ", while " + name_of(other) + " waits at " + waits_for(other));
                    return;
                }
            }
            report(thread, text);
            return;
        }
    }
};

std::mutex idle_workers_lock;
std::vector<std::unique_ptr<Worker>> idle_workers;

void run_with_worker(Launch& launch) {
    std::unique_ptr<Worker> worker;
    {
        const std::lock_guard<std::mutex> guard(idle_workers_lock);
        if (!idle_workers.empty()) {
            worker = std::move(idle_workers.back());
            idle_workers.pop_back();
        }
    }
    if (!worker) {
        worker.reset(new Worker);
    }
    worker->run_blocks(launch);
    const std::lock_guard<std::mutex> guard(idle_workers_lock);
    idle_workers.push_back(std::move(worker));
}

bool is_possible(Launch& launch) {
    const EmulatedLaunch& config = launch.config;
    const uint64_t num_threads = uint64_t(config.block[0]) * config.block[1] * config.block[2];
    const uint64_t num_blocks = uint64_t(config.grid[0]) * config.grid[1] * config.grid[2];
    if (num_threads == 0 || MAX_THREADS < num_threads || 64 < config.block[2]) {
        report(launch, "blocks of " + std::to_string(num_threads) + " threads are not possible");
    } else if (num_blocks == 0 || 65535 < config.grid[1] || 65535 < config.grid[2]) {
        report(launch, "a grid of " + std::to_string(num_blocks) + " blocks is not possible");
    } else if (MAX_SHARED_BYTES < config.shared_bytes) {
        report(launch, std::to_string(config.shared_bytes) + " bytes of shared memory are not possible");
    }
    return !launch.has_failed;
}

}  // namespace

void exchange(const Exchange& what, unsigned mask, Operands& operands) {
    Fiber& fiber = this_fiber();
    Warp& warp = *fiber.warp;
    const unsigned self = 1u << fiber.lane;
    if (!(mask & self)) {
        fail(fiber, std::string(what.name) + " with a mask that leaves out the calling lane");
    }
    if (const unsigned missing = mask & ~warp.present) {
        const std::string lane = std::to_string(__builtin_ctz(missing));
        fail(fiber, std::string(what.name) + " waits for lane " + lane + ", which has ended or does not exist");
    }
    if (const unsigned others = warp.waiting & mask) {
        const Fiber& other = *warp.lanes[__builtin_ctz(others)];
        if (other.exchange != &what) {
            fail(fiber, "calls " + std::string(what.name) + ", while " + name_of(other) + " of its warp waits at " +
                            waits_for(other));
        }
        if (other.mask != mask) {
            fail(fiber, std::string(what.name) + " with another mask than " + name_of(other));
        }
    }
    for (unsigned others = warp.waiting & ~mask; others; others &= others - 1) {
        const Fiber& other = *warp.lanes[__builtin_ctz(others)];
        if (other.mask & self) {
            fail(fiber, std::string(what.name) + " without " + name_of(other) + ", which waits for this one at " +
                            waits_for(other));
        }
    }
    fiber.operands = &operands;
    if ((warp.waiting & mask) == (mask & ~self)) {
        what.complete(warp, mask);
        warp.waiting &= ~mask;
        warp.ready |= mask & ~self;
        return;
    }
    fiber.exchange = &what;
    fiber.mask = mask;
    warp.waiting |= self;
    wait(fiber);
    fiber.exchange = nullptr;
}

namespace {

int arrive(Vote vote, int predicate, int id, unsigned num_expected) {
    Fiber& fiber = this_fiber();
    Block& block = *fiber.block;
    Barrier& barrier = block.barriers[id];
    if (barrier.num_waiting == 0) {
        barrier.vote = vote;
        barrier.num_expected = num_expected;
        barrier.count = 0;
    }
    if (barrier.vote != vote || barrier.num_expected != num_expected) {
        fail(fiber, std::string("calls ") + VOTE_NAMES[int(vote)] + ", while others wait at " +
                        VOTE_NAMES[int(barrier.vote)] + " of the same barrier");
    }
    if (id == 0 && block.num_ended) {
        fail(fiber, std::string("waits at ") + VOTE_NAMES[int(vote)] + " for threads that have ended");
    }
    barrier.count += predicate != 0;
    barrier.num_waiting++;
    fiber.barrier = id;
    if (barrier.num_waiting < barrier.num_expected) {
        wait(fiber);
        return barrier.result;
    }
    const int count = barrier.count;
    barrier.result = vote == Vote::AND ? count == int(num_expected) : vote == Vote::OR ? 0 < count : count;
    barrier.num_waiting = 0;
    for (unsigned i = 0; i < block.num_warps; i++) {
        Warp& warp = block.warps[i];
        for (unsigned lanes = warp.present; lanes; lanes &= lanes - 1) {
            Fiber& other = *warp.lanes[__builtin_ctz(lanes)];
            if (other.barrier == id) {
                other.barrier = -1;
                warp.ready |= &other == &fiber ? 0 : 1u << other.lane;
            }
        }
    }
    block.phase++;
    return barrier.result;
}

}  // namespace

void launch(const EmulatedLaunch& config, const char* kernel, Entry entry, void** args) {
    if (config.error && config.error_len) {
        config.error[0] = 0;
    }
    static std::once_flag once;
    std::call_once(once, handle_faults);
    Launch launch{config, kernel, entry, args, order_seed};
    if (!is_possible(launch)) {
        return;
    }
    const uint64_t num_blocks = uint64_t(config.grid[0]) * config.grid[1] * config.grid[2];
    const uint64_t num_threads = std::min<uint64_t>(num_host_threads, num_blocks);
    std::vector<std::thread> threads;
    for (uint64_t i = 1; i < num_threads; i++) {
        threads.emplace_back([&launch] { run_with_worker(launch); });
    }
    run_with_worker(launch);
    for (std::thread& thread : threads) {
        thread.join();
    }
}

void fail(const char* text) { fail(this_fiber(), text); }

int block_vote(Vote vote, int predicate) { return arrive(vote, predicate, 0, this_fiber().block->num_threads); }

void block_barrier(int id, int num_threads) {
    Fiber& fiber = this_fiber();
    if (id < 1 || int(NUM_BARRIERS) <= id || num_threads < 1 || num_threads % LANES) {
        fail(fiber, "a barrier has a number from 1 to 15 and is for whole warps");
    }
    arrive(Vote::SYNC, 0, id, unsigned(num_threads));
}

unsigned active_mask() { return this_fiber().warp->present; }

}  // namespace emulation

extern "C" {

void emulate_set_num_threads(unsigned num_threads) { emulation::num_host_threads = num_threads ? num_threads : 1; }

void emulate_set_order(unsigned order) { emulation::order_seed = order; }

}
