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

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Whether a tensor, if there is one, lies in the target's order and has a dtype.
inline bool is_plain(const void* data, const View& view, Type type) {
  return data == nullptr || (view.in_order && view.type == type);
}

// Whether groups of `vector` elements can be read or written at once: whether each lies at a multiple of its bytes, of
// which an access takes 16 at most.
inline bool in_groups(const void* data, const View& view, const Target& target, int vector) {
  const int64_t bytes = std::min(vector * size_of(view.type), 16);
  // A tile of some of the channels ends inside a group where the channels are no multiple of one.
  const bool cut = target.channels_last && target.channels > kTileChannels && target.channels % vector != 0;
  return view.in_order && !cut && reinterpret_cast<uintptr_t>(data) % bytes == 0 &&
         (target.samples == 1 || view.sample_stride * size_of(view.type) % bytes == 0);
}

// The same of what is written, which lies as the target does.
inline bool in_groups(const void* data, Type type, const Target& target, int vector) {
  return in_groups(data, View{target.sample_stride, type}, target, vector);
}

// Launches the kernel for a way to walk, by tiles and in groups of four or flat and in groups of `vector`, and for
// sources of any dtype and order or plain ones: `run(tiled, general, layout, grid, shared bytes)`, the first two as types.
template <class Layout, class Run>
const char* launch_walk(Layout layout, bool tiled, bool general, int vector, const Run& run) {
  const Target& target = layout.target;
  const auto run_with = [&](auto by_tiles, Grid grid, int shared_bytes) {
    if (general) run(by_tiles, std::true_type(), layout, to_dim3(grid), shared_bytes);
    else run(by_tiles, std::false_type(), layout, to_dim3(grid), shared_bytes);
  };
  if (tiled) {
    const TilePlan plan = plan_tiles(target.samples, target.channels, target.pixels, processors());
    layout.tile_pixels = plan.pixels, layout.tile_channels = plan.channels;
    run_with(std::true_type(), plan.grid, plan.shared_bytes);
  } else {
    run_with(std::false_type(), plan_flat(target.samples, target.size(), vector, processors()), 0);
  }
  return launch_error();
}

}  // namespace cuda
}  // namespace ddpm_fast
