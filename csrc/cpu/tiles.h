// Cuts the samples of a batch into tiles that stay in the first-level cache, and numbers the tiles for the threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <memory>

#include "image.h"

namespace ddpm_fast {

class Tiles {
 public:
  // Tiles of a channels_last image hold whole pixels, sixty-four at least, since a run of normals is made by the
  // sixty-four.
  explicit Tiles(const Image& image) : size_(image.size()) {
    int64_t step = kElements;
    if (image.order() == Order::kChannelsLast)
      step = image.channels * std::max<int64_t>(kElements / image.channels / 64 * 64, 64);
    elements_ = std::max<int64_t>(std::min(step, size_), 1);
    per_sample_ = (size_ + elements_ - 1) / elements_;
    count_ = image.samples * per_sample_;
    STD_TORCH_CHECK(size_ <= (int64_t{1} << 34), "a sample has ", size_,
                    " elements; the noise counter addresses at most 2^34");
  }

  int64_t sample(int64_t tile) const { return tile / per_sample_; }
  int64_t first(int64_t tile) const { return tile % per_sample_ * elements_; }
  int64_t count(int64_t tile) const { return std::min(elements_, size_ - first(tile)); }
  int64_t elements() const { return elements_; }
  int64_t total() const { return count_; }
  // What the tiles of a sample add up to, in their order.
  double sum(const double* tiles, int64_t sample) const {
    double total = 0;
    for (int64_t i = 0; i < per_sample_; ++i) total += tiles[sample * per_sample_ + i];
    return total;
  }

  // f(begin, end) over ranges of tiles, on PyTorch's threads.
  template <class Body> void parallel(const Body& f) const {
    const int64_t grain = std::max<int64_t>(kElementsPerThread / elements_, 1);
    torch::stable::parallel_for(0, count_, grain, f);
  }

 private:
  static constexpr int64_t kElements = 2048;
  static constexpr int64_t kElementsPerThread = 8192;  // about what waking a thread costs
  int64_t size_, elements_, per_sample_, count_;
};

// Float buffers of a tile's size, for one thread.
template <int n> class Buffers {
 public:
  explicit Buffers(const Tiles& tiles) : stride_((tiles.elements() + 15) / 16 * 16), data_(new float[n * stride_]) {}
  float* operator[](int i) { return data_.get() + i * stride_; }

 private:
  int64_t stride_;
  std::unique_ptr<float[]> data_;
};

}  // namespace ddpm_fast
