// Runs a kernel in fibers, one a thread of CUDA: those of a cluster's blocks together, and two clusters side by side,
// with nothing that orders one after the other. They take turns on one thread of the operating system, and are told to
// the sanitizers: to ThreadSanitizer each is a thread that only barriers order. This file itself is not instrumented.
#include <dlfcn.h>
#include <ucontext.h>

#include <memory>
#include <vector>

#include "shim.h"

extern "C" void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*,
                                       dim3*, dim3*, int*);

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

// What sanitizers offer for fibers; the program has those of the one that it was built with.
extern "C" {
void __sanitizer_start_switch_fiber(void** leaving, const void* bottom, size_t size) __attribute__((weak));
void __sanitizer_finish_switch_fiber(void* back, const void** bottom, size_t* size) __attribute__((weak));
void* __tsan_create_fiber(unsigned flags) __attribute__((weak));
void __tsan_destroy_fiber(void* fiber) __attribute__((weak));
void* __tsan_get_current_fiber() __attribute__((weak));
void __tsan_switch_to_fiber(void* fiber, unsigned flags) __attribute__((weak));
void __tsan_acquire(void* at) __attribute__((weak));
void __tsan_release(void* at) __attribute__((weak));
}

namespace host {

namespace {

constexpr unsigned kWarp = 32, kClustersAtOnce = 2;

std::vector<size_t>& fixed_sizes() {  // filled by static constructors of other files
  static std::vector<size_t> all;
  return all;
}

std::function<void()> pending;

using Memory = std::unique_ptr<unsigned char[]>;

// Of no value that a kernel could mistake for a right one: NaNs.
Memory allocate(size_t bytes) {
  Memory memory(new unsigned char[bytes]);
  memset(memory.get(), 0xff, bytes);
  return memory;
}

struct Fiber;
void yield();

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  unsigned arrive() {
    if (__tsan_release) __tsan_release(this);
    const unsigned round = round_;
    if (++arrived_ == threads_) arrived_ = 0, ++round_;
    return round;
  }
  void wait(unsigned round) {
    while (round_ == round) yield();
    if (__tsan_acquire) __tsan_acquire(this);
  }
  void sync() { wait(arrive()); }

 private:
  unsigned threads_, arrived_ = 0, round_ = 0;
};

struct Warp {
  Barrier barrier{kWarp};
  uint64_t given[kWarp] = {};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / kWarp) {}
  Barrier barrier;
  std::vector<Warp> warps;
  Memory dynamic;
  std::vector<Memory> fixed;

  void renew(size_t shared) {
    dynamic = allocate(shared);
    fixed.clear();
    for (const size_t bytes : fixed_sizes()) fixed.push_back(allocate(bytes));
  }
};

struct Cluster {
  Cluster(unsigned blocks_, unsigned threads) : barrier(blocks_ * threads) {
    for (unsigned i = 0; i < blocks_; ++i) blocks.push_back(std::make_unique<Block>(threads));
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

struct Fiber {
  ucontext_t context;
  Memory stack;
  void* tsan;
  void* asan = nullptr;  // what it keeps of a fiber that is not running
  uint3 thread, block_index;
  Cluster* cluster;
  Block* block;
  std::function<void()> body;
  unsigned arrival = 0;
  bool done = false;
};

std::vector<std::unique_ptr<Fiber>> fibers;
Fiber* running;
// Of the launching thread, which is no fiber.
Fiber launching;
size_t left;  // fibers that have not ended

void switch_to(Fiber& next) {
  Fiber& last = *running;
  last.thread = threadIdx, last.block_index = blockIdx;
  threadIdx = next.thread, blockIdx = next.block_index;
  running = &next;
  constexpr unsigned kUnordered = 1;
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(next.tsan, kUnordered);
  if (__sanitizer_start_switch_fiber)
    __sanitizer_start_switch_fiber(last.done ? nullptr : &last.asan, next.context.uc_stack.ss_sp,
                                   next.context.uc_stack.ss_size);
  swapcontext(&last.context, &next.context);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(last.asan, nullptr, nullptr);
}

// To the next fiber that has work left.
void yield() {
  static size_t turn = 0;
  do turn = (turn + 1) % fibers.size();
  while (fibers[turn]->done);
  if (fibers[turn].get() != running) switch_to(*fibers[turn]);
}

void start() {
  stack_t came_from{};
  if (__sanitizer_finish_switch_fiber)
    __sanitizer_finish_switch_fiber(nullptr, const_cast<const void**>(&came_from.ss_sp), &came_from.ss_size);
  // The first fiber comes from the launching thread, whose stack nobody else knows.
  if (launching.context.uc_stack.ss_sp == nullptr) launching.context.uc_stack = came_from;
  if (__tsan_acquire) __tsan_acquire(&launching);
  running->body();
  if (__tsan_release) __tsan_release(&launching);
  running->done = true;
  if (--left == 0) switch_to(launching);
  yield();
}

Warp& warp() { return running->block->warps[threadIdx.x / kWarp]; }

// One thread of a cluster, for every kClustersAtOnce-th cluster of the grid.
void run_thread(size_t shared, unsigned first, unsigned rank) {
  Cluster& own = *running->cluster;
  const auto blocks = static_cast<unsigned>(own.blocks.size());
  const unsigned across = gridDim.x / blocks, clusters = across * gridDim.y * gridDim.z;
  for (unsigned i = first; i < clusters; i += kClustersAtOnce) {
    if (threadIdx.x == 0) running->block->renew(shared);
    blockIdx = {i % across * blocks + rank, i / across % gridDim.y, i / across / gridDim.y};
    own.barrier.sync();
    pending();
    own.barrier.sync();
  }
}

void add_fiber(Cluster& cluster, Block& block, unsigned thread, std::function<void()> body) {
  constexpr size_t kStack = 256 * 1024;
  auto fiber = std::make_unique<Fiber>();
  fiber->stack = Memory(new unsigned char[kStack]);
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  makecontext(&fiber->context, start, 0);
  fiber->thread = {thread, 0, 0};
  fiber->cluster = &cluster, fiber->block = &block, fiber->body = std::move(body);
  if (__tsan_create_fiber) fiber->tsan = __tsan_create_fiber(0);
  fibers.push_back(std::move(fiber));
}

}  // namespace

int reserve_shared(size_t bytes) {
  fixed_sizes().push_back(bytes);
  return static_cast<int>(fixed_sizes().size()) - 1;
}
void* dynamic_shared() { return running->block->dynamic.get(); }
void* fixed_shared(int variable) { return running->block->fixed[variable].get(); }
void* in_block(void* here, int rank) {
  const auto at = static_cast<unsigned char*>(here);
  const Block &own = *running->block, &other = *running->cluster->blocks[rank];
  for (size_t i = 0; i < own.fixed.size(); ++i) {
    const ptrdiff_t offset = at - own.fixed[i].get();
    if (offset >= 0 && offset < static_cast<ptrdiff_t>(fixed_sizes()[i])) return other.fixed[i].get() + offset;
  }
  return other.dynamic.get() + (at - own.dynamic.get());
}

void sync_block() { running->block->barrier.sync(); }
void sync_warp() { warp().barrier.sync(); }
void cluster_arrive() { running->arrival = running->cluster->barrier.arrive(); }
void cluster_wait() { running->cluster->barrier.wait(running->arrival); }
uint64_t exchange(uint64_t given, int from) {
  warp().given[lane()] = given;
  sync_warp();
  const uint64_t taken = warp().given[from];
  sync_warp();
  return taken;
}

const void* known(const void* kernel) {
  Dl_info found{};
  dladdr(kernel, &found);
  const char* const name = found.dli_sname ? found.dli_sname : "a static kernel";
  __cudaRegisterFunction(nullptr, static_cast<const char*>(kernel), nullptr, name, 0, nullptr, nullptr, nullptr,
                         nullptr, nullptr);
  return kernel;
}

cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel, std::function<void()> call) {
  pending = std::move(call);
  return cudaLaunchKernelExC(config, kernel, nullptr);
}

}  // namespace host

// The launch that the runtime's callback was given.
extern "C" void host_run(const unsigned* grid, const unsigned* block, const unsigned* cluster, uint64_t shared) {
  using namespace host;
  blockDim = {block[0], 1, 1};
  gridDim = {grid[0], grid[1], grid[2]};
  std::vector<std::unique_ptr<Cluster>> clusters;
  for (unsigned first = 0; first < kClustersAtOnce; ++first) {
    clusters.push_back(std::make_unique<Cluster>(cluster[0], block[0]));
    for (unsigned rank = 0; rank < cluster[0]; ++rank)
      for (unsigned thread = 0; thread < block[0]; ++thread)
        add_fiber(*clusters.back(), *clusters.back()->blocks[rank], thread, [=] { run_thread(shared, first, rank); });
  }
  if (__tsan_release) __tsan_release(&launching);
  if (__tsan_get_current_fiber) launching.tsan = __tsan_get_current_fiber();
  running = &launching;
  left = fibers.size();
  switch_to(*fibers.front());
  if (__tsan_acquire) __tsan_acquire(&launching);
  if (__tsan_destroy_fiber)
    for (const auto& fiber : fibers) __tsan_destroy_fiber(fiber->tsan);
  fibers.clear();
}
