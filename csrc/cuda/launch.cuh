// What the launch functions share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "arguments.h"
#include "plan.h"

namespace ddpm_fast {
namespace cuda {

// The current device's number of multiprocessors, which the runtime keeps at hand.
inline int processors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

inline dim3 to_dim3(Grid grid) { return dim3(grid.x, grid.y, grid.z); }

// Whether groups of `vector` elements can be read or written at once: whether the tensor lies as the target does, and
// each group at a multiple of its bytes, of which an access takes 16 at most.
inline bool in_groups(const void* data, const View& view, const Target& target, int vector) {
  const int64_t bytes = std::min(vector * size_of(view.type), 16);
  const bool pieces = target.channels_last && target.channels > kTileChannels && target.channels % vector != 0;
  return view.inner == target.size() && !pieces && reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         (target.samples == 1 || view.sample_stride * size_of(view.type) % bytes == 0);
}

// The same of what is written: it lies as the target does.
inline bool in_groups(const void* data, Type type, const Target& target, int vector) {
  return in_groups(data, View{target.sample_stride, target.size(), 0, 1, type}, target, vector);
}

// Chooses between the two ways to walk, by tiles and in groups of four or flat and in groups of `vector`:
// `run(tiled, layout, grid, shared bytes)`.
template <class Layout, class Run> const char* launch_walk(Layout layout, bool tiled, int vector, const Run& run) {
  const Target& target = layout.target;
  if (tiled) {
    const TilePlan plan = plan_tiles(target.samples, target.channels, target.pixels, processors());
    layout.tile_pixels = plan.pixels, layout.tile_channels = plan.channels;
    run(std::true_type(), layout, plan.grid, plan.shared_bytes);
  } else {
    run(std::false_type(), layout, plan_flat(target.samples, target.size(), vector, processors()), 0);
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace ddpm_fast
