#include "source.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// d + exp(-d) - 1, which is d^2 / 2 near 0: there by its series, elsewhere as written.
DDPM_FAST_INLINE F excess_divergence(F d, F exp_neg) {
  F p = splat(1.0f / 40320) - splat(1.0f / 362880) * d;
  p = p * d - splat(1.0f / 5040);
  p = p * d + splat(1.0f / 720);
  p = p * d - splat(1.0f / 120);
  p = p * d + splat(1.0f / 24);
  p = p * d - splat(1.0f / 6);
  p = p * d + splat(1.0f / 2);
  const F magnitude = from_bits(bits(d) & splat(0x7fffffffu));
  return select(negative(bits(magnitude - 0.5f)), p * d * d, (d - 1.0f) + exp_neg);
}

// What the terms of sixteen elements are made of.
struct BoundLanes {
  F x0, predicted, error, mean, difference, log_variance;
};

namespace {  // like what it refers to

class BoundTile {
 public:
  BoundTile(const Bound& op, int64_t sample, int64_t first, int64_t count, float* const (&buffers)[4]) : op_(op) {
    const auto tile_of = [&](const Source& source, int buffer) -> const float* {
      return source ? read(source, op.image, sample, first, count, buffers[buffer]) : nullptr;
    };
    const float* const row = op.coefficients + op.t[sample] * kBoundColumns;
    // The columns are a step's, with the posterior's log variance in the place of sigma.
    std::memcpy(&row_, row, kBoundColumns * sizeof(float));
    log_posterior_ = row_.sigma;
    decoding_ = op.t[sample] == 0;
    from_bytes_ = op.x0.type == ScalarType::Byte;
    x0_ = tile_of(op.x0, 0);
    x_t_ = tile_of(op.x_t, 1);
    output_ = tile_of(op.output, 2);
    values_ = tile_of(op.values, 3);
  }

  BoundLanes lanes(int64_t i, int n) const {
    BoundLanes l;
    l.x0 = load_lanes(x0_ + i, n);
    if (from_bytes_) l.x0 = l.x0 / splat(127.5f) - splat(1.0f);
    const F x = load_lanes(x_t_ + i, n), e = load_lanes(output_ + i, n);
    l.predicted = predict_x0(x, e, row_, op_.prediction);
    const F clipped = op_.clip ? clamp(l.predicted, splat(op_.clip_low), splat(op_.clip_high)) : l.predicted;
    l.error = l.x0 - clipped;
    if (op_.prediction == kXPrev) {
      l.mean = e;
      l.difference = (splat(row_.mean_from_x0) * l.x0 + splat(row_.mean_from_x) * x) - e;
    } else {
      l.mean = splat(row_.mean_from_x0) * clipped + splat(row_.mean_from_x) * x;
      l.difference = splat(row_.mean_from_x0) * l.error;
    }
    l.log_variance = splat(row_.log_max);
    if (values_ != nullptr) {
      l.log_variance = load_lanes(values_ + i, n);
      if (op_.variance == kLearnedRange) {
        const F fraction = (l.log_variance + splat(1.0f)) / splat(2.0f);
        l.log_variance = fraction * splat(row_.log_max) + (splat(1.0f) - fraction) * splat(row_.log_min);
      }
    }
    return l;
  }

  // Twice the divergence.
  F divergence(const BoundLanes& l) const {
    const F d = l.log_variance - splat(log_posterior_);
    const F scaled = l.difference * l.difference * exp_poly(splat(0.0f) - l.log_variance);
    return excess_divergence(d, exp_poly(splat(0.0f) - d)) + scaled;
  }

  // The derivatives of an element's term in nats, with respect to the mean and the log variance of p.
  void derivatives(const BoundLanes& l, F& by_mean, F& by_log_variance) const {
    if (decoding_) {
      float x0[kLanes], mean[kLanes], log_variance[kLanes], first[kLanes], second[kLanes];
      store(x0, l.x0);
      store(mean, l.mean);
      store(log_variance, l.log_variance);
      for (int k = 0; k < kLanes; ++k) {
        const Decoder term = decode(x0[k], mean[k], log_variance[k]);
        first[k] = static_cast<float>(term.by_mean);
        second[k] = static_cast<float>(term.by_log_variance);
      }
      by_mean = load(first);
      by_log_variance = load(second);
      return;
    }
    const F inverse = exp_poly(splat(0.0f) - l.log_variance);
    const F d = l.log_variance - splat(log_posterior_);
    by_mean = splat(0.0f) - l.difference * inverse;
    by_log_variance =
        ((splat(1.0f) - exp_poly(splat(0.0f) - d)) - l.difference * l.difference * inverse) * splat(0.5f);
  }

  // From the derivative with respect to the mean to that with respect to the output.
  F by_output(const BoundLanes& l, F by_mean) const {
    if (op_.prediction == kXPrev) return by_mean;
    F by_x0 = splat(row_.mean_from_x0) * by_mean;
    if (op_.clip) {
      by_x0 = select(negative(bits(l.predicted - op_.clip_low)), splat(0.0f), by_x0);
      by_x0 = select(negative(bits(op_.clip_high - l.predicted)), splat(0.0f), by_x0);
    }
    return op_.prediction == kX0 ? by_x0 : splat(0.0f) - splat(row_.x0_from_output) * by_x0;
  }

  F by_values(F by_log_variance) const {
    if (op_.variance == kLearned) return by_log_variance;
    return by_log_variance * splat(0.5f * (row_.log_max - row_.log_min));
  }

  bool decoding() const { return decoding_; }

 private:
  const Bound& op_;
  StepRow row_{};
  float log_posterior_;
  bool decoding_, from_bytes_;
  const float *x0_, *x_t_, *output_, *values_;
};

}  // namespace

// The first n lanes, the others 0.
DDPM_FAST_INLINE F first_lanes(F a, int n) {
  if (n == kLanes) return a;
  float lanes[kLanes];
  store(lanes, a);
  return load(lanes, n);
}

static void bound_tiles(const Bound& op, const Tiles& tiles, int64_t begin, int64_t end, double* bounds,
                        double* errors) {
  Buffers<4> buffers(tiles);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t count = tiles.count(at);
    const BoundTile tile(op, tiles.sample(at), tiles.first(at), count,
                         {buffers[0], buffers[1], buffers[2], buffers[3]});
    F divergence = splat(0.0f), error = splat(0.0f);
    double nll = 0;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
      const BoundLanes l = tile.lanes(i, n);
      const F e = first_lanes(l.error, n);
      error = error + e * e;
      if (!tile.decoding()) {
        divergence = divergence + first_lanes(tile.divergence(l), n);
        continue;
      }
      float x0[kLanes], mean[kLanes], log_variance[kLanes];
      store(x0, l.x0);
      store(mean, l.mean);
      store(log_variance, l.log_variance);
      for (int k = 0; k < n; ++k) nll += decode(x0[k], mean[k], log_variance[k]).nll;
    }
    bounds[at] = tile.decoding() ? nll : 0.5 * static_cast<double>(sum_of_lanes(divergence));
    errors[at] = sum_of_lanes(error);
  }
}

template <class T>
static void bound_slope_tiles(T* grad_output, int64_t sample_stride, const Bound& op, const float* grad_bound,
                              bool mean_gradient, const Tiles& tiles, int64_t begin, int64_t end) {
  Buffers<4> buffers(tiles);
  for (int64_t at = begin; at < end; ++at) {
    const int64_t sample = tiles.sample(at), first = tiles.first(at), count = tiles.count(at);
    const BoundTile tile(op, sample, first, count, {buffers[0], buffers[1], buffers[2], buffers[3]});
    const F scale =
        splat(static_cast<float>(grad_bound[sample] / (static_cast<double>(op.image.size()) * kLn2)));
    T* const to = grad_output + sample * sample_stride + first;
    for (int64_t i = 0; i < count; i += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
      const BoundLanes l = tile.lanes(i, n);
      F by_mean, by_log_variance;
      tile.derivatives(l, by_mean, by_log_variance);
      store_lanes(to + i, mean_gradient ? scale * tile.by_output(l, by_mean) : splat(0.0f), n);
      if (op.variance != kFixed)
        store_lanes(to + op.image.size() + i, scale * tile.by_values(by_log_variance), n);
    }
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
