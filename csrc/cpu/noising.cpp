#include <torch/csrc/stable/tensor_inl.h>

#include "arguments.h"
#include "image.h"
#include "kernels.h"
#include "tiles.h"

namespace ddpm_fast {
namespace {

struct Noising {
  Image image;  // of x_t, and of the noise where it is drawn
  Source x0, noise;
  const float* coefficients;
  PerSample t;
  const Draw* draw;  // null where the noise is given; where there is no tensor for it, it is not kept
};

}  // namespace
}  // namespace ddpm_fast

#define DDPM_FAST_KERNELS "noising_kernels.h"
#include "for_each_isa.h"

namespace ddpm_fast {
namespace {

template <class T> void run(const Tensor& out, void* noise_out, const Noising& op) {
  const Tiles tiles(op.image);
  T* const to = static_cast<T*>(out.mutable_data_ptr());
  tiles.parallel([&](int64_t begin, int64_t end) {
    DDPM_FAST_DISPATCH(noising_tiles<T>)(to, static_cast<T*>(noise_out), op, tiles, begin, end);
  });
}

void noising_with(const Tensor& x0, const Tensor& t, const Tensor& coefficients, const std::optional<Tensor>& noise,
                  const Tensor& out, const Draw* draw) {
  const Image image = dense_image_of(out, "out");
  const Noising op{image, Source(x0, "x0"), noise ? Source(*noise, "noise") : Source(),
                   table(coefficients, 2, "coefficients"), rows(t, image.samples, coefficients.size(0), "t"), draw};
  check_shape(op.x0.image, image, "x0");
  if (noise) check_shape(op.noise.image, image, "noise");
  void* noise_out = nullptr;
  if (draw != nullptr && noise) {
    const bool twin = noise->scalar_type() == out.scalar_type() && op.noise.aligned_with(image) &&
                      op.noise.image.sample_stride == image.sample_stride;
    STD_TORCH_CHECK(twin, "the noise drawn must have the dtype and layout of out");
    noise_out = noise->mutable_data_ptr();
  }
  switch (out.scalar_type()) {
    case ScalarType::Float: return run<float>(out, noise_out, op);
    case ScalarType::Half: return run<Half>(out, noise_out, op);
    case ScalarType::BFloat16: return run<BFloat16>(out, noise_out, op);
    default: STD_TORCH_CHECK(false, "out must be float32, float16 or bfloat16");
  }
}

}  // namespace

void noising(Tensor x0, Tensor t, Tensor coefficients, Tensor noise, Tensor out) {
  noising_with(x0, t, coefficients, noise, out, nullptr);
}

void noising_random(Tensor x0, Tensor t, Tensor coefficients, Tensor seed, std::optional<Tensor> sample_ids,
                    Tensor step, int64_t stream, Tensor out, Tensor noise) {
  const Draw draw(seed, sample_ids, step, stream, out.size(0));
  noising_with(x0, t, coefficients, noise, out, &draw);
}

void noising_drawn(Tensor x0, Tensor t, Tensor coefficients, Tensor seed, std::optional<Tensor> sample_ids, Tensor step,
                   int64_t stream, Tensor out) {
  // Noise that goes with an image of another dtype is rounded to it: that needs a tensor.
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "out must be float32");
  const Draw draw(seed, sample_ids, step, stream, out.size(0));
  noising_with(x0, t, coefficients, std::nullopt, out, &draw);
}

}  // namespace ddpm_fast
