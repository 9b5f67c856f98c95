// Statistics and coefficients of GroupNorm, in float64, as C++ and CUDA compute them once a group or channel.
#pragma once

#ifdef __CUDACC__
#define DDPM_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DDPM_FAST_HOST_DEVICE inline
#endif

namespace ddpm_fast {

// Mean, and sum of squared deviations from it.
struct Moments {
  double mean = 0, deviation = 0;
};

// Chan, Golub and LeVeque's (1979) update of the moments of `count` values with those of `more` others.
DDPM_FAST_HOST_DEVICE void merge(Moments& into, double count, const Moments& other, double more) {
  const double total = count + more, delta = other.mean - into.mean;
  into.mean += delta * (more / total);
  into.deviation += other.deviation + delta * delta * (count * (more / total));
}

// Moments of n values of which sums of their differences to `about`, and of the squares of these, are known.
DDPM_FAST_HOST_DEVICE Moments moments_about(double about, double sum, double squares, double n) {
  const double offset = sum / n, deviation = squares - sum * offset;
  return {about + offset, deviation < 0 ? 0 : deviation};
}

// What float32 cannot hold of a mean. Without it a large mean would show in the result.
DDPM_FAST_HOST_DEVICE double below_float(double mean) { return mean - static_cast<double>(static_cast<float>(mean)); }

// What the backward pass sums up over the pixels of a channel: the gradient of z, the same times the difference
// v - center, and the difference.
struct ChannelSums {
  double gradient = 0, product = 0, difference = 0;
};
DDPM_FAST_HOST_DEVICE void operator+=(ChannelSums& into, const ChannelSums& other) {
  into.gradient += other.gradient;
  into.product += other.product;
  into.difference += other.difference;
}
// Sums of grad_z * xhat and of xhat.
DDPM_FAST_HOST_DEVICE double xhat_product(const ChannelSums& sums, double mean, double rstd) {
  return (sums.product - below_float(mean) * sums.gradient) * rstd;
}
DDPM_FAST_HOST_DEVICE double xhat_sum(const ChannelSums& sums, double pixels, double mean, double rstd) {
  return (sums.difference - below_float(mean) * pixels) * rstd;
}

// The means over a group of the gradient of xhat, and of the same times xhat: the parts of the gradient along the mean
// and along xhat, which are taken out.
struct Along {
  double mean = 0, xhat = 0;
};
// grad_x = grad_z * factor + ((v - center) * slope + constant).
struct GradientLine {
  double slope, constant;
};
DDPM_FAST_HOST_DEVICE GradientLine gradient_line(double mean, double rstd, const Along& along) {
  const double slope = -rstd * along.xhat * rstd;
  return {slope, -slope * below_float(mean) - rstd * along.mean};
}

}  // namespace ddpm_fast
