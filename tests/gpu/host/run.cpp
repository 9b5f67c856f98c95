// Runs a kernel in threads of the operating system: those of a cluster's blocks together, and two clusters side by side,
// with nothing that orders one after the other. Barriers are real ones, so that a sanitizer sees what orders accesses.
#include <dlfcn.h>

#include <barrier>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "shim.h"

extern "C" void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*,
                                       dim3*, dim3*, int*);

thread_local uint3 threadIdx, blockIdx;
thread_local dim3 blockDim, gridDim;

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

struct Warp {
  std::barrier<> barrier{kWarp};
  uint64_t given[kWarp] = {};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads), warps(threads / kWarp) {}
  std::barrier<> barrier;
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
  std::barrier<> barrier;
  std::vector<std::unique_ptr<Block>> blocks;
};

thread_local Cluster* cluster;
thread_local Block* block;
thread_local std::optional<std::barrier<>::arrival_token> arrival;

Warp& warp() { return block->warps[threadIdx.x / kWarp]; }

struct Shape {
  dim3 grid, block;
  unsigned blocks;  // of a cluster
  size_t shared;
};

// One thread of a cluster, for every kClustersAtOnce-th cluster of the grid.
void run_thread(const Shape& shape, Cluster& own, unsigned first, unsigned rank, unsigned thread) {
  const unsigned across = shape.grid.x / shape.blocks, clusters = across * shape.grid.y * shape.grid.z;
  cluster = &own;
  block = own.blocks[rank].get();
  for (unsigned i = first; i < clusters; i += kClustersAtOnce) {
    if (thread == 0) block->renew(shape.shared);
    own.barrier.arrive_and_wait();
    threadIdx = {thread, 0, 0};
    blockIdx = {i % across * shape.blocks + rank, i / across % shape.grid.y, i / across / shape.grid.y};
    blockDim = shape.block;
    gridDim = shape.grid;
    pending();
    own.barrier.arrive_and_wait();
  }
}

}  // namespace

int reserve_shared(size_t bytes) {
  fixed_sizes().push_back(bytes);
  return static_cast<int>(fixed_sizes().size()) - 1;
}
void* dynamic_shared() { return block->dynamic.get(); }
void* fixed_shared(int variable) { return block->fixed[variable].get(); }
void* in_block(void* here, int rank) {
  const auto at = static_cast<unsigned char*>(here);
  const Block& other = *cluster->blocks[rank];
  for (size_t i = 0; i < block->fixed.size(); ++i) {
    const ptrdiff_t offset = at - block->fixed[i].get();
    if (offset >= 0 && offset < static_cast<ptrdiff_t>(fixed_sizes()[i])) return other.fixed[i].get() + offset;
  }
  return other.dynamic.get() + (at - block->dynamic.get());
}

void sync_block() { block->barrier.arrive_and_wait(); }
void sync_warp() { warp().barrier.arrive_and_wait(); }
void cluster_arrive() { arrival = cluster->barrier.arrive(); }
void cluster_wait() {
  cluster->barrier.wait(std::move(*arrival));
  arrival.reset();
}
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
  __cudaRegisterFunction(nullptr, static_cast<const char*>(kernel), nullptr, found.dli_sname, 0, nullptr, nullptr,
                         nullptr, nullptr, nullptr);
  return kernel;
}

cudaError_t launch(const cudaLaunchConfig_t* config, const void* kernel, std::function<void()> call) {
  pending = std::move(call);
  return cudaLaunchKernelExC(config, kernel, nullptr);
}

}  // namespace host

// The launch that the runtime's callback was given.
extern "C" void host_run(const unsigned* grid, const unsigned* block, const unsigned* cluster, uint64_t shared) {
  const host::Shape shape{{grid[0], grid[1], grid[2]}, {block[0], 1, 1}, cluster[0], shared};
  std::vector<std::unique_ptr<host::Cluster>> clusters;
  std::vector<std::thread> threads;
  for (unsigned first = 0; first < host::kClustersAtOnce; ++first) {
    clusters.push_back(std::make_unique<host::Cluster>(shape.blocks, block[0]));
    for (unsigned rank = 0; rank < shape.blocks; ++rank)
      for (unsigned thread = 0; thread < block[0]; ++thread)
        threads.emplace_back(host::run_thread, std::cref(shape), std::ref(*clusters.back()), first, rank, thread);
  }
  for (std::thread& thread : threads) thread.join();
}
