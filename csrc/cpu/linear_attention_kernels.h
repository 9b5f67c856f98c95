namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// The products' tiles, all of it in registers. They change no bit: every sum runs over the same terms in one order.
#if defined(DDPM_FAST_ISA_AVX512)
constexpr int kTileRows = 8, kTileVectors = 2;
#elif defined(DDPM_FAST_ISA_AVX2)
constexpr int kTileRows = 6, kTileVectors = 1;
#else
constexpr int kTileRows = 4, kTileVectors = 1;
#endif

constexpr int64_t kBlock = LinearAttention::kBlock;
constexpr float kLowest = std::numeric_limits<float>::lowest();

// exp of x <= 0 within 1 unit in the last place, and 0 from -87.7 downwards: 2^n p(r) with the polynomial of exp_poly,
// where n + 127 comes out of a sum's low bits as the exponent of a float, which for n = -127 is that of 0.
DDPM_FAST_INLINE F exp_of_negative(F x) {
  constexpr float kRound = 12582912.0f + 127.0f;
  x = max(splat(-88.0f), x);  // a NaN stays one
  const F t = fma(x, splat(0x1.715476p+0f), splat(kRound));
  const F n = t - kRound;
  const F r = fma(n, splat(-0x1.7f7d1cp-20f), fma(n, splat(-0x1.62e4p-1f), x));
  F p = fma(splat(0x1.6a2430p-10f), r, splat(0x1.1239e4p-7f));
  p = fma(p, r, splat(0x1.5558f2p-5f));
  p = fma(p, r, splat(0x1.555492p-3f));
  p = fma(p, r, splat(0x1.fffffcp-2f));
  p = fma(p * r, r, r) + 1.0f;
  return p * from_bits(shift_left<23>(bits(t)));
}

DDPM_FAST_INLINE int lanes_from(int64_t channel, int64_t dim) {
  return static_cast<int>(std::min<int64_t>(dim - channel, kLanes));
}

// Copies channels, each a run of pixels at `stride`, to rows of pixels or back, sixteen pixels by four channels at a time.
template <bool kToRows, class Channels, class RowsOf>
static void transpose(Channels* channels, int64_t stride, RowsOf* rows, int64_t padded, int64_t pixels, int64_t dim) {
  const int64_t whole_pixels = pixels / kLanes * kLanes, whole_dim = dim / 4 * 4;
  for (int64_t d = 0; d < whole_dim; d += 4)
    for (int64_t p = 0; p < whole_pixels; p += kLanes) {
      auto* const channel = channels + d * stride + p;
      auto* const row = rows + p * padded + d;
      F v[4];
      for (int i = 0; i < 4; ++i) v[i] = kToRows ? load(channel + i * stride) : load_quarters(row + i * padded, 4 * padded);
      transpose4(v[0], v[1], v[2], v[3]);
      for (int i = 0; i < 4; ++i) {
        if constexpr (kToRows) store_quarters(row + i * padded, 4 * padded, v[i]);
        else store(channel + i * stride, v[i]);
      }
    }
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t p = d < whole_dim ? whole_pixels : 0; p < pixels; ++p) {
      if constexpr (kToRows) rows[p * padded + d] = channels[d * stride + p];
      else channels[d * stride + p] = rows[p * padded + d];
    }
}

// Rows of whole vectors: the tensor's own where it has them, else a copy that ends in `fill`.
static Rows rows_of(const float* x, int64_t channel_stride, int64_t pixel_stride, int64_t pixels, int64_t dim,
                    float fill, float* copy) {
  const int64_t padded = (dim + kLanes - 1) / kLanes * kLanes;
  if (channel_stride == 1 && dim == padded) return {x, pixel_stride};
  for (int64_t p = 0; p < pixels; ++p) std::fill(copy + p * padded + dim, copy + (p + 1) * padded, fill);
  if (channel_stride == 1) {
    for (int64_t p = 0; p < pixels; ++p) std::copy_n(x + p * pixel_stride, dim, copy + p * padded);
  } else if (pixel_stride == 1) {
    transpose<true>(x, channel_stride, copy, padded, pixels, dim);
  } else {
    for (int64_t d = 0; d < dim; ++d)
      for (int64_t p = 0; p < pixels; ++p) copy[p * padded + d] = x[d * channel_stride + p * pixel_stride];
  }
  return {copy, padded};
}

// The other way round, to channels of a dense image.
static void write_rows(const float* rows, int64_t padded, const Image& image, int64_t channels, int64_t pixels,
                       float* out) {
  if (image.channel_stride == 1) {
    for (int64_t p = 0; p < pixels; ++p) std::copy_n(rows + p * padded, channels, out + p * image.pixel_stride);
  } else {
    transpose<false>(out, image.channel_stride, rows, padded, pixels, channels);
  }
}

// context[d][e] = context[d][e] * shrink[d] + sum over the pixels of weight[p][d] * value[p][e]. The terms are summed
// kRun at a time from zero: long sums would round more than eager PyTorch's, where a head has few channels.
template <int rows, int vectors>
static void add_products(const float* weight, int64_t padded, Rows value, int64_t pixels, const float* shrink,
                         float* context, int64_t columns) {
  constexpr int64_t kRun = 32;
  const float* v = value.data;
  for (int64_t begin = 0; begin < pixels; begin += kRun) {
    F sum[rows][vectors];
    DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r)
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) sum[r][i] = splat(0.0f);
    for (int64_t p = std::min(kRun, pixels - begin); p > 0; --p, weight += padded, v += value.stride) {
      F vs[vectors];
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) vs[i] = load(v + i * kLanes);
      DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r) {
        const F w = splat(weight[r]);
        DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) sum[r][i] = fma(w, vs[i], sum[r][i]);
      }
    }
    DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r) {
      const F factor = splat(begin == 0 ? shrink[r] : 1.0f);
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) {
        float* const target = context + r * columns + i * kLanes;
        store(target, fma(load(target), factor, sum[r][i]));
      }
    }
  }
}

// out[p][e] = sum over the channels of weight[p][d] * context[d][e] / divisor[p]; the weights lie in chunks of sixteen
// channels, [d / 16][p][16].
template <int rows, int vectors>
static void multiply_context(const float* weight, const float* divisor, const float* context, int64_t padded,
                             int64_t dim, float* out, int64_t out_stride) {
  F sum[rows][vectors];
  DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r)
    DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) sum[r][i] = splat(0.0f);
  for (; dim > 0; dim -= kLanes, weight += kBlock * kLanes) {
    const int steps = static_cast<int>(std::min<int64_t>(dim, kLanes));
    for (int k = 0; k < steps; ++k, context += padded) {
      F cs[vectors];
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) cs[i] = load(context + i * kLanes);
      DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r) {
        const F w = splat(weight[r * kLanes + k]);
        DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) sum[r][i] = fma(w, cs[i], sum[r][i]);
      }
    }
  }
  DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r)
    DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i)
      store(out + r * out_stride + i * kLanes, sum[r][i] / splat(divisor[r]));
}

// product(rows, vectors, row, column) for tiles that cover so many rows and vectors, the rows split evenly; how large a
// tile is comes as a type.
template <int rows, int vectors, class Tile> DDPM_FAST_INLINE void with_rows(int64_t count, const Tile& tile) {
  if constexpr (rows > 1) {
    if (count < rows) return with_rows<rows - 1, vectors>(count, tile);
  }
  tile(std::integral_constant<int, rows>{}, std::integral_constant<int, vectors>{});
}
template <class Product> static void for_each_tile(int64_t rows, int64_t vectors, const Product& product) {
  const int64_t groups = (rows + kTileRows - 1) / kTileRows;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t row = g * rows / groups, count = (g + 1) * rows / groups - row;
    int64_t v = 0;
    for (; v + kTileVectors <= vectors; v += kTileVectors)
      with_rows<kTileRows, kTileVectors>(count, [&](auto r, auto n) { product(r, n, row, v * kLanes); });
    for (; v < vectors; ++v) with_rows<kTileRows, 1>(count, [&](auto r, auto n) { product(r, n, row, v * kLanes); });
  }
}

// Adds a block of pixels to a part: what was there shrinks where a key is larger than all before it. The values are rows
// of `columns`.
static void add_block(const LinearAttention& op, Rows key, Rows value, int64_t columns, int64_t pixels, float* weight,
                      Part part) {
  const int64_t padded = op.padded();
  float shrink[kMostChannels];
  for (int64_t c = 0; c < padded; c += kLanes) {
    const F before = load(part.largest + c);
    F largest = before;
    for (int64_t p = 0; p < pixels; ++p) largest = max(largest, load(key.data + p * key.stride + c));
    F sums[4] = {splat(0.0f), splat(0.0f), splat(0.0f), splat(0.0f)};  // short sums round less
    for (int64_t p = 0; p < pixels; ++p) {
      const F w = exp_of_negative(load(key.data + p * key.stride + c) - largest);
      store(weight + p * padded + c, w);
      sums[p % 4] = sums[p % 4] + w;
    }
    const F sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    const F factor = exp_of_negative(before - largest);
    store(shrink + c, factor);
    store(part.largest + c, largest);
    store(part.sum + c, fma(load(part.sum + c), factor, sum));
  }
  for_each_tile(op.dim, columns / kLanes, [&](auto rows, auto vectors, int64_t row, int64_t column) {
    add_products<rows(), vectors()>(weight + row, padded, {value.data + column, value.stride}, pixels, shrink + row,
                                    part.context + row * columns + column, columns);
  });
}

// Scratch memory of one thread, in elements.
static int64_t attention_scratch(const LinearAttention& op) { return 3 * kBlock * op.padded(); }

// Starts a part with nothing in it.
static void clear(Part part, int64_t padded, int64_t context) {
  std::fill_n(part.largest, padded, kLowest);
  std::fill_n(part.sum, padded, 0.0f);
  std::fill_n(part.context, context, 0.0f);
}

// Adds pixels, whose keys and values may lie in any order, to a part.
static void add_pixels(const LinearAttention& op, const float* key, const float* value, int64_t channel_stride,
                       int64_t pixel_stride, int64_t pixels, float* scratch, Part part) {
  const int64_t padded = op.padded();
  float *const weight = scratch, *const key_copy = weight + kBlock * padded, *const value_copy = key_copy + kBlock * padded;
  for (int64_t p = 0; p < pixels; p += kBlock) {
    const int64_t n = std::min(kBlock, pixels - p), at = p * pixel_stride;
    add_block(op, rows_of(key + at, channel_stride, pixel_stride, n, op.dim, 0.0f, key_copy),
              rows_of(value + at, channel_stride, pixel_stride, n, op.dim, 0.0f, value_copy), padded, n, weight, part);
  }
}

// The memory comes before the first chunk.
static void add_memory(const LinearAttention& op, int64_t head, int64_t chunk, float* scratch, Part part) {
  if (chunk != 0 || op.memory == nullptr) return;
  const float* const k = op.memory + head * op.dim * op.memories;
  add_pixels(op, k, k + op.heads * op.dim * op.memories, op.memories, 1, op.memories, scratch, part);
}

// The part of a chunk.
static void attention_part(const LinearAttention& op, const float* key, const float* value, int64_t head,
                           int64_t chunk, float* scratch, Part part) {
  clear(part, op.padded(), op.dim * op.padded());
  add_memory(op, head, chunk, scratch, part);
  const int64_t at = op.pixel(chunk) * op.qkv.pixel_stride;
  add_pixels(op, key + at, value + at, op.qkv.channel_stride, op.qkv.pixel_stride, op.pixels_of(chunk), scratch, part);
}

// Puts the parts of a head together in the first, divides by the sums and multiplies by the queries' scale.
static void attention_context(const LinearAttention& op, float* parts) {
  const int64_t padded = op.padded();
  const Part first(op, parts);
  for (int64_t i = 1; i < op.chunks(); ++i) {
    const Part next(op, parts + i * op.part_size());
    float shrink[2][kMostChannels];
    for (int64_t c = 0; c < padded; c += kLanes) {
      const F a = load(first.largest + c), b = load(next.largest + c), largest = max(a, b);
      const F of_first = exp_of_negative(a - largest), of_next = exp_of_negative(b - largest);
      store(shrink[0] + c, of_first);
      store(shrink[1] + c, of_next);
      store(first.largest + c, largest);
      store(first.sum + c, fma(load(first.sum + c), of_first, load(next.sum + c) * of_next));
    }
    for (int64_t d = 0; d < op.dim; ++d)
      for (int64_t at = d * padded; at < (d + 1) * padded; at += kLanes)
        store(first.context + at, fma(load(first.context + at), splat(shrink[0][d]),
                                      load(next.context + at) * splat(shrink[1][d])));
  }
  for (int64_t d = 0; d < op.dim; ++d)
    for (int64_t at = d * padded; at < (d + 1) * padded; at += kLanes)
      store(first.context + at, load(first.context + at) / splat(first.sum[d]) * op.scale);
}

// exp(x - the largest) of each of n channels, whole vectors, vector v to `to` + v * kLanes * step; and their sum.
DDPM_FAST_INLINE float exponentials(const float* row, int64_t n, float* to, int64_t step) {
  F largest = load(row);
  for (int64_t c = kLanes; c < n; c += kLanes) largest = max(largest, load(row + c));
  const F most = splat(max_of_lanes(largest));
  F sum = splat(0.0f);
  for (int64_t c = 0; c < n; c += kLanes) {
    const F w = exp_of_negative(load(row + c) - most);
    store(to + c * step, w);
    sum = sum + w;
  }
  return sum_of_lanes(sum);
}

// A chunk of the result: the queries' softmax over the channels, times the context.
static void attention_apply(const LinearAttention& op, const float* query, const float* context, int64_t chunk,
                            float* scratch, float* out) {
  const int64_t padded = op.padded(), dim = op.dim, last = op.pixel(chunk) + op.pixels_of(chunk);
  float *const weight = scratch, *const query_copy = weight + kBlock * padded, *const result = query_copy + kBlock * padded;
  const bool direct = op.out.channel_stride == 1 && dim == padded;
  for (int64_t begin = op.pixel(chunk); begin < last; begin += kBlock) {
    const int64_t pixels = std::min(kBlock, last - begin);
    const Rows q = rows_of(query + begin * op.qkv.pixel_stride, op.qkv.channel_stride, op.qkv.pixel_stride, pixels, dim,
                           kLowest, query_copy);
    float divisor[kBlock];
    for (int64_t p = 0; p < pixels; ++p)
      divisor[p] = exponentials(q.data + p * q.stride, padded, weight + p * kLanes, kBlock);
    float* const to = direct ? out + begin * op.out.pixel_stride : result;
    const int64_t stride = direct ? op.out.pixel_stride : padded;
    for_each_tile(pixels, padded / kLanes, [&](auto rows, auto vectors, int64_t row, int64_t column) {
      multiply_context<rows(), vectors()>(weight + row * kLanes, divisor + row, context + column, padded, dim,
                                          to + row * stride + column, stride);
    });
    if (direct) continue;
    write_rows(result, padded, op.out, dim, pixels, out + begin * op.out.pixel_stride);
  }
}

// From here on the projections are part of it. Of a head with keys K = X Wk', values V = X Wv' and the output's weight
// Wo, pixels in rows, the context times Wo is (softmax(K)' X) Wv' Wo': the values of pixels are never made.

// out = a b, or added to out; `depth` terms, summed kRun at a time from zero.
template <int rows, int vectors>
static void multiply(Rows a, Rows b, int64_t depth, bool add, float* out, int64_t out_stride) {
  constexpr int64_t kRun = 64;
  for (int64_t begin = 0; begin < depth; begin += kRun, add = true) {
    F sum[rows][vectors];
    DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r)
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) sum[r][i] = splat(0.0f);
    const int64_t end = std::min(begin + kRun, depth);
    for (int64_t k = begin; k < end; ++k) {
      F bs[vectors];
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) bs[i] = load(b.data + k * b.stride + i * kLanes);
      DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r) {
        const F as = splat(a.data[r * a.stride + k]);
        DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) sum[r][i] = fma(as, bs[i], sum[r][i]);
      }
    }
    DDPM_FAST_UNROLL for (int r = 0; r < rows; ++r)
      DDPM_FAST_UNROLL for (int i = 0; i < vectors; ++i) {
        float* const target = out + r * out_stride + i * kLanes;
        store(target, add ? load(target) + sum[r][i] : sum[r][i]);
      }
  }
}
static void multiply_matrices(Rows a, int64_t height, Rows b, int64_t depth, int64_t columns, bool add, float* out) {
  for_each_tile(height, columns / kLanes, [&](auto rows, auto vectors, int64_t row, int64_t column) {
    multiply<rows(), vectors()>({a.data + row * a.stride, a.stride}, {b.data + column, b.stride}, depth, add,
                                out + row * columns + column, columns);
  });
}

// A matrix (rows, channels) with its rows `stride` apart to (channels, columns), filled up with zeros.
static void transpose_matrix(const float* matrix, int64_t stride, int64_t rows, int64_t channels, int64_t columns,
                             float* out) {
  if (columns > rows) std::fill_n(out, channels * columns, 0.0f);
  transpose<true>(matrix, stride, out, columns, channels, rows);
}

// Scratch memory of one thread, in elements.
static int64_t projected_scratch(const LinearAttention& op, const Projections& with) {
  return 3 * kBlock * op.dim + (op.dim + kBlock) * std::max(with.columns(), with.out_columns());
}

// The part of a chunk of a sample's pixels x.
static void projected_part(const LinearAttention& op, const Projections& with, Rows x, int64_t head, int64_t chunk,
                           float* scratch, Part part) {
  const int64_t dim = op.dim, columns = with.columns(), last = op.pixel(chunk) + op.pixels_of(chunk);
  clear(part, dim, dim * dim);
  add_memory(op, head, chunk, scratch, part);
  float *const key = scratch, *const weight = key + kBlock * dim;
  Part wide = part;  // its context is one of x, not of values
  wide.context = weight + kBlock * dim;
  std::fill_n(wide.context, dim * columns, 0.0f);
  float before[kMostChannels];
  std::copy_n(part.largest, dim, before);
  for (int64_t begin = op.pixel(chunk); begin < last; begin += kBlock) {
    const int64_t pixels = std::min(kBlock, last - begin);
    const Rows rows{x.data + begin * x.stride, x.stride};
    multiply_matrices(rows, pixels, {with.keys + head * with.channels * dim, dim}, with.channels, dim, false, key);
    add_block(op, {key, dim}, rows, columns, pixels, weight, wide);
  }
  for (int64_t c = 0; c < dim; c += kLanes)
    store(before + c, exp_of_negative(load(before + c) - load(part.largest + c)));
  for (int64_t d = 0; d < dim; ++d)
    for (int64_t at = d * dim; at < (d + 1) * dim; at += kLanes)
      store(part.context + at, load(part.context + at) * before[d]);
  multiply_matrices({wide.context, columns}, dim, {with.values + head * with.channels * dim, dim}, with.channels, dim,
                    true, part.context);
}

// Puts the parts of a head together, (dim, out_columns) with the output's weight.
static void projected_context(const LinearAttention& op, const Projections& with, float* parts, int64_t head,
                              float* context) {
  attention_context(op, parts);
  multiply_matrices({Part(op, parts).context, op.dim}, op.dim,
                    {with.out + head * op.dim * with.out_columns(), with.out_columns()}, op.dim, with.out_columns(),
                    false, context);
}

// Pixels begin .. end of the result, at most a block of them: every head's queries' softmax over the channels, times its
// context and the output's weight, which are `contexts`, (heads, dim, out_columns).
static void projected_apply(const LinearAttention& op, const Projections& with, Rows x, const float* contexts,
                            int64_t begin, int64_t end, float* scratch, float* out) {
  const int64_t dim = op.dim, out_columns = with.out_columns(), pixels = end - begin;
  float *const query = scratch, *const result = query + kBlock * dim;
  for (int64_t head = 0; head < op.heads; ++head) {
    multiply_matrices({x.data + begin * x.stride, x.stride}, pixels,
                      {with.queries + head * with.channels * dim, dim}, with.channels, dim, false, query);
    for (int64_t p = 0; p < pixels; ++p) {
      float* const row = query + p * dim;
      const F share = splat(1.0f / exponentials(row, dim, row, 1));
      for (int64_t c = 0; c < dim; c += kLanes) store(row + c, load(row + c) * share);
    }
    multiply_matrices({query, dim}, pixels, {contexts + head * dim * out_columns, out_columns}, dim, out_columns,
                      head > 0, result);
  }
  if (with.bias != nullptr)
    for (int64_t c = 0; c < out_columns; c += kLanes) {
      const F bias = load_lanes(with.bias + c, lanes_from(c, with.outputs));
      for (float* row = result + c; row < result + pixels * out_columns; row += out_columns) store(row, load(row) + bias);
    }
  write_rows(result, out_columns, op.out, with.outputs, pixels, out + begin * op.out.pixel_stride);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
