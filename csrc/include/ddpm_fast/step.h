// The arithmetic of one denoising step, each operation rounded on its own: guidance, x0, clip, posterior mean, noise.
//
// Written in F and U, which the including file defines; no include guard, see philox.h. Bounds come first in min()
// and max(), so that a NaN passes through.

// A row of the coefficient table; ddpm_fast/solvers.py says how it is built.
struct StepRow {
  float x0_from_x, x0_from_output, mean_from_x0, mean_from_x, sigma, log_min, log_max, guidance_scale;
};

enum Prediction { kEpsilon, kX0, kV, kXPrev };
enum Variance { kFixed, kLearned, kLearnedRange };

// exp on [-87, 88], clamped there, within 1 ulp: a polynomial of ours, since libm and the GPUs differ.
DDPM_FAST_INLINE F exp_poly(F x) {
  x = max(splat(-87.0f), min(splat(88.0f), x));
  const F t = x * splat(0x1.715476p+0f) + splat(12582912.0f);
  const F n = t - splat(12582912.0f);
  const F r = (x - n * splat(0x1.62e4p-1f)) - n * splat(0x1.7f7d1cp-20f);
  F p = splat(0x1.6a2430p-10f) * r + splat(0x1.1239e4p-7f);
  p = p * r + splat(0x1.5558f2p-5f);
  p = p * r + splat(0x1.555492p-3f);
  p = p * r + splat(0x1.fffffcp-2f);
  p = ((p * r) * r + r) + splat(1.0f);
  return from_bits(bits(p) + shift_left<23>(bits(t)));
}

DDPM_FAST_INLINE F guide(F conditional, F unconditional, const StepRow& row) {
  return unconditional + splat(row.guidance_scale) * (conditional - unconditional);
}

DDPM_FAST_INLINE F predict_x0(F x_t, F output, const StepRow& row, int prediction) {
  if (prediction == kX0) return output;
  if (prediction == kXPrev) return (output - splat(row.mean_from_x) * x_t) / splat(row.mean_from_x0);
  return splat(row.x0_from_x) * x_t - splat(row.x0_from_output) * output;
}

DDPM_FAST_INLINE F clamp(F x, F low, F high) { return min(high, max(low, x)); }

// The standard deviation from the output's variance channels; the row's sigma masks the last step.
DDPM_FAST_INLINE F learned_sigma(F output, const StepRow& row, int variance) {
  F log_variance = output;
  if (variance == kLearnedRange) {
    const F fraction = (output + splat(1.0f)) / splat(2.0f);
    log_variance = fraction * splat(row.log_max) + (splat(1.0f) - fraction) * splat(row.log_min);
  }
  return splat(row.sigma) * exp_poly(splat(0.5f) * log_variance);
}
