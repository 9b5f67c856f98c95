#include "silu.h"

namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// The vector that ends a run of n elements, n no multiple of sixteen: the run's last sixteen elements, of which
// `keep` has the lanes that no vector before it has; or all n where they are fewer.
struct Tail {
  int64_t at;
  int lanes;
  U keep;
};

DDPM_FAST_INLINE Tail tail_of(int64_t n) {
  static constexpr uint32_t kOn = 0xffffffffu;
  alignas(64) static constexpr uint32_t kWindow[48] = {
      0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,
      kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn, kOn,
      0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0,   0};
  const int rest = static_cast<int>(n % kLanes);
  if (n < kLanes) return {0, rest, load(kWindow + 32 - rest)};
  return {n - kLanes, kLanes, load(kWindow + rest)};
}
template <class T> DDPM_FAST_INLINE F load(const T* run, const Tail& tail) {
  return tail.lanes == kLanes ? load(run + tail.at) : load_lanes(run, tail.lanes);
}
// Stores what arithmetic on T and on plain NaNs gave: no NaN here has bits that rounding could carry over.
template <class T> DDPM_FAST_INLINE void put(T* out, F value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    const U b = bits(value);
    store_high_halves(out, b + splat(0x7fffu) + (shift_right<16>(b) & splat(1u)));
  } else {
    store(out, value);
  }
}
template <class T> DDPM_FAST_INLINE void put(T* run, F value, const Tail& tail) {
  if (tail.lanes == kLanes)
    put(run + tail.at, value);
  else
    store_lanes(run, value, tail.lanes);
}
DDPM_FAST_INLINE F kept(F value, const Tail& tail) { return from_bits(bits(value) & tail.keep); }

DDPM_FAST_INLINE double exact_sum_of_lanes(F a) {
  float lane[kLanes];
  store(lane, a);
  double sum[4];
  for (int i = 0; i < 4; ++i)
    sum[i] = (static_cast<double>(lane[i]) + lane[i + 4]) + (static_cast<double>(lane[i + 8]) + lane[i + 12]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// ---- Channels first: a group is `channels` runs of memory, one after the other ----

template <bool kEmbedding> DDPM_FAST_INLINE F value(F x, F embedding) {
  if constexpr (kEmbedding) return x + embedding;
  return x;
}

// The sum of a run, in four interleaved parts.
template <class T, bool kEmbedding> static void sum_run(F sum[4], const T* run, int64_t n, F embedding) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) sum[k] = sum[k] + value<kEmbedding>(load(run + i + k * kLanes), embedding);
  for (; i + kLanes <= n; i += kLanes) sum[0] = sum[0] + value<kEmbedding>(load(run + i), embedding);
  if (i == n) return;
  const Tail tail = tail_of(n);
  sum[1] = sum[1] + kept(value<kEmbedding>(load(run, tail), embedding), tail);
}

// The sums of a run's differences to `center`, and of their squares, in two interleaved parts.
template <class T, bool kEmbedding>
static void square_run(F first[2], F square[2], const T* run, int64_t n, F embedding, F center) {
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int k = 0; k < 2; ++k) {
      const F d = value<kEmbedding>(load(run + i + k * kLanes), embedding) - center;
      first[k] = first[k] + d;
      square[k] = fma(d, d, square[k]);
    }
  for (; i < n; i += kLanes) {
    F d;
    if (i + kLanes <= n) {
      d = value<kEmbedding>(load(run + i), embedding) - center;
    } else {
      const Tail tail = tail_of(n);
      d = kept(value<kEmbedding>(load(run, tail), embedding) - center, tail);
    }
    first[0] = first[0] + d;
    square[0] = fma(d, d, square[0]);
  }
}

// One pass, about the mean of the piece's first eighth. If that is m of n values, n times its squared distance to the
// mean of all is at most n / m times the sum of squared deviations, whatever the values: no digit that counts can
// cancel.
template <class T, bool kEmbedding>
static Moments piece_moments(const T* x, const float* embedding, int64_t channels, int64_t pixels, int64_t stride) {
  const int64_t some = std::max<int64_t>(channels / 8, 1);
  const int64_t of_each = channels > 1 ? pixels : std::min((pixels / 8 / 64 + 1) * 64, pixels);
  const F zero = splat(0.0f);
  F sum[4] = {zero, zero, zero, zero};
  for (int64_t c = 0; c < some; ++c)
    sum_run<T, kEmbedding>(sum, x + c * stride, of_each, kEmbedding ? splat(embedding[c]) : zero);
  const float about = sum_of_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<float>(some * of_each);
  F first[2] = {zero, zero}, square[2] = {zero, zero};
  for (int64_t c = 0; c < channels; ++c)
    square_run<T, kEmbedding>(first, square, x + c * stride, pixels, kEmbedding ? splat(embedding[c]) : zero,
                              splat(about));
  return moments_about(about, exact_sum_of_lanes(first[0] + first[1]), exact_sum_of_lanes(square[0] + square[1]),
                       static_cast<double>(channels * pixels));
}

// The unit that `activate` takes z in.
template <bool kActivation> constexpr double kUnitOfZ = kActivation ? kSiluUnit : 1.0;
template <bool kActivation> DDPM_FAST_INLINE F activate(F z) {
  if constexpr (kActivation) return silu_in_units(z);
  return z;
}

// v - center for the values of one channel. Whether there is an embedding is the same for a whole run: a branch that
// costs nothing.
struct Differences {
  explicit Differences(const ChannelCoefficients& k)
      : embedded(k.embedding != 0), embedding(splat(k.embedding)), center(splat(k.center)) {}
  __attribute__((always_inline)) F operator()(F x) const { return (embedded ? x + embedding : x) - center; }
  bool embedded;
  F embedding, center;
};

// Arithmetic, not memory, takes the time of the second pass: meanwhile the next unit is fetched for its first pass, or
// what lies ahead in this one where a unit is large, and so is the memory to be written.
constexpr int64_t kAhead = 512;
template <class T> DDPM_FAST_INLINE int64_t elements_ahead(int64_t unit_size) {
  return unit_size * static_cast<int64_t>(sizeof(T)) <= (1 << 19) ? unit_size : kAhead;
}
template <class T> DDPM_FAST_INLINE void prefetch(const T* ahead, const T* out) {
  __builtin_prefetch(ahead);
  __builtin_prefetch(out + kAhead);
}

// The tail overlaps what came before it and is read first: `out` may be x.
template <class T, bool kActivation>
static void apply_run(const T* x, T* out, int64_t n, const ChannelCoefficients& k, int64_t ahead) {
  const Differences difference(k);
  const F factor = splat(k.factor), offset = splat(k.offset);
  const bool has_tail = n % kLanes != 0;
  const Tail tail = tail_of(n);
  const F last = has_tail ? load(x, tail) : splat(0.0f);
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    prefetch(x + i + ahead, out + i);
    put(out + i, activate<kActivation>(fma(difference(load(x + i)), factor, offset)));
  }
  if (has_tail) put(out, activate<kActivation>(fma(difference(last), factor, offset)), tail);
}

// ---- Channels last: a row of memory is `repeat` pixels of all channels, and its sums are kept an element each ----

// Arrays as long as a row, with room for a vector beyond its end, on cache lines of their own.
template <int kCount> class RowBuffers {
 public:
  explicit RowBuffers(int64_t row) : size_((row + 2 * kLanes - 1) / kLanes * kLanes), data_((kCount + 1) * size_) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(data_.data());
    first_ = data_.data() + (64 - address % 64) % 64 / sizeof(float);
  }
  RowBuffers(const RowBuffers&) = delete;
  float* operator[](int i) { return first_ + i * size_; }
  void clear(int i) { std::fill_n((*this)[i], size_, 0.0f); }

 private:
  int64_t size_;
  std::vector<float> data_;
  float* first_;
};

template <int kRows, class T> DDPM_FAST_INLINE void sum_at(float* sum, const T* x, int64_t stride) {
  F s = load(x);
  if constexpr (kRows == 4) s = (s + load(x + stride)) + (load(x + 2 * stride) + load(x + 3 * stride));
  store(sum, load(sum) + s);
}
template <int kRows, class T> DDPM_FAST_INLINE void sum_rows(float* sum, const T* x, int64_t length) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) sum_at<kRows>(sum + i, x + i, length);
  if (i == length) return;
  const Tail tail = tail_of(length);
  for (int r = 0; r < kRows; ++r)
    store(sum + tail.at, load(sum + tail.at) + kept(load(x + r * length, tail), tail));
}

// Sums of the differences to `about`, and of their squares.
template <bool kEmbedding> DDPM_FAST_INLINE F difference(F x, const float* embedding, const float* about) {
  if constexpr (kEmbedding) return (x + load(embedding)) - load(about);
  return x - load(about);
}
template <int kRows, bool kEmbedding, class T>
DDPM_FAST_INLINE void square_at(F& first, F& square, const T* x, int64_t stride, const float* embedding,
                                const float* about) {
  if constexpr (kRows > 1) {  // in pairs, pairs of pairs and so on: fewer roundings of large sums
    F more_first, more_square;
    square_at<kRows / 2, kEmbedding>(first, square, x, stride, embedding, about);
    square_at<kRows / 2, kEmbedding>(more_first, more_square, x + kRows / 2 * stride, stride, embedding, about);
    first = first + more_first;
    square = square + more_square;
  } else {
    first = difference<kEmbedding>(load(x), embedding, about);
    square = first * first;
  }
}
template <int kRows, bool kEmbedding, class T>
DDPM_FAST_INLINE void square_rows(float* first, float* square, const float* about, const float* embedding, const T* x,
                                  int64_t length) {
  int64_t i = 0;
  for (; i + kLanes <= length; i += kLanes) {
    F f, s;
    square_at<kRows, kEmbedding>(f, s, x + i, length, embedding + i, about + i);
    store(first + i, load(first + i) + f);
    store(square + i, load(square + i) + s);
  }
  if (i == length) return;
  const Tail tail = tail_of(length);
  for (int r = 0; r < kRows; ++r) {
    const F d = kept(difference<kEmbedding>(load(x + r * length, tail), embedding + tail.at, about + tail.at), tail);
    store(first + tail.at, load(first + tail.at) + d);
    store(square + tail.at, fma(d, d, load(square + tail.at)));
  }
}

// Adds up what a row buffer holds of the channels `channel` .. `channel + width - 1`.
static inline double sum_of_channels(const float* row, int64_t repeat, int64_t channels, int64_t channel,
                                     int64_t width) {
  double sum = 0;
  for (int64_t r = 0; r < repeat; ++r)
    for (int64_t c = 0; c < width; ++c) sum += row[r * channels + channel + c];
  return sum;
}

// Spreads a value a channel over a row.
static inline void repeat_row(float* row, int64_t repeat, int64_t channels) {
  for (int64_t r = 1; r < repeat; ++r) std::copy_n(row, channels, row + r * channels);
}

template <class T, bool kEmbedding>
static void chunk_moments(const NormAct& op, const T* x, const float* embedding, int64_t pixels, int64_t repeat,
                          RowBuffers<5>& buffers, Moments* moments) {
  float *const sum = buffers[0], *const about = buffers[1], *const first = buffers[2], *const square = buffers[3];
  const int64_t channels = op.channels, width = op.width(), row = repeat * channels;
  const int64_t rows = pixels / repeat, rest = pixels % repeat * channels;
  const double n = static_cast<double>(width * pixels);
  // About the mean of the first rows, as in piece_moments.
  buffers.clear(0);
  const int64_t some = std::min(rows == 0 ? pixels : (rows / 32 + 1) * 4 * repeat, pixels);
  int64_t r = 0;
  for (; r + 4 <= some / repeat; r += 4) sum_rows<4>(sum, x + r * row, row);
  for (; r < some / repeat; ++r) sum_rows<1>(sum, x + r * row, row);
  sum_rows<1>(sum, x + r * row, some % repeat * channels);
  for (int64_t g = 0; g < op.groups; ++g) {
    double total = sum_of_channels(sum, repeat, channels, g * width, width);
    if constexpr (kEmbedding)
      for (int64_t c = 0; c < width; ++c) total += static_cast<double>(embedding[g * width + c]) * some;
    std::fill_n(about + g * width, width, static_cast<float>(total / static_cast<double>(width * some)));
  }
  repeat_row(about, repeat, channels);
  buffers.clear(2);
  buffers.clear(3);
  for (r = 0; r + 8 <= rows; r += 8) square_rows<8, kEmbedding>(first, square, about, embedding, x + r * row, row);
  for (; r < rows; ++r) square_rows<1, kEmbedding>(first, square, about, embedding, x + r * row, row);
  square_rows<1, kEmbedding>(first, square, about, embedding, x + rows * row, rest);
  for (int64_t g = 0; g < op.groups; ++g)
    moments[g] = moments_about(about[g * width], sum_of_channels(first, repeat, channels, g * width, width),
                               sum_of_channels(square, repeat, channels, g * width, width), n);
}

// v - center for elements i .. i + 15 of a row; `embedding` is null where there is none.
DDPM_FAST_INLINE F row_difference(F x, const float* embedding, const float* center, int64_t i) {
  if (embedding != nullptr) x = x + load(embedding + i);
  return x - load(center + i);
}

template <class T, bool kActivation>
DDPM_FAST_INLINE void apply_row(const T* x, T* out, int64_t n, const float* embedding, const float* center,
                                const float* factor, const float* offset, int64_t ahead) {
  const bool has_tail = n % kLanes != 0;
  const Tail tail = tail_of(n);
  const F last = has_tail ? load(x, tail) : splat(0.0f);
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    prefetch(x + i + ahead, out + i);
    const F d = row_difference(load(x + i), embedding, center, i);
    put(out + i, activate<kActivation>(fma(d, load(factor + i), load(offset + i))));
  }
  if (has_tail) {
    const F d = row_difference(last, embedding, center, tail.at);
    put(out, activate<kActivation>(fma(d, load(factor + tail.at), load(offset + tail.at))), tail);
  }
}

// Each coefficient of a sample's channels as a row; z is wanted times `unit`.
class RowCoefficients {
 public:
  RowCoefficients(const NormAct& op, const Chunks& chunks, int64_t sample, const double* mean, const double* rstd,
                  double unit = 1.0)
      : rows_(chunks.row()), embedded_(op.embedding.data != nullptr) {
    const Channels channels(op, sample, unit);
    for (int64_t g = 0, c = 0; g < op.groups; ++g)
      for (const int64_t end = c + op.width(); c < end; ++c) {
        const ChannelCoefficients k = channels.coefficients(c, mean[g], rstd[g]);
        rows_[0][c] = k.embedding;
        rows_[1][c] = k.center;
        rows_[2][c] = k.factor;
        rows_[3][c] = k.offset;
      }
    for (int i = 0; i < 4; ++i) repeat_row(rows_[i], chunks.repeat(), op.channels);
  }
  const float* embedding() { return embedded_ ? rows_[0] : nullptr; }
  const float* center() { return rows_[1]; }
  const float* factor() { return rows_[2]; }
  const float* offset() { return rows_[3]; }

 private:
  RowBuffers<4> rows_;
  bool embedded_;
};

// ---- Parts of units, in either order ----

// The moments of parts begin .. end - 1 of a unit: one a part with channels first, one a group and part otherwise.
template <class T>
static void part_moments(const NormAct& op, const T* x, int64_t unit, int64_t begin, int64_t end, Moments* moments) {
  if (op.order == Order::kChannelsFirst) {
    const float* const row = op.embedding.row(unit / op.groups);
    const float* const embedding = row ? row + unit % op.groups * op.width() : nullptr;
    const int64_t stride = embedding ? op.pixels : op.group_size();
    const Pieces pieces(embedding ? op.width() : 1, stride);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t c = pieces.channel(i), count = pieces.channels(i), pixels = pieces.pixels(i);
      const T* const from = x + c * stride + pieces.pixel(i);
      moments[i] = embedding ? piece_moments<T, true>(from, embedding + c, count, pixels, stride)
                             : piece_moments<T, false>(from, nullptr, count, pixels, stride);
    }
    return;
  }
  const Chunks chunks(op);
  RowBuffers<5> buffers(chunks.row());
  const float* const row = op.embedding.row(unit);
  float* const embedding = buffers[4];
  if (row) {
    std::copy_n(row, op.channels, embedding);
    repeat_row(embedding, chunks.repeat(), op.channels);
  }
  for (int64_t i = begin; i < end; ++i) {
    const T* const from = x + chunks.pixel(i) * op.channels;
    Moments* const to = moments + i * op.groups;
    if (row)
      chunk_moments<T, true>(op, from, embedding, chunks.pixels(i), chunks.repeat(), buffers, to);
    else
      chunk_moments<T, false>(op, from, embedding, chunks.pixels(i), chunks.repeat(), buffers, to);
  }
}

// Writes parts begin .. end - 1 of a unit of `out`, the last first since they were read last; mean and rstd are those
// of the unit's groups.
template <class T, bool kActivation>
static void apply_parts(const NormAct& op, const T* x, T* out, int64_t unit, int64_t begin, int64_t end,
                        const double* mean, const double* rstd) {
  if (op.order == Order::kChannelsFirst) {
    const Pieces pieces(op.width(), op.pixels);
    const int64_t channel = unit % op.groups * op.width();
    const int64_t ahead = elements_ahead<T>(op.group_size());
    const Channels channels(op, unit / op.groups, kUnitOfZ<kActivation>);
    for (int64_t i = end - 1; i >= begin; --i)
      for (int64_t c = pieces.channel(i); c < pieces.channel(i) + pieces.channels(i); ++c) {
        const int64_t at = c * op.pixels + pieces.pixel(i);
        apply_run<T, kActivation>(x + at, out + at, pieces.pixels(i),
                                  channels.coefficients(channel + c, *mean, *rstd), ahead);
      }
    return;
  }
  const Chunks chunks(op);
  const int64_t row = chunks.row();
  const int64_t ahead = elements_ahead<T>(op.channels * op.pixels);
  RowCoefficients k(op, chunks, unit, mean, rstd, kUnitOfZ<kActivation>);
  for (int64_t i = end - 1; i >= begin; --i) {
    const int64_t first = chunks.pixel(i) * op.channels, size = chunks.pixels(i) * op.channels;
    for (int64_t at = first; at < first + size; at += row)
      apply_row<T, kActivation>(x + at, out + at, std::min(row, first + size - at), k.embedding(), k.center(),
                                k.factor(), k.offset(), ahead);
  }
}

template <class T>
static void apply_parts(const NormAct& op, const T* x, T* out, int64_t unit, int64_t begin, int64_t end,
                        const double* mean, const double* rstd) {
  if (op.activation)
    apply_parts<T, true>(op, x, out, unit, begin, end, mean, rstd);
  else
    apply_parts<T, false>(op, x, out, unit, begin, end, mean, rstd);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast

#include "norm_act_backward_kernels.h"
