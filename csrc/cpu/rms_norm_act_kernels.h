#include "silu.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

template <bool kActivation> DDPM_FAST_INLINE F rms_activate(F z) {
  if constexpr (kActivation) return silu(z);
  return z;
}

// The gradient of z from that of y.
template <bool kActivation> DDPM_FAST_INLINE F rms_gradient(F grad_out, F z) {
  if constexpr (kActivation) return grad_out * silu_derivative(z);
  return grad_out;
}

// ---- Channels first: sixteen pixels at a time, a vector of each channel's run ----

// Pixels that are worked through together: their channels are read twice, the second time from the cache.
constexpr int64_t kRmsTile = 64;

// The last vector of n elements may be partial.
DDPM_FAST_INLINE int lanes_at(int64_t i, int64_t n) { return static_cast<int>(std::min<int64_t>(n - i, kLanes)); }

// Eight channels' squares are added up before they meet the others': a long plain sum would round more than eager
// PyTorch's.
template <class T> static void rms_squares(const RmsNormAct& op, const T* x, int64_t n, float* r) {
  const F channels = splat(static_cast<float>(op.channels)), limit = splat(op.limit());
  for (int64_t i = 0; i < n; i += kLanes) store(r + i, splat(0.0f));
  for (int64_t c = 0; c < op.channels; c += 8) {
    const int64_t end = std::min(c + 8, op.channels);
    for (int64_t i = 0; i < n; i += kLanes) {
      F sum = splat(0.0f);
      for (int64_t k = c; k < end; ++k) {
        const F v = load_lanes(x + k * op.pixels + i, lanes_at(i, n));
        sum = fma(v, v, sum);
      }
      store(r + i, load(r + i) + sum);
    }
  }
  for (int64_t i = 0; i < n; i += kLanes) store(r + i, min(limit, sqrt(channels / load(r + i))));
}

template <class T, bool kActivation>
static void rms_apply_first(const RmsNormAct& op, const T* x, T* out, int64_t pixels, RmsChannels channels, float* r) {
  for (int64_t begin = 0; begin < pixels; begin += kRmsTile) {
    const int64_t n = std::min(kRmsTile, pixels - begin);
    float tile[kRmsTile];
    rms_squares(op, x + begin, n, tile);
    std::copy(tile, tile + n, r + begin);
    for (int64_t c = 0; c < op.channels; ++c) {
      const F factor = splat(channels.factor[c]), shift = splat(channels.shift[c]);
      const int64_t at = c * op.pixels + begin;
      for (int64_t i = 0; i < n; i += kLanes) {
        const int lanes = lanes_at(i, n);
        const F z = fma(load_lanes(x + at + i, lanes) * load(tile + i), factor, shift);
        store_lanes(out + at + i, rms_activate<kActivation>(z), lanes);
      }
    }
  }
}

template <class T, bool kActivation>
static void rms_backward_first(const RmsNormAct& op, const T* grad_out, const T* x, T* grad_x, int64_t pixels,
                               const float* r, RmsChannels channels, RmsSums sums, float* scratch) {
  const float limit = op.limit(), mean = 1.0f / static_cast<float>(op.channels);
  for (int64_t begin = 0; begin < pixels; begin += kRmsTile) {
    const int64_t n = std::min(kRmsTile, pixels - begin), vectors = (n + kLanes - 1) / kLanes;
    F along[kRmsTile / kLanes];
    for (int64_t i = 0; i < vectors; ++i) along[i] = splat(0.0f);
    for (int64_t c = 0; c < op.channels; ++c) {
      const F factor = splat(channels.factor[c]), shift = splat(channels.shift[c]);
      const int64_t at = c * op.pixels + begin;
      F gradient = splat(0.0f), product = splat(0.0f);
      for (int64_t i = 0; i < vectors; ++i) {
        const int lanes = lanes_at(i * kLanes, n);
        const int64_t p = i * kLanes;
        const F xhat = load_lanes(x + at + p, lanes) * load_lanes(r + begin + p, lanes);
        const F grad_z = rms_gradient<kActivation>(load_lanes(grad_out + at + p, lanes), fma(xhat, factor, shift));
        gradient = gradient + grad_z;
        product = fma(grad_z, xhat, product);
        const F grad_xhat = grad_z * factor;
        along[i] = fma(grad_xhat, xhat, along[i]);
        store(scratch + c * kRmsTile + p, grad_xhat);
      }
      sums.gradient[c] += sum_of_lanes(gradient);
      sums.product[c] += sum_of_lanes(product);
    }
    if (grad_x == nullptr) continue;
    for (int64_t i = 0; i < vectors; ++i) {
      const int lanes = lanes_at(i * kLanes, n);
      const int64_t p = i * kLanes;
      const F factor = load_lanes(r + begin + p, lanes);
      const F slope = select(negative(bits(factor - splat(limit))), along[i] * splat(mean) * factor, splat(0.0f));
      for (int64_t c = 0; c < op.channels; ++c) {
        const int64_t at = c * op.pixels + begin + p;
        const F difference = load(scratch + c * kRmsTile + p) - load_lanes(x + at, lanes) * slope;
        store_lanes(grad_x + at, difference * factor, lanes);
      }
    }
  }
}

// ---- Channels last: a pixel at a time, sixteen channels a vector ----

template <class T, bool kActivation>
static void rms_apply_last(const RmsNormAct& op, const T* x, T* out, int64_t pixels, RmsChannels channels, float* r) {
  const int64_t count = op.channels, whole = count / kLanes * kLanes;
  const int rest = static_cast<int>(count - whole);
  const float limit = op.limit();
  for (int64_t p = 0; p < pixels; ++p, x += count, out += count) {
    F sum[2] = {splat(0.0f), splat(0.0f)};
    int64_t c = 0;
    for (; c + 2 * kLanes <= count; c += 2 * kLanes)
      for (int k = 0; k < 2; ++k) {
        const F v = load(x + c + k * kLanes);
        sum[k] = fma(v, v, sum[k]);
      }
    for (; c < count; c += kLanes) {
      const F v = load_lanes(x + c, lanes_at(c, count));
      sum[0] = fma(v, v, sum[0]);
    }
    const double squares = sum_of_lanes(sum[0] + sum[1]);
    const float own = static_cast<float>(std::sqrt(static_cast<double>(count) / squares));
    r[p] = own > limit ? limit : own;  // a NaN stays one
    const F factor = splat(r[p]);
    for (c = 0; c < whole; c += kLanes)
      store(out + c, rms_activate<kActivation>(
                         fma(load(x + c) * factor, load(channels.factor + c), load(channels.shift + c))));
    if (rest)
      store_lanes(out + c,
                  rms_activate<kActivation>(fma(load_lanes(x + c, rest) * factor, load_lanes(channels.factor + c, rest),
                                                load_lanes(channels.shift + c, rest))),
                  rest);
  }
}

template <class T, bool kActivation>
static void rms_backward_last(const RmsNormAct& op, const T* grad_out, const T* x, T* grad_x, int64_t pixels,
                              const float* r, RmsChannels channels, RmsSums sums, float* scratch) {
  const int64_t count = op.channels;
  const float limit = op.limit(), mean = 1.0f / static_cast<float>(count);
  for (int64_t p = 0; p < pixels; ++p, x += count, grad_out += count) {
    const F factor = splat(r[p]);
    F along = splat(0.0f);
    for (int64_t c = 0; c < count; c += kLanes) {
      const int lanes = lanes_at(c, count);
      const F k = load_lanes(channels.factor + c, lanes), xhat = load_lanes(x + c, lanes) * factor;
      const F z = fma(xhat, k, load_lanes(channels.shift + c, lanes));
      const F grad_z = rms_gradient<kActivation>(load_lanes(grad_out + c, lanes), z), grad_xhat = grad_z * k;
      store_lanes(sums.gradient + c, load_lanes(sums.gradient + c, lanes) + grad_z, lanes);
      store_lanes(sums.product + c, fma(grad_z, xhat, load_lanes(sums.product + c, lanes)), lanes);
      along = fma(grad_xhat, xhat, along);
      store_lanes(scratch + c, grad_xhat, lanes);
    }
    if (grad_x == nullptr) continue;
    const F slope = splat(r[p] < limit ? sum_of_lanes(along) * mean * r[p] : 0.0f);
    for (int64_t c = 0; c < count; c += kLanes) {
      const int lanes = lanes_at(c, count);
      store_lanes(grad_x + c, (load_lanes(scratch + c, lanes) - load_lanes(x + c, lanes) * slope) * factor, lanes);
    }
    grad_x += count;
  }
}

template <class T>
static void rms_apply(const RmsNormAct& op, const T* x, T* out, int64_t pixels, RmsChannels channels, float* r) {
  const bool first = op.order == Order::kChannelsFirst;
  if (op.activation)
    first ? rms_apply_first<T, true>(op, x, out, pixels, channels, r)
          : rms_apply_last<T, true>(op, x, out, pixels, channels, r);
  else
    first ? rms_apply_first<T, false>(op, x, out, pixels, channels, r)
          : rms_apply_last<T, false>(op, x, out, pixels, channels, r);
}

template <class T>
static void rms_backward(const RmsNormAct& op, const T* grad_out, const T* x, T* grad_x, int64_t pixels, const float* r,
                         RmsChannels channels, RmsSums sums, float* scratch) {
  const bool first = op.order == Order::kChannelsFirst;
  if (op.activation)
    first ? rms_backward_first<T, true>(op, grad_out, x, grad_x, pixels, r, channels, sums, scratch)
          : rms_backward_last<T, true>(op, grad_out, x, grad_x, pixels, r, channels, sums, scratch);
  else
    first ? rms_backward_first<T, false>(op, grad_out, x, grad_x, pixels, r, channels, sums, scratch)
          : rms_backward_last<T, false>(op, grad_out, x, grad_x, pixels, r, channels, sums, scratch);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
