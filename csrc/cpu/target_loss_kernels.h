#include "noise.h"
#include "source.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

DDPM_FAST_INLINE F magnitude(F u) { return from_bits(bits(u) & splat(0x7fffffffu)); }

DDPM_FAST_INLINE F distance_of(F u, int distance) {
  if (distance == kSquare) return u * u;
  if (distance == kAbsolute) return magnitude(u);
  const F a = magnitude(u);
  return select(negative(bits(a - 1.0f)), u * u * 0.5f, a - 0.5f);
}

// The derivative; that of |u| at 0 is 0, as torch has it.
DDPM_FAST_INLINE F slope_of(F u, int distance) {
  if (distance == kSquare) return u * 2.0f;
  if (distance == kHuber) return clamp(u, splat(-1.0f), splat(1.0f));
  const F sign = from_bits((bits(u) & splat(0x80000000u)) | bits(splat(1.0f)));
  return select(negative(bits(magnitude(u)) - splat(1u)), splat(0.0f), sign);
}

// f(i, n, u) for each run of at most sixteen differences output - target of a tile.
template <class Body>
static void for_each_difference(const TargetLoss& op, int64_t sample, int64_t first, int64_t count, float* output_buffer,
                                float* x0_buffer, float* noise_buffer, float* scratch, const Body& f) {
  const float* const row = op.coefficients + 2 * op.t[sample];
  const float* const output = read(op.output, op.image, sample, first, count, output_buffer);
  const float* noise = nullptr;
  const float* x0 = nullptr;
  if (row[0] != 0.0f) {
    if (op.draw == nullptr) {
      noise = read(op.noise, op.image, sample, first, count, noise_buffer);
    } else {
      fill_normal_tile(noise_buffer, scratch, op.image, first, count, noise_key(*op.draw, sample));
      noise = noise_buffer;
    }
  }
  if (row[1] != 0.0f) x0 = read(op.x0, op.image, sample, first, count, x0_buffer);
  const bool from_bytes = op.x0.type == ScalarType::Byte;
  const F noise_factor = splat(row[0]), x0_factor = splat(row[1]);
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    F u = load_lanes(output + i, n);
    if (noise != nullptr) u = u - noise_factor * load_lanes(noise + i, n);
    if (x0 != nullptr) {
      F x = load_lanes(x0 + i, n);
      if (from_bytes) x = x / splat(127.5f) - splat(1.0f);
      u = u - x0_factor * x;
    }
    f(i, n, u);
  }
}

static void distance_tiles(const TargetLoss& op, const Tiles& tiles, int64_t begin, int64_t end, double* sums) {
  Buffers<4> buffers(tiles);
  for (int64_t tile = begin; tile < end; ++tile) {
    F sum = splat(0.0f);
    const auto add = [&](int64_t, int n, F u) {
      if (n < kLanes) {
        float lanes[kLanes];
        store(lanes, u);
        u = load(lanes, n);
      }
      sum = sum + distance_of(u, op.distance);
    };
    for_each_difference(op, tiles.sample(tile), tiles.first(tile), tiles.count(tile), buffers[0], buffers[1],
                        buffers[2], buffers[3], add);
    sums[tile] = sum_of_lanes(sum);
  }
}

template <class T>
static void slope_tiles(T* grad_output, const TargetLoss& op, const float* grad_losses, const Tiles& tiles,
                        int64_t begin, int64_t end) {
  Buffers<4> buffers(tiles);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t sample = tiles.sample(tile), first = tiles.first(tile);
    const F scale = splat(grad_losses[sample] / static_cast<float>(op.image.size()));
    T* const to = grad_output + sample * op.image.sample_stride + first;
    const auto write = [&](int64_t i, int n, F u) { store_lanes(to + i, scale * slope_of(u, op.distance), n); };
    for_each_difference(op, sample, first, tiles.count(tile), buffers[0], buffers[1], buffers[2], buffers[3], write);
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
