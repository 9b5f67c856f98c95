// 3x3 convolution, stride 1, padding 1, channels_last, by Winograd's minimal filtering F(m x m, 3 x 3).
//
// The image is cut into tiles of m x m outputs. A tile's (m + 2)^2 inputs are transformed, channel by channel; the
// transforms, one of (m + 2)^2 planes each, are multiplied with the transformed weights, a matrix product a plane; and
// the products are transformed back. An output's sum is taken over the channels in one order whatever the batch, the
// threads or the instruction set, so its bits depend on none of them.
//
// An image doubled first by repeating its pixels is never built: a tile is then one pixel, to 2 x 2 outputs.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor_inl.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>

#include "kernels.h"
#include "scratch.h"

namespace ddpm_fast {
namespace {

using torch::headeronly::ScalarType;

constexpr int kPanel = 32;                // output channels that the weights hold side by side
constexpr int64_t kPieceChannels = 128;  // transformed at once; a plane's are 16 KiB, which the first-level cache keeps
constexpr int64_t kCacheElements = (int64_t{1} << 20) / 4;  // of the second-level cache, for the tiles in work
constexpr int64_t kLine = 16;             // floats; added to a plane's stride, lest the planes meet in one cache set

constexpr int kUpsampling = 1;  // in the place of m
constexpr int outputs_of(int m) { return m == kUpsampling ? 2 : m; }

struct Conv {
  int64_t samples, channels, outputs, height, width, out_height, out_width;
  int64_t tiles_x, tiles_per_sample, tiles;
  int64_t block;  // channels whose products are summed from zero
  const float* x;
  const float* bias;      // null, or one for each output channel
  const float* residual;  // null, or laid out like out
  const float* zeros;     // as many as there are channels: what lies outside the image
  float* out;
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
}  // namespace ddpm_fast

#define DDPM_FAST_KERNELS "conv_kernels.h"
#include "for_each_isa.h"

namespace ddpm_fast {
namespace {

// How the weights lie: panels [channel][9][32] of 32 output channels, the last one of 16 where that is enough; channels
// up to a multiple of four, zeros filling them up.
struct Panels {
  Panels(int64_t channels_, int64_t outputs) : channels(round_up(channels_, 4)), count(ceil_div(outputs, kPanel)) {
    const int64_t rest = outputs - (count - 1) * kPanel;
    last = rest <= kPanel / 2 ? kPanel / 2 : kPanel;
  }
  int width(int64_t panel) const { return static_cast<int>(panel + 1 < count ? kPanel : last); }
  int64_t size() const { return 9 * channels * ((count - 1) * kPanel + last); }
  int64_t channels, count, last;
};

// Memory that the next transforms read and write: `count` rows of `size` floats.
struct Ahead {
  const float* first;
  int64_t count, size, stride;
  static Ahead dense(const float* first, int64_t size) { return {first, ceil_div(size, kLine), kLine, kLine}; }
};

// The transforms take as long as memory does, the multiplications between them need none: it works ahead meanwhile, a
// step of `steps` at a time, since it can be asked for a few dozen lines at once.
void prefetch(const Ahead& ahead, int64_t step, int64_t steps) {
  for (int64_t row = step * ahead.count / steps; row < (step + 1) * ahead.count / steps; ++row)
    for (int64_t i = 0; i < ahead.size; i += kLine) __builtin_prefetch(ahead.first + row * ahead.stride + i, 0, 2);
}

thread_local Scratch transformed_scratch, product_scratch, weight_scratch;

template <int my, int mx> class Runner {
 public:
  Runner(const Conv& conv, const float* weight)
      : conv_(conv), weight_(weight), panels_(conv.channels, conv.outputs) {}

  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t tiles = conv_.tiles;
    // As many tiles at once as leave their transforms in the cache, but enough of them to pay for transforming the
    // weights, which is done for each block of tiles again.
    const int64_t fitting = kCacheElements / (kPlanes * (chunks() * kLine + kPanel));
    const int64_t most = std::max(fitting, kLeastTiles);
    const bool alone = threads == 1 || tiles * conv_.channels * conv_.outputs < kSmallWork;
    if (!alone && tiles <= most && panels_.count >= threads) return run_shared();
    int64_t blocks = ceil_div(tiles, most);
    if (!alone) blocks = std::min(round_up(blocks, threads), tiles);
    torch::stable::parallel_for(0, blocks, alone ? blocks : 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t last = (i + 1) * tiles / blocks;
        run_block(i * tiles / blocks, last, i + 1 < end ? (i + 2) * tiles / blocks : last);
      }
    });
  }

 private:
  static constexpr int64_t kPlanes = (my + 2) * (mx + 2);
  static constexpr int64_t kLeastTiles = 64;
  static constexpr int64_t kSmallWork = 1 << 17;  // multiplications a plane that are not worth waking a thread

  int64_t chunks() const { return ceil_div(conv_.channels, kLine); }
  int64_t plane(int64_t tiles) const { return chunks() * kLine * tiles + kLine; }

  // The pixel of the input that begins a tile's row; the tiles of a block are rows of pixels one after the other.
  int64_t pixel(int64_t tile) const {
    const int64_t sample = tile / conv_.tiles_per_sample;
    const int64_t y = tile % conv_.tiles_per_sample / conv_.tiles_x * my;
    return (sample * conv_.height + y) * conv_.width;
  }

  // A block of tiles by one thread; its next one ends with tile `next`.
  void run_block(int64_t first, int64_t last, int64_t next) const {
    const int64_t tiles = last - first;
    float* const v = transformed_scratch.get(kPlanes * plane(tiles));
    DDPM_FAST_DISPATCH(transform_input<my, mx>)(conv_, first, 0, tiles, v, tiles, plane(tiles));
    const int64_t begin = pixel(last), end = std::max(pixel(next), begin);
    run_panels(v, first, tiles, 0, panels_.count,
               Ahead::dense(conv_.x + begin * conv_.channels, (end - begin) * conv_.channels));
  }

  // All tiles by all threads, first over the tiles, then over the output channels.
  void run_shared() const {
    const int64_t tiles = conv_.tiles;
    float* const v = transformed_scratch.get(kPlanes * plane(tiles));
    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      DDPM_FAST_DISPATCH(transform_input<my, mx>)(conv_, 0, begin, end, v, tiles, plane(tiles));
    });
    torch::stable::parallel_for(0, panels_.count, 1,
                                [&](int64_t begin, int64_t end) { run_panels(v, 0, tiles, begin, end, {}); });
  }

  Ahead output(const float* image, int64_t first, int64_t tiles, int64_t panel) const {
    constexpr int64_t scale = my == kUpsampling ? 4 : 1;  // pixels of the output for each of the input
    const int64_t begin = scale * pixel(first), channel = panel * kPanel;
    return {image + begin * conv_.outputs + channel, scale * pixel(first + tiles) - begin,
            std::min<int64_t>(kPanel, conv_.outputs - channel), conv_.outputs};
  }

  // Transformed weights are four times as large as the weights, and reading them from afar took longer than
  // transforming them again, piece by piece, in the cache.
  void run_panels(const float* v, int64_t first, int64_t tiles, int64_t begin, int64_t end,
                  const Ahead& next_input) const {
    const int64_t product_plane = tiles * kPanel + kLine, weight_plane = kPieceChannels * kPanel + kLine;
    float* const products = product_scratch.get(kPlanes * product_plane);
    float* const u = weight_scratch.get(kPlanes * weight_plane);
    const int64_t steps = (end - begin) * ceil_div(panels_.channels, kPieceChannels) * kPlanes;
    int64_t step = 0;
    for (int64_t panel = begin; panel < end; ++panel) {
      const int width = panels_.width(panel);
      const float* const weight = weight_ + panel * 9 * kPanel * panels_.channels;
      const Ahead out = output(conv_.out, first, tiles, panel);
      const Ahead residual = conv_.residual ? output(conv_.residual, first, tiles, panel) : Ahead{};
      for (int64_t c = 0; c < panels_.channels; c += kPieceChannels) {
        const int64_t count = std::min(kPieceChannels, panels_.channels - c), size = count * 9 * width;
        const float* const piece = weight + c * 9 * width;
        const Ahead next_weights = Ahead::dense(piece + size, std::min(size, weight_ + panels_.size() - piece - size));
        DDPM_FAST_DISPATCH(transform_weight<my, mx>)(piece, count, width, u, weight_plane);
        for (int64_t p = 0; p < kPlanes; ++p, ++step) {
          prefetch(next_weights, p, kPlanes);
          prefetch(next_input, step, steps);
          if (c + count == panels_.channels) {
            prefetch(out, p, kPlanes);
            prefetch(residual, p, kPlanes);
          }
          DDPM_FAST_DISPATCH(multiply_plane)
          (width, v + p * plane(tiles) + c * tiles, tiles, u + p * weight_plane, count, conv_.block,
           products + p * product_plane, c > 0);
        }
      }
      DDPM_FAST_DISPATCH(transform_output<my, mx>)
      (conv_, first, tiles, products, width, product_plane, panel * kPanel);
    }
  }

  const Conv& conv_;
  const float* const weight_;
  const Panels panels_;
};

template <int my, int mx> void run(Conv& conv, const float* weight) {
  conv.tiles_x = ceil_div(conv.width, mx);
  conv.tiles_per_sample = ceil_div(conv.height, my) * conv.tiles_x;
  conv.tiles = conv.samples * conv.tiles_per_sample;
  Runner<my, mx>(conv, weight).run();
}

void check_channels_last(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.scalar_type() == ScalarType::Float, name,
                  " must be a float32 tensor of 4 dimensions");
  int64_t expected = 1;
  for (const int64_t d : {1, 3, 2, 0}) {
    STD_TORCH_CHECK(tensor.size(d) == 1 || tensor.stride(d) == expected || tensor.numel() == 0, name,
                    " must be channels_last");
    expected *= tensor.size(d);
  }
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

}  // namespace

void conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual,
             std::optional<Tensor> prepared, bool upsample, int64_t tile_height, int64_t tile_width, int64_t block,
             Tensor out) {
  check_channels_last(x, "x");
  check_channels_last(out, "out");
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "weight must be (K, C, 3, 3)");
  STD_TORCH_CHECK(block > 0 && block % 16 == 0 && kPieceChannels % block == 0,
                  "block must be 16, 32, 64 or 128, not ", block);
  Conv conv{};
  conv.samples = x.size(0), conv.channels = x.size(1), conv.height = x.size(2), conv.width = x.size(3);
  conv.outputs = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == conv.channels, "x has ", conv.channels, " channels, weight takes ",
                  weight.size(1));
  conv.out_height = conv.height * (upsample ? 2 : 1), conv.out_width = conv.width * (upsample ? 2 : 1);
  STD_TORCH_CHECK(out.size(0) == conv.samples && out.size(1) == conv.outputs && out.size(2) == conv.out_height &&
                      out.size(3) == conv.out_width,
                  "out has the wrong shape");
  if (x.numel() == 0) return;
  const int64_t size = Panels(conv.channels, conv.outputs).size();
  STD_TORCH_CHECK(prepared && prepared->scalar_type() == ScalarType::Float && prepared->is_contiguous() &&
                      prepared->numel() == size,
                  "the cpu backend needs the weight prepared, a contiguous float32 tensor of ", size, " elements");
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->is_contiguous() &&
                        bias->numel() == conv.outputs,
                    "bias must be a contiguous float32 tensor of ", conv.outputs, " elements");
    conv.bias = floats(*bias);
  }
  if (residual) {
    check_channels_last(*residual, "residual");
    for (int64_t d = 0; d < 4; ++d)
      STD_TORCH_CHECK(residual->size(d) == out.size(d), "residual has another shape than out");
    conv.residual = floats(*residual);
  }
  conv.block = block;
  conv.x = floats(x);
  conv.out = static_cast<float*>(out.mutable_data_ptr());
  const std::unique_ptr<float[]> zeros(new float[round_up(conv.channels, kLine)]());
  conv.zeros = zeros.get();
  const float* const data = floats(*prepared);
  if (upsample) {
    STD_TORCH_CHECK(tile_height == 1 && tile_width == 1, "tiles are 1x1 before upsampling, not ", tile_height, "x",
                    tile_width);
    run<kUpsampling, kUpsampling>(conv, data);
  } else if (tile_height == 2 && tile_width == 2) run<2, 2>(conv, data);
  else if (tile_height == 4 && tile_width == 2) run<4, 2>(conv, data);
  else if (tile_height == 4 && tile_width == 4) run<4, 4>(conv, data);
  else STD_TORCH_CHECK(false, "tiles are 2x2, 4x2 or 4x4, not ", tile_height, "x", tile_width);
}

}  // namespace ddpm_fast
