#include <torch/csrc/stable/tensor_inl.h>

#include <vector>

#include "arguments.h"
#include "image.h"
#include "kernels.h"
#include "tiles.h"

#define DDPM_FAST_KERNELS "random_kernels.h"
#include "for_each_isa.h"

namespace ddpm_fast {
namespace {

template <class T> void normal_of(const Tensor& out, const Draw& draw) {
  const Image image = dense_image_of(out, "out");
  const Tiles tiles(image);
  T* const data = static_cast<T*>(out.mutable_data_ptr());
  tiles.parallel([&](int64_t begin, int64_t end) {
    DDPM_FAST_DISPATCH(normal_tiles<T>)(data, image, tiles, draw, begin, end);
  });
}

}  // namespace

void normal(Tensor out, Tensor seed, std::optional<Tensor> sample_ids, Tensor step, int64_t stream) {
  const Draw draw(seed, sample_ids, step, stream, out.size(0));
  switch (out.scalar_type()) {
    case ScalarType::Float: return normal_of<float>(out, draw);
    case ScalarType::Half: return normal_of<Half>(out, draw);
    case ScalarType::BFloat16: return normal_of<BFloat16>(out, draw);
    default: STD_TORCH_CHECK(false, "out must be float32, float16 or bfloat16");
  }
}

}  // namespace ddpm_fast
