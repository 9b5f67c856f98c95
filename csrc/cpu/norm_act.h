// What the GroupNorm kernels are told, and the arithmetic that is done once a channel, in float64.
//
// A batch is cut into units that share no statistics: with channels first the groups of a sample, each a run of
// memory; with channels last the samples, whose groups lie interleaved. A unit is cut into parts, by its sample's
// shape alone, so that neither the batch nor the number of threads changes a bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>

#include "ddpm_fast/moments.h"
#include "image.h"

namespace ddpm_fast {

// A parameter with one value a channel, for all samples (stride 0) or for each.
struct ChannelRows {
  const float* data = nullptr;
  int64_t stride = 0;
  const float* row(int64_t sample) const { return data == nullptr ? nullptr : data + sample * stride; }
};

struct NormAct {
  int64_t samples, channels, pixels, groups;
  Order order;
  bool activation;
  ChannelRows weight, bias, scale, shift, embedding;

  int64_t width() const { return channels / groups; }  // channels of a group
  int64_t group_size() const { return width() * pixels; }
  int64_t units() const { return order == Order::kChannelsFirst ? samples * groups : samples; }
};

// SiLU's kernels take its argument z times this, -log2(e) / 2 in float32: exp(-z) is then a power of four, and what was
// finite stays finite.
constexpr double kSiluUnit = -0x1.715476p-1;

// With v = x + embedding, z = (v - center) * factor + offset, in float32.
struct ChannelCoefficients {
  float embedding, center, factor, offset;
};

// A NaN of any kind as the plain one, which rounding to a shorter type leaves a NaN.
inline float plain(double value) {
  return value == value ? static_cast<float>(value) : std::numeric_limits<float>::quiet_NaN();
}

// The parameters of one sample's channels, and what they come to; z is wanted times `unit`.
class Channels {
 public:
  Channels(const NormAct& op, int64_t sample, double unit = 1.0)
      : unit_(unit),
        weight_(op.weight.row(sample)),
        bias_(op.bias.row(sample)),
        scale_(op.scale.row(sample)),
        shift_(op.shift.row(sample)),
        embedding_(op.embedding.row(sample)) {}
  ChannelCoefficients coefficients(int64_t channel, double mean, double rstd) const {
    const double one_plus_scale = (scale_ ? 1.0 + scale_[channel] : 1.0) * unit_;
    const double factor = (weight_ ? rstd * weight_[channel] : rstd) * one_plus_scale;
    const double offset = (bias_ ? bias_[channel] * one_plus_scale : 0.0) + (shift_ ? shift_[channel] * unit_ : 0.0);
    return {embedding_ ? plain(embedding_[channel]) : 0.0f, plain(mean), plain(factor),
            plain(offset - below_float(mean) * factor)};
  }

 private:
  double unit_;
  const float *weight_, *bias_, *scale_, *shift_, *embedding_;
};

// The parts of a run of channels, `pixels` each: several whole channels, or a piece of one.
class Pieces {
 public:
  Pieces(int64_t channels, int64_t pixels)
      : channels_(channels),
        pixels_(pixels),
        together_(std::max<int64_t>(kElements / pixels, 1)),
        split_((pixels + kElements - 1) / kElements) {}
  int64_t count() const { return (channels_ + together_ - 1) / together_ * split_; }
  int64_t channel(int64_t piece) const { return piece / split_ * together_; }
  int64_t channels(int64_t piece) const { return std::min(together_, channels_ - channel(piece)); }
  int64_t pixel(int64_t piece) const { return piece % split_ * kElements; }
  int64_t pixels(int64_t piece) const { return std::min(kElements, pixels_ - pixel(piece)); }

 private:
  static constexpr int64_t kElements = 4096;  // stays in the first-level cache between two passes
  int64_t channels_, pixels_, together_, split_;
};

// With channels last a sample is read in rows of `repeat` pixels, so that a row of few or oddly many channels is
// still whole vectors, and cut into parts of whole rows.
class Chunks {
 public:
  explicit Chunks(const NormAct& op) : channels_(op.channels), pixels_(op.pixels) {
    if (channels_ < 128) {
      repeat_ = 16 / std::gcd(channels_, int64_t{16});
      while (repeat_ * channels_ < 128) repeat_ *= 2;
      repeat_ = std::min(repeat_, pixels_);
    }
    const int64_t rows = std::max<int64_t>(kElements / (8 * row()), 1) * 8;
    step_ = std::min(std::max(rows * repeat_, kPixels / repeat_ * repeat_), pixels_);
  }
  int64_t repeat() const { return repeat_; }
  int64_t row() const { return repeat_ * channels_; }
  int64_t count() const { return (pixels_ + step_ - 1) / step_; }
  int64_t pixel(int64_t chunk) const { return chunk * step_; }
  int64_t pixels(int64_t chunk) const { return std::min(step_, pixels_ - pixel(chunk)); }

 private:
  static constexpr int64_t kElements = 32768, kPixels = 32;
  int64_t channels_, pixels_, repeat_ = 1, step_;
};

// The line of GradientLine in float32.
struct GradientCoefficients {
  float slope, constant;
};
inline GradientCoefficients gradient_coefficients(double mean, double rstd, const Along& along) {
  const GradientLine line = gradient_line(mean, rstd, along);
  return {plain(line.slope), plain(line.constant)};
}

}  // namespace ddpm_fast
