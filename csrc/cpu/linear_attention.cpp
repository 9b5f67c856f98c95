// Linear attention (Shen et al. 2018): reads the arguments and shares out the work, heads of samples and chunks of
// their pixels. No matrix is as large as the image but those that are read and written.
#include "linear_attention.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>

#include "kernels.h"

namespace ddpm_fast {
namespace {

constexpr int64_t kMostChannels = 128;  // of a head

}  // namespace
}  // namespace ddpm_fast

#define DDPM_FAST_KERNELS "linear_attention_kernels.h"
#include "for_each_isa.h"

namespace ddpm_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kGrain = 16384;  // elements for which waking a thread pays

// work(unit, chunk, scratch) for every chunk of every head of every sample.
template <class Work> void for_each_chunk(const LinearAttention& op, const Work& work) {
  const int64_t chunks = op.chunks(), size = op.dim * op.pixels_of(0);
  torch::stable::parallel_for(
      0, op.units() * chunks, std::max<int64_t>(kGrain / size, 1), [&](int64_t begin, int64_t end) {
        const std::unique_ptr<float[]> scratch(new float[DDPM_FAST_DISPATCH(attention_scratch)(op)]);
        for (int64_t i = begin; i < end; ++i) work(i / chunks, i % chunks, scratch.get());
      });
}

void run(const LinearAttention& op, const float* qkv, float* out) {
  const int64_t hidden = op.heads * op.dim, chunks = op.chunks(), size = op.part_size();
  const std::unique_ptr<float[]> parts(new float[op.units() * chunks * size]);
  // Where a head's channels begin; queries, keys and values are the thirds 0, 1 and 2.
  const auto input = [&](int64_t unit, int64_t third) {
    const int64_t channel = third * hidden + unit % op.heads * op.dim;
    return qkv + unit / op.heads * op.qkv.sample_stride + channel * op.qkv.channel_stride;
  };
  for_each_chunk(op, [&](int64_t unit, int64_t chunk, float* scratch) {
    const Part part(op, parts.get() + (unit * chunks + chunk) * size);
    DDPM_FAST_DISPATCH(attention_part)
    (op, input(unit, 1), input(unit, 2), unit % op.heads, chunk, scratch, part);
  });
  torch::stable::parallel_for(
      0, op.units(), std::max<int64_t>(kGrain / (chunks * size), 1), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit)
          DDPM_FAST_DISPATCH(attention_context)(op, parts.get() + unit * chunks * size);
      });
  for_each_chunk(op, [&](int64_t unit, int64_t chunk, float* scratch) {
    float* const to =
        out + unit / op.heads * op.out.sample_stride + unit % op.heads * op.dim * op.out.channel_stride;
    DDPM_FAST_DISPATCH(attention_apply)
    (op, input(unit, 0), Part(op, parts.get() + unit * chunks * size).context, chunk, scratch, to);
  });
}

}  // namespace

void linear_attention(Tensor qkv, std::optional<Tensor> memory, int64_t heads, double scale, Tensor out) {
  STD_TORCH_CHECK(qkv.dim() >= 2 && qkv.scalar_type() == ScalarType::Float && qkv.is_cpu(),
                  "qkv must be a float32 CPU tensor (N, C, *)");
  LinearAttention op{};
  op.heads = heads;
  op.scale = static_cast<float>(scale);
  op.qkv = image_of(qkv, "qkv");
  op.out = dense_image_of(out, "out");
  STD_TORCH_CHECK(heads > 0 && op.qkv.channels % (3 * heads) == 0, "qkv has ", op.qkv.channels,
                  " channels, which 3 times ", heads, " heads do not divide");
  op.dim = op.qkv.channels / (3 * heads);
  STD_TORCH_CHECK(0 < op.dim && op.dim <= kMostChannels, "a head has ", op.dim, " channels; 1 to ", kMostChannels,
                  " are allowed");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_cpu() && op.out.samples == op.qkv.samples &&
                      op.out.channels == heads * op.dim && op.out.pixels == op.qkv.pixels,
                  "out must be a float32 CPU tensor with a third of qkv's channels");
  if (memory) {
    STD_TORCH_CHECK(memory->scalar_type() == ScalarType::Float && memory->is_cpu() && memory->is_contiguous() &&
                        memory->dim() == 4 && memory->size(0) == 2 && memory->size(1) == heads &&
                        memory->size(2) == op.dim,
                    "memory must be a contiguous float32 CPU tensor (2, heads, dim, n)");
    op.memory = static_cast<const float*>(memory->const_data_ptr());
    op.memories = memory->size(3);
  }
  if (qkv.numel() == 0) return;
  run(op, static_cast<const float*>(qkv.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()));
}

}  // namespace ddpm_fast
