namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// The matrix kernel's tile: kRows pixels' tiles by kVectors vectors of output channels, all of it in registers; with
// kTotalRows, there is room for a total besides (0: there is none).
#if defined(DDPM_FAST_ISA_AVX512)
constexpr int kRows = 14, kTotalRows = 7, kVectors = 2;
#elif defined(DDPM_FAST_ISA_AVX2)
constexpr int kRows = 6, kTotalRows = 0, kVectors = 1;
#else
constexpr int kRows = 4, kTotalRows = 0, kVectors = 1;
#endif

template <bool whole> DDPM_FAST_INLINE F load_vector(const float* p, int n) {
  if constexpr (whole) return load(p);
  else return load_lanes(p, n);
}
template <bool whole> DDPM_FAST_INLINE void store_vector(float* p, F x, int n) {
  if constexpr (whole) store(p, x);
  else store_lanes(p, x, n);
}

// The one-dimensional transforms of F(m, 3), m + 2 inputs to m outputs (Winograd 1980; Lavin and Gray 2016). A tile's
// transform is one along its height and one along its width, not always of the same m.
template <int m> struct Winograd;

// The image doubled by repeating each pixel, then convolved: one input pixel between its neighbours to two outputs,
// the weights that meet the same pixel summed: y0 = s x + w0 (x- - x) and y1 = s x - w2 (x - x+), s = w0 + w1 + w2.
template <> struct Winograd<kUpsampling> {
  DDPM_FAST_INLINE void input(const F* d, F* v) {
    v[0] = d[0] - d[1];
    v[1] = d[1];
    v[2] = d[1] - d[2];
  }
  DDPM_FAST_INLINE void weight(const F* g, F* u) {
    u[0] = g[0];
    u[1] = (g[0] + g[2]) + g[1];
    u[2] = g[2];
  }
  DDPM_FAST_INLINE void output(const F* m, F* y) {
    y[0] = m[1] + m[0];
    y[1] = m[1] - m[2];
  }
};

// Points 0, 1, -1, infinity.
template <> struct Winograd<2> {
  DDPM_FAST_INLINE void input(const F* d, F* v) {
    v[0] = d[0] - d[2];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[1] - d[3];
  }
  DDPM_FAST_INLINE void weight(const F* g, F* u) {
    const F half = splat(0.5f), even = g[0] + g[2];
    u[0] = g[0];
    u[1] = half * (even + g[1]);
    u[2] = half * (even - g[1]);
    u[3] = g[2];
  }
  DDPM_FAST_INLINE void output(const F* m, F* y) {
    y[0] = (m[0] + m[1]) + m[2];
    y[1] = (m[1] - m[2]) - m[3];
  }
};

// Points 0, +-a, +-b, infinity with a = 1/sqrt(2) and b = sqrt(2). Their squares are exact, their product is 1, and
// rounding errors grow half as much as with 0, +-1, +-2. The factors 1 / prod (p - q) are in the output transform,
// where they cost nothing: the weights are then transformed with two roundings a dimension.
template <> struct Winograd<4> {
  static constexpr double kA = 0.70710678118654752440, kB = 1.41421356237309504880;
  static constexpr float a = static_cast<float>(kA), b = static_cast<float>(kB);

  DDPM_FAST_INLINE void input(const F* d, F* v) {
    const F even_a = fma(splat(-2.0f), d[2], d[4]), odd_a = fma(splat(-2.0f), d[1], d[3]);
    const F even_b = fma(splat(-0.5f), d[2], d[4]), odd_b = fma(splat(-0.5f), d[1], d[3]);
    v[0] = fma(splat(-2.5f), d[2], d[0] + d[4]);
    v[1] = fma(splat(a), odd_a, even_a);
    v[2] = fma(splat(-a), odd_a, even_a);
    v[3] = fma(splat(b), odd_b, even_b);
    v[4] = fma(splat(-b), odd_b, even_b);
    v[5] = fma(splat(-2.5f), d[3], d[1] + d[5]);
  }
  DDPM_FAST_INLINE void weight(const F* g, F* u) {
    const F even_a = fma(splat(0.5f), g[2], g[0]), even_b = fma(splat(2.0f), g[2], g[0]);
    u[0] = g[0];
    u[1] = fma(splat(a), g[1], even_a);
    u[2] = fma(splat(-a), g[1], even_a);
    u[3] = fma(splat(b), g[1], even_b);
    u[4] = fma(splat(-b), g[1], even_b);
    u[5] = g[2];
  }
  DDPM_FAST_INLINE void output(const F* m, F* y) {
    constexpr double ca = -2.0 / 3, cb = 1.0 / 6;
    const F even_a = m[1] + m[2], odd_a = m[1] - m[2], even_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = fma(splat(static_cast<float>(cb)), even_b, fma(splat(static_cast<float>(ca)), even_a, m[0]));
    y[1] = fma(splat(static_cast<float>(kB * cb)), odd_b, splat(static_cast<float>(kA * ca)) * odd_a);
    y[2] = splat(static_cast<float>(2 * cb)) * (even_b - even_a);  // b^2 cb = 1/3 = -a^2 ca
    y[3] = fma(splat(static_cast<float>(2 * kB * cb)), odd_b,
               fma(splat(static_cast<float>(0.5 * kA * ca)), odd_a, m[5]));
  }
};

// One tile of sixteen channels, source[i * tx + j] being where row i, column j of the image begins.
template <int my, int mx, bool whole>
DDPM_FAST_INLINE void input_tile(const float* const* source, int64_t channel, int lanes, float* v, int64_t plane) {
  constexpr int ty = my + 2, tx = mx + 2;
  F rows[ty][tx];
  DDPM_FAST_UNROLL for (int j = 0; j < tx; ++j) {
    F d[ty], r[ty];
    DDPM_FAST_UNROLL for (int i = 0; i < ty; ++i) d[i] = load_vector<whole>(source[i * tx + j] + channel, lanes);
    Winograd<my>::input(d, r);
    DDPM_FAST_UNROLL for (int i = 0; i < ty; ++i) rows[i][j] = r[i];
  }
  DDPM_FAST_UNROLL for (int i = 0; i < ty; ++i) {
    F r[tx];
    Winograd<mx>::input(rows[i], r);
    DDPM_FAST_UNROLL for (int j = 0; j < tx; ++j) store(v + (i * tx + j) * plane, r[j]);
  }
}

// Transforms the tiles begin .. end of a block of `tiles` that starts with tile `first`. v holds, plane by plane,
// chunks of sixteen channels of all the tiles: the matrix kernel then walks along with one pointer, fixed distances.
template <int my, int mx>
static void transform_input(const Conv& conv, int64_t first, int64_t begin, int64_t end, float* v, int64_t tiles,
                            int64_t plane) {
  constexpr int ty = my + 2, tx = mx + 2;
  const int64_t whole_channels = conv.channels / kLanes * kLanes;
  const int rest = static_cast<int>(conv.channels - whole_channels);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t tile = first + row, sample = tile / conv.tiles_per_sample;
    const int64_t in_sample = tile % conv.tiles_per_sample;
    const int64_t y0 = in_sample / conv.tiles_x * my - 1, x0 = in_sample % conv.tiles_x * mx - 1;
    const float* source[ty * tx];
    for (int i = 0; i < ty; ++i)
      for (int j = 0; j < tx; ++j) {
        const int64_t y = y0 + i, x = x0 + j;
        const bool inside = 0 <= y && y < conv.height && 0 <= x && x < conv.width;
        source[i * tx + j] =
            inside ? conv.x + ((sample * conv.height + y) * conv.width + x) * conv.channels : conv.zeros;
      }
    float* target = v + row * kLanes;
    for (int64_t c = 0; c < whole_channels; c += kLanes, target += tiles * kLanes)
      input_tile<my, mx, true>(source, c, kLanes, target, plane);
    if (rest) input_tile<my, mx, false>(source, whole_channels, rest, target, plane);
  }
}

// m[rows][width] (+)= a * b, the products summed in blocks of `block` channels, each block from zero. Where registers
// hold the blocks' total as well, memory sees it once.
template <int rows, int vectors, int width, bool in_registers>
static void multiply(const float* a, int64_t chunk, const float* b, int64_t channels, int64_t block, float* m,
                     bool add) {
  F total[rows][vectors];
  if constexpr (in_registers) {
    DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r)
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i)
        total[r][i] = add ? load(m + r * width + i * kLanes) : splat(0.0f);
  }
  while (channels > 0) {
    int64_t left = std::min(block, channels);
    channels -= left;
    F sum[rows][vectors];
    DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r)
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) sum[r][i] = splat(0.0f);
    for (; left > 0; left -= kLanes, a += chunk) {
      const int steps = static_cast<int>(std::min<int64_t>(left, kLanes));
      for (int k = 0; k < steps; k += 4) {
        DDPM_FAST_UNROLL for (int kk = 0; kk < 4; ++kk) {
          F bs[vectors];
          DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) bs[i] = load(b + kk * width + i * kLanes);
          DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r) {
            const F as = splat(a[r * kLanes + k + kk]);
            DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) sum[r][i] = fma(as, bs[i], sum[r][i]);
          }
        }
        b += 4 * width;
      }
    }
    DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r)
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) {
        float* target = m + r * width + i * kLanes;
        if constexpr (in_registers) total[r][i] = total[r][i] + sum[r][i];
        else store(target, add ? load(target) + sum[r][i] : sum[r][i]);
      }
    add = true;
  }
  if constexpr (in_registers) {
    DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r)
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) store(m + r * width + i * kLanes, total[r][i]);
  }
}

template <int rows, int vectors, int width, bool in_registers>
DDPM_FAST_INLINE void multiply_rows(int count, const float* a, int64_t chunk, const float* b, int64_t channels,
                                    int64_t block, float* m, bool add) {
  if constexpr (rows > 1) {
    if (count < rows)
      return multiply_rows<rows - 1, vectors, width, in_registers>(count, a, chunk, b, channels, block, m, add);
  }
  multiply<rows, vectors, width, in_registers>(a, chunk, b, channels, block, m, add);
}

// The product of one plane and one panel of output channels. The tiles are split evenly, so that no call has only a
// few rows.
template <int most_rows, int width, bool in_registers>
static void multiply_panel(const float* a, int64_t tiles, const float* b, int64_t channels, int64_t block, float* m,
                           bool add) {
  constexpr int vectors = std::min(kVectors, width / kLanes);
  const int64_t groups = (tiles + most_rows - 1) / most_rows;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t row = g * tiles / groups, next = (g + 1) * tiles / groups;
    for (int part = 0; part < width; part += vectors * kLanes)
      multiply_rows<most_rows, vectors, width, in_registers>(static_cast<int>(next - row), a + row * kLanes,
                                                             tiles * kLanes, b + part, channels, block,
                                                             m + row * width + part, add);
  }
}

template <int width>
static void multiply_width(const float* a, int64_t tiles, const float* b, int64_t channels, int64_t block, float* m,
                           bool add) {
  if constexpr (kTotalRows > 0) {
    if (channels > block)
      return multiply_panel<kTotalRows, width, true>(a, tiles, b, channels, block, m, add);
  }
  multiply_panel<kRows, width, false>(a, tiles, b, channels, block, m, add);
}

static void multiply_plane(int width, const float* a, int64_t tiles, const float* b, int64_t channels, int64_t block,
                           float* m, bool add) {
  if (width == 32) multiply_width<32>(a, tiles, b, channels, block, m, add);
  else multiply_width<16>(a, tiles, b, channels, block, m, add);
}

// `channels` of the weights of one panel, w[channel][9][width], into planes u[plane][channel][width].
template <int my, int mx>
static void transform_weight(const float* w, int64_t channels, int width, float* u, int64_t plane) {
  constexpr int ty = my + 2, tx = mx + 2;
  for (int64_t c = 0; c < channels; ++c)
    for (int part = 0; part < width; part += kLanes) {
      const float* g = w + c * 9 * width + part;
      float* target = u + c * width + part;
      F rows[ty][3];
      DDPM_FAST_UNROLL for (int j = 0; j < 3; ++j) {
        F column[3], r[ty];
        DDPM_FAST_UNROLL for (int i = 0; i < 3; ++i) column[i] = load(g + (i * 3 + j) * width);
        Winograd<my>::weight(column, r);
        DDPM_FAST_UNROLL for (int i = 0; i < ty; ++i) rows[i][j] = r[i];
      }
      DDPM_FAST_UNROLL for (int i = 0; i < ty; ++i) {
        F r[tx];
        Winograd<mx>::weight(rows[i], r);
        DDPM_FAST_UNROLL for (int j = 0; j < tx; ++j) store(target + (i * tx + j) * plane, r[j]);
      }
    }
}

// One tile of sixteen output channels; `whole` tiles lie inside the image and have all their lanes.
template <int my, int mx, bool whole>
DDPM_FAST_INLINE void output_tile(const Conv& conv, const float* product, int64_t plane, F bias, int64_t offset,
                                  int rows, int columns, int lanes) {
  constexpr int ty = my + 2, tx = mx + 2, oy = outputs_of(my), ox = outputs_of(mx);
  F half[oy][tx];
  DDPM_FAST_UNROLL for (int j = 0; j < tx; ++j) {
    F d[ty], r[oy];
    DDPM_FAST_UNROLL for (int i = 0; i < ty; ++i) d[i] = load(product + (i * tx + j) * plane);
    Winograd<my>::output(d, r);
    DDPM_FAST_UNROLL for (int i = 0; i < oy; ++i) half[i][j] = r[i];
  }
  DDPM_FAST_UNROLL for (int i = 0; i < oy; ++i) {
    if (!whole && i >= rows) break;
    F y[ox];
    Winograd<mx>::output(half[i], y);
    const int64_t row = offset + i * conv.out_width * conv.outputs;
    DDPM_FAST_UNROLL for (int j = 0; j < ox; ++j) {
      if (!whole && j >= columns) break;
      F value = y[j] + bias;
      const int64_t at = row + j * conv.outputs;
      if (conv.residual) value = load_vector<whole>(conv.residual + at, lanes) + value;
      store_vector<whole>(conv.out + at, value, lanes);
    }
  }
}

// The outputs `channel` .. `channel + width` of a block of tiles that starts with tile `first`.
template <int my, int mx>
static void transform_output(const Conv& conv, int64_t first, int64_t tiles, const float* product, int width,
                             int64_t plane, int64_t channel) {
  constexpr int oy = outputs_of(my), ox = outputs_of(mx);
  for (int64_t row = 0; row < tiles; ++row) {
    const int64_t tile = first + row, sample = tile / conv.tiles_per_sample;
    const int64_t in_sample = tile % conv.tiles_per_sample;
    const int64_t y0 = in_sample / conv.tiles_x * oy, x0 = in_sample % conv.tiles_x * ox;
    const int rows = static_cast<int>(std::min<int64_t>(oy, conv.out_height - y0));
    const int columns = static_cast<int>(std::min<int64_t>(ox, conv.out_width - x0));
    const int64_t pixel = ((sample * conv.out_height + y0) * conv.out_width + x0) * conv.outputs;
    for (int part = 0; part < width && channel + part < conv.outputs; part += kLanes) {
      const int64_t k = channel + part;
      const int lanes = static_cast<int>(std::min<int64_t>(kLanes, conv.outputs - k));
      const F bias = conv.bias ? load_vector<false>(conv.bias + k, lanes) : splat(0.0f);
      const float* source = product + row * width + part;
      if (rows == oy && columns == ox && lanes == kLanes)
        output_tile<my, mx, true>(conv, source, plane, bias, pixel + k, oy, ox, kLanes);
      else
        output_tile<my, mx, false>(conv, source, plane, bias, pixel + k, rows, columns, lanes);
    }
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
