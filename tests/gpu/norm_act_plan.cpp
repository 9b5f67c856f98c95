// Makes the pure functions of csrc/cuda/norm_act_plan.h callable from Python.
#include "cuda/norm_act_plan.h"

using namespace ddpm_fast::cuda;

// The plan as ten numbers: statistics, parts, step, slab, slabs, piece, cuts, threads, shared_bytes, blocks.
extern "C" void plan_of(int64_t samples, int64_t channels, int64_t pixels, int64_t groups, int channels_last,
                        int element_size, int shared_bytes, int clusters, int backward, int64_t* out) {
  const NormActShape shape{samples, channels, pixels, groups, channels_last != 0, element_size};
  const NormActDevice device{shared_bytes, clusters != 0};
  const NormActPlan plan = backward ? plan_norm_act_backward(shape, device) : plan_norm_act(shape, device);
  const int64_t values[] = {plan.statistics, plan.parts, plan.step,    plan.slab,         plan.slabs,
                            plan.piece,      plan.cuts,  plan.threads, plan.shared_bytes, plan.blocks};
  for (int i = 0; i < 10; ++i) out[i] = values[i];
}

// Of the dividers by a number: multiplier and shift of int's, then of int64_t's.
extern "C" void dividers_of(uint32_t by, uint64_t* out) {
  const Divider small(by);
  const LongDivider large(by);
  const uint64_t values[] = {small.multiplier, small.shift, large.multiplier, large.shift};
  for (int i = 0; i < 4; ++i) out[i] = values[i];
}
