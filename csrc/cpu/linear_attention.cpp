// Linear attention (Shen et al. 2018): reads the arguments and shares out the work, heads of samples and chunks of
// their pixels. No matrix is as large as the image but those that are read and written.
#include "linear_attention.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "kernels.h"
#include "scratch.h"

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

thread_local Scratch thread_scratch, call_scratch;  // of each thread; of the one that called

// work(i, scratch) for i = 0 .. count - 1 by all threads; each is work on so many elements.
template <class Work> void share_out(int64_t count, int64_t elements, int64_t scratch, const Work& work) {
  torch::stable::parallel_for(0, count, std::max<int64_t>(kGrain / elements, 1), [&](int64_t begin, int64_t end) {
    float* const own = thread_scratch.get(scratch);
    for (int64_t i = begin; i < end; ++i) work(i, own);
  });
}

// work(unit, chunk, scratch) for every chunk of every head of every sample.
template <class Work> void for_each_chunk(const LinearAttention& op, const Work& work) {
  const int64_t chunks = op.chunks();
  share_out(op.units() * chunks, op.dim * op.pixels_of(0), DDPM_FAST_DISPATCH(attention_scratch)(op),
            [&](int64_t i, float* scratch) { work(i / chunks, i % chunks, scratch); });
}

void run(const LinearAttention& op, const float* qkv, float* out) {
  const int64_t hidden = op.heads * op.dim, chunks = op.chunks(), size = op.part_size();
  float* const parts = call_scratch.get(op.units() * chunks * size);
  // Where a head's channels begin; queries, keys and values are the thirds 0, 1 and 2.
  const auto input = [&](int64_t unit, int64_t third) {
    const int64_t channel = third * hidden + unit % op.heads * op.dim;
    return qkv + unit / op.heads * op.qkv.sample_stride + channel * op.qkv.channel_stride;
  };
  for_each_chunk(op, [&](int64_t unit, int64_t chunk, float* scratch) {
    const Part part(op, parts + (unit * chunks + chunk) * size);
    DDPM_FAST_DISPATCH(attention_part)
    (op, input(unit, 1), input(unit, 2), unit % op.heads, chunk, scratch, part);
  });
  torch::stable::parallel_for(
      0, op.units(), std::max<int64_t>(kGrain / (chunks * size), 1), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit)
          DDPM_FAST_DISPATCH(attention_context)(op, parts + unit * chunks * size);
      });
  for_each_chunk(op, [&](int64_t unit, int64_t chunk, float* scratch) {
    float* const to =
        out + unit / op.heads * op.out.sample_stride + unit % op.heads * op.dim * op.out.channel_stride;
    DDPM_FAST_DISPATCH(attention_apply)
    (op, input(unit, 0), Part(op, parts + unit * chunks * size).context, chunk, scratch, to);
  });
}

// Slices of one run of memory, each of whole vectors.
class Slices {
 public:
  int64_t add(int64_t elements) {
    const int64_t at = size_;
    size_ += whole_vectors(elements);
    return at;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

void run_projected(const LinearAttention& op, Projections with, const Image& image, const float* x,
                   const float* qkv_weight, const float* out_weight, float* out) {
  const int64_t hidden = op.heads * op.dim, chunks = op.chunks(), size = op.part_size(), third = hidden * with.channels;
  const int64_t columns = with.columns(), out_columns = with.out_columns(), context = op.dim * out_columns;
  const bool rows_already = image.channel_stride == 1 && with.channels == columns;
  Slices slices;
  const int64_t projections = slices.add(3 * third), out_projection = slices.add(hidden * out_columns),
                parts_at = slices.add(op.units() * chunks * size), contexts_at = slices.add(op.units() * context),
                rows_at = slices.add(rows_already ? 0 : image.samples * image.pixels * columns);
  float* const memory = call_scratch.get(slices.size());
  float *const parts = memory + parts_at, *const contexts = memory + contexts_at;
  with.queries = memory + projections, with.keys = with.queries + third, with.values = with.keys + third;
  with.out = memory + out_projection;
  share_out(3 * op.heads, op.dim * with.channels, 0, [&](int64_t i, float*) {
    const int64_t at = i * op.dim * with.channels;
    DDPM_FAST_DISPATCH(transpose_matrix)
    (qkv_weight + at, with.channels, op.dim, with.channels, op.dim, memory + projections + at);
  });
  DDPM_FAST_DISPATCH(transpose_matrix)
  (out_weight, hidden, with.outputs, hidden, out_columns, memory + out_projection);
  if (!rows_already)
    share_out(image.samples, image.size(), 0, [&](int64_t sample, float*) {
      DDPM_FAST_DISPATCH(rows_of)
      (x + sample * image.sample_stride, image.channel_stride, image.pixel_stride, image.pixels, image.channels, 0.0f,
       memory + rows_at + sample * image.pixels * columns);
    });
  const auto rows = [&](int64_t sample) {
    return rows_already ? Rows{x + sample * image.sample_stride, image.pixel_stride}
                        : Rows{memory + rows_at + sample * image.pixels * columns, columns};
  };
  const int64_t scratch = DDPM_FAST_DISPATCH(projected_scratch)(op, with);
  share_out(op.units() * chunks, with.channels * op.pixels_of(0), scratch, [&](int64_t i, float* own) {
    const int64_t unit = i / chunks;
    DDPM_FAST_DISPATCH(projected_part)
    (op, with, rows(unit / op.heads), unit % op.heads, i % chunks, own, Part(op, parts + i * size));
  });
  share_out(op.units(), chunks * size + context, 0, [&](int64_t unit, float*) {
    DDPM_FAST_DISPATCH(projected_context)
    (op, with, parts + unit * chunks * size, unit % op.heads, contexts + unit * context);
  });
  const int64_t blocks = (image.pixels + LinearAttention::kBlock - 1) / LinearAttention::kBlock;
  share_out(image.samples * blocks, LinearAttention::kBlock * hidden, scratch, [&](int64_t i, float* own) {
    const int64_t sample = i / blocks, begin = i % blocks * LinearAttention::kBlock;
    DDPM_FAST_DISPATCH(projected_apply)
    (op, with, rows(sample), contexts + sample * op.heads * context, begin,
     std::min(begin + LinearAttention::kBlock, image.pixels), own, out + sample * op.out.sample_stride);
  });
}

LinearAttention describe(const Tensor& x, const char* name, const Tensor& out, int64_t heads, double scale) {
  STD_TORCH_CHECK(x.dim() >= 2 && x.scalar_type() == ScalarType::Float && x.is_cpu(), name,
                  " must be a float32 CPU tensor (N, C, *)");
  LinearAttention op{};
  op.heads = heads;
  op.scale = static_cast<float>(scale);
  op.qkv = image_of(x, name);
  op.out = dense_image_of(out, "out");
  return op;
}

// A head's channels, where the queries, keys and values of all heads have `channels`.
void set_dim(LinearAttention& op, const char* name, int64_t channels) {
  STD_TORCH_CHECK(op.heads > 0 && channels % (3 * op.heads) == 0, name, " has ", channels, " channels, which 3 times ",
                  op.heads, " heads do not divide");
  op.dim = channels / (3 * op.heads);
  STD_TORCH_CHECK(0 < op.dim && op.dim <= kMostChannels, "a head has ", op.dim, " channels; 1 to ", kMostChannels,
                  " are allowed");
}

void read_memory(LinearAttention& op, const std::optional<Tensor>& memory) {
  if (!memory) return;
  STD_TORCH_CHECK(memory->scalar_type() == ScalarType::Float && memory->is_cpu() && memory->is_contiguous() &&
                      memory->dim() == 4 && memory->size(0) == 2 && memory->size(1) == op.heads &&
                      memory->size(2) == op.dim,
                  "memory must be a contiguous float32 CPU tensor (2, heads, dim, n)");
  op.memory = static_cast<const float*>(memory->const_data_ptr());
  op.memories = memory->size(3);
}

void check_out(const LinearAttention& op, const Tensor& out, int64_t channels) {
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_cpu() && op.out.samples == op.qkv.samples &&
                      op.out.channels == channels && op.out.pixels == op.qkv.pixels,
                  "out must be a float32 CPU tensor with ", channels, " channels");
}

// A projection's weight (rows, columns, 1, ..).
const float* matrix(const Tensor& weight, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float && weight.is_cpu() && weight.is_contiguous() &&
                      weight.dim() >= 2 && weight.size(0) == rows && weight.size(1) == columns &&
                      weight.numel() == rows * columns,
                  name, " must be a contiguous float32 CPU tensor (", rows, ", ", columns, ")");
  return static_cast<const float*>(weight.const_data_ptr());
}

}  // namespace

void linear_attention(Tensor qkv, std::optional<Tensor> memory, int64_t heads, double scale, Tensor out) {
  LinearAttention op = describe(qkv, "qkv", out, heads, scale);
  set_dim(op, "qkv", op.qkv.channels);
  check_out(op, out, heads * op.dim);
  read_memory(op, memory);
  if (qkv.numel() == 0) return;
  run(op, static_cast<const float*>(qkv.const_data_ptr()), static_cast<float*>(out.mutable_data_ptr()));
}

void projected_linear_attention(Tensor x, Tensor qkv_weight, Tensor out_weight, std::optional<Tensor> out_bias,
                                std::optional<Tensor> memory, int64_t heads, double scale, Tensor out) {
  LinearAttention op = describe(x, "x", out, heads, scale);
  const int64_t rows = qkv_weight.size(0);
  set_dim(op, "qkv_weight", rows);
  STD_TORCH_CHECK(op.dim % 16 == 0, "a head has ", op.dim, " channels; multiples of 16 are allowed");
  Projections with{};
  with.channels = op.qkv.channels;
  with.outputs = out_weight.size(0);
  const float* const in_data = matrix(qkv_weight, rows, with.channels, "qkv_weight");
  const float* const out_data = matrix(out_weight, with.outputs, rows / 3, "out_weight");
  if (out_bias) {
    STD_TORCH_CHECK(out_bias->scalar_type() == ScalarType::Float && out_bias->is_cpu() && out_bias->is_contiguous() &&
                        out_bias->dim() == 1 && out_bias->numel() == with.outputs,
                    "out_bias must be a contiguous float32 CPU tensor of ", with.outputs, " elements");
    with.bias = static_cast<const float*>(out_bias->const_data_ptr());
  }
  check_out(op, out, with.outputs);
  read_memory(op, memory);
  if (x.numel() == 0) return;
  run_projected(op, with, op.qkv, static_cast<const float*>(x.const_data_ptr()), in_data, out_data,
                static_cast<float*>(out.mutable_data_ptr()));
}

}  // namespace ddpm_fast
