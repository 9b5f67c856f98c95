namespace ddpm_fast {
namespace DDPM_FAST_ISA {

// Gradients are those of u = kUnitOfZ z, of which the coefficients make grad_x; sums are handed over as those of z.
//
// Where grad_x is float32 it holds grad_u between the two passes; otherwise grad_u is worked out twice.
template <class T, bool kActivation> constexpr bool kept_in_grad_x = kActivation && std::is_same_v<T, float>;

// In the place of grad_out.
template <bool kActivation, int n>
DDPM_FAST_INLINE void gradients_of_u(F (&grad_out)[n], const F (&difference)[n], F factor, F offset) {
  if constexpr (kActivation) {
    F u[n];
    DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) u[i] = fma(difference[i], factor, offset);
    silu_derivatives_in_units(u);
    DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) grad_out[i] = grad_out[i] * u[i];
  }
}
template <bool kActivation> DDPM_FAST_INLINE F gradient_of_u(F grad_out, F difference, F factor, F offset) {
  F grad[1] = {grad_out};
  const F d[1] = {difference};
  gradients_of_u<kActivation>(grad, d, factor, offset);
  return grad[0];
}
template <bool kActivation> static inline ChannelSums sums_of_z(double gradient, double product, double difference) {
  return {kUnitOfZ<kActivation> * gradient, kUnitOfZ<kActivation> * product, difference};
}

// ---- Channels first ----

constexpr int kAbreast = 2;  // vectors whose exponentials are worked out at once

template <class T> DDPM_FAST_INLINE void prefetch(const T* grad_out, const T* x, const T* grad_x, int64_t ahead) {
  __builtin_prefetch(grad_out + ahead);
  __builtin_prefetch(x + ahead);
  __builtin_prefetch(grad_x + ahead);
}

template <class T, bool kActivation>
static ChannelSums run_sums(const T* grad_out, const T* x, T* grad_x, int64_t n, const ChannelCoefficients& k,
                            bool with_differences) {
  const Differences difference(k);
  const F factor = splat(k.factor), offset = splat(k.offset);
  F gradient = splat(0.0f), product = splat(0.0f), differences = splat(0.0f);
  const auto vectors = [&](auto count, int64_t i) __attribute__((always_inline)) {
    constexpr int kCount = decltype(count)::value;
    F d[kCount], g[kCount];
    DDPM_FAST_UNROLL for (int v = 0; v < kCount; ++v) {
      const int64_t at = i + v * kLanes;
      prefetch(grad_out + at, x + at, grad_x + at, kAhead);
      d[v] = difference(load(x + at));
      g[v] = load(grad_out + at);
    }
    gradients_of_u<kActivation>(g, d, factor, offset);
    DDPM_FAST_UNROLL for (int v = 0; v < kCount; ++v) {
      if (kept_in_grad_x<T, kActivation> && grad_x != nullptr) put(grad_x + i + v * kLanes, g[v]);
      gradient = gradient + g[v];
      product = fma(g[v], d[v], product);
      if (with_differences) differences = differences + d[v];
    }
  };
  int64_t i = 0;
  for (; i + kAbreast * kLanes <= n; i += kAbreast * kLanes) vectors(std::integral_constant<int, kAbreast>{}, i);
  for (; i + kLanes <= n; i += kLanes) vectors(std::integral_constant<int, 1>{}, i);
  if (n % kLanes != 0) {
    const Tail tail = tail_of(n);
    const F d = kept(difference(load(x, tail)), tail);
    const F g = gradient_of_u<kActivation>(load(grad_out, tail), difference(load(x, tail)), factor, offset);
    if (kept_in_grad_x<T, kActivation> && grad_x != nullptr) put(grad_x, g, tail);
    gradient = gradient + kept(g, tail);
    product = fma(kept(g, tail), d, product);
    differences = differences + d;
  }
  return sums_of_z<kActivation>(sum_of_lanes(gradient), sum_of_lanes(product), sum_of_lanes(differences));
}

template <class T, bool kActivation>
DDPM_FAST_INLINE F gradient_of_x(F grad, F d, F factor, F offset, F slope, F constant) {
  if constexpr (!kept_in_grad_x<T, kActivation>) grad = gradient_of_u<kActivation>(grad, d, factor, offset);
  return fma(grad, factor, fma(d, slope, constant));
}

// `grad` is grad_x itself where that holds grad_z: the tail is read before anything is written.
template <class T, bool kActivation>
static void gradient_run(const T* grad, const T* x, T* grad_x, int64_t n, const ChannelCoefficients& k,
                         const GradientCoefficients& g) {
  const Differences difference(k);
  const F factor = splat(k.factor), offset = splat(k.offset);
  const F slope = splat(g.slope), constant = splat(g.constant);
  const bool has_tail = n % kLanes != 0;
  const Tail tail = tail_of(n);
  const F last = has_tail ? load(grad, tail) : splat(0.0f);
  for (int64_t i = 0; i + kLanes <= n; i += kLanes)
    put(grad_x + i,
          gradient_of_x<T, kActivation>(load(grad + i), difference(load(x + i)), factor, offset, slope, constant));
  if (has_tail) {
    const F d = difference(load(x, tail));
    put(grad_x, gradient_of_x<T, kActivation>(last, d, factor, offset, slope, constant), tail);
  }
}

// ---- Channels last ----

// The sums, an element of the row each; without an embedding nobody asks for that of the differences.
struct RowSums {
  float *gradient, *product, *difference;
};

// Several rows at a time, so that coefficients are read once for all of them, and sums read and written. The rows that
// come next are prefetched: so many streams of memory are more than the processor follows by itself. Where a sample is
// too large for the second-level cache, memory takes the time, and a single stream of it comes faster.
constexpr int kRowsAbreast = 4;
template <class T> DDPM_FAST_INLINE bool takes_rows_abreast(const NormAct& op) {
  return op.channels * op.pixels * static_cast<int64_t>(sizeof(T)) <= 1 << 20;
}

template <int kRows, class T, bool kActivation>
DDPM_FAST_INLINE void sum_gradients(const T* grad_out, const T* x, T* grad_x, int64_t row, int64_t n,
                                    RowCoefficients& k, const RowSums& sums) {
  const float *const embedding = k.embedding(), *const center = k.center(), *const factor = k.factor();
  const float* const offset = k.offset();
  const bool put_gradient = kept_in_grad_x<T, kActivation> && grad_x != nullptr;
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) {
    F gradient = load(sums.gradient + i), product = load(sums.product + i), differences = splat(0.0f);
    DDPM_FAST_UNROLL for (int r = 0; r < kRows; ++r) {
      const int64_t at = r * row + i;
      prefetch(grad_out + at, x + at, grad_x + at, std::max(kRows * row, kAhead));
      const F d = row_difference(load(x + at), embedding, center, i);
      const F g = gradient_of_u<kActivation>(load(grad_out + at), d, load(factor + i), load(offset + i));
      if (put_gradient) put(grad_x + at, g);
      gradient = gradient + g;
      product = fma(g, d, product);
      differences = differences + d;
    }
    store(sums.gradient + i, gradient);
    store(sums.product + i, product);
    if (embedding != nullptr) store(sums.difference + i, load(sums.difference + i) + differences);
  }
  if (n % kLanes == 0) return;
  const Tail tail = tail_of(n);
  const int64_t i = tail.at;
  for (int r = 0; r < kRows; ++r) {
    const F d = row_difference(load(x + r * row, tail), embedding, center, i);
    const F g = gradient_of_u<kActivation>(load(grad_out + r * row, tail), d, load(factor + i), load(offset + i));
    if (put_gradient) put(grad_x + r * row, g, tail);
    store(sums.gradient + i, load(sums.gradient + i) + kept(g, tail));
    store(sums.product + i, fma(kept(g, tail), kept(d, tail), load(sums.product + i)));
    if (embedding != nullptr) store(sums.difference + i, load(sums.difference + i) + kept(d, tail));
  }
}

template <int kRows, class T, bool kActivation>
DDPM_FAST_INLINE void gradient_rows(const T* grad, const T* x, T* grad_x, int64_t row, int64_t n, RowCoefficients& k,
                                    const float* slope, const float* constant) {
  const float *const embedding = k.embedding(), *const center = k.center(), *const factor = k.factor();
  const float* const offset = k.offset();
  const auto gradient = [&](F g, F v, int64_t i) {
    return gradient_of_x<T, kActivation>(g, row_difference(v, embedding, center, i), load(factor + i), load(offset + i),
                                         load(slope + i), load(constant + i));
  };
  const bool has_tail = n % kLanes != 0;
  const Tail tail = tail_of(n);
  F last[kRows];
  if (has_tail)
    for (int r = 0; r < kRows; ++r) last[r] = load(grad + r * row, tail);
  for (int64_t i = 0; i + kLanes <= n; i += kLanes)
    DDPM_FAST_UNROLL for (int r = 0; r < kRows; ++r) {
      const int64_t at = r * row + i;
      prefetch(grad + at, x + at, grad_x + at, std::max(kRows * row, kAhead));
      put(grad_x + at, gradient(load(grad + at), load(x + at), i));
    }
  if (has_tail)
    for (int r = 0; r < kRows; ++r)
      put(grad_x + r * row, gradient(last[r], load(x + r * row, tail), tail.at), tail);
}

// Calls rows(kRows, at, n) for all elements of a part: kRows rows of n from `at` on.
template <class Rows>
DDPM_FAST_INLINE void for_rows(int64_t first, int64_t size, int64_t row, bool abreast, const Rows& rows) {
  int64_t at = first;
  const int64_t end = first + size;
  if (abreast)
    for (; at + kRowsAbreast * row <= end; at += kRowsAbreast * row)
      rows(std::integral_constant<int, kRowsAbreast>{}, at, row);
  for (; at < end; at += row) rows(std::integral_constant<int, 1>{}, at, std::min(row, end - at));
}

// ---- Parts of units, in either order ----

// The sums of the unit's channels: with channels first, of channels begin .. end - 1 of the group; otherwise of all
// channels of the sample, for each of the chunks begin .. end - 1.
template <class T, bool kActivation>
static void part_sums(const NormAct& op, const T* grad_out, const T* x, T* grad_x, int64_t unit, int64_t begin,
                      int64_t end, const double* mean, const double* rstd, ChannelSums* sums) {
  if (op.order == Order::kChannelsFirst) {
    const Pieces pieces(1, op.pixels);
    const Channels channels(op, unit / op.groups, kUnitOfZ<kActivation>);
    const int64_t channel = unit % op.groups * op.width();
    for (int64_t c = begin; c < end; ++c) {
      const ChannelCoefficients k = channels.coefficients(channel + c, *mean, *rstd);
      sums[c] = {};
      for (int64_t i = 0; i < pieces.count(); ++i) {
        const int64_t at = c * op.pixels + pieces.pixel(i);
        sums[c] += run_sums<T, kActivation>(grad_out + at, x + at, grad_x ? grad_x + at : nullptr, pieces.pixels(i), k,
                                            op.embedding.data != nullptr);
      }
    }
    return;
  }
  const Chunks chunks(op);
  const int64_t row = chunks.row(), repeat = chunks.repeat();
  RowCoefficients k(op, chunks, unit, mean, rstd, kUnitOfZ<kActivation>);
  RowBuffers<3> buffers(row);
  const RowSums row_sums{buffers[0], buffers[1], buffers[2]};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t first = chunks.pixel(i) * op.channels, size = chunks.pixels(i) * op.channels;
    for (int sum = 0; sum < 3; ++sum) buffers.clear(sum);
    for_rows(first, size, row, takes_rows_abreast<T>(op), [&](auto rows, int64_t at, int64_t n) {
      sum_gradients<rows(), T, kActivation>(grad_out + at, x + at, grad_x ? grad_x + at : nullptr, row, n, k, row_sums);
    });
    ChannelSums* const to = sums + i * op.channels;
    for (int64_t c = 0; c < op.channels; ++c)
      to[c] = sums_of_z<kActivation>(sum_of_channels(row_sums.gradient, repeat, op.channels, c, 1),
                                     sum_of_channels(row_sums.product, repeat, op.channels, c, 1),
                                     sum_of_channels(row_sums.difference, repeat, op.channels, c, 1));
  }
}

// Writes parts begin .. end - 1 of a unit of grad_x, the last first since they were read last; mean, rstd and along are
// those of the unit's groups.
template <class T, bool kActivation>
static void gradient_parts(const NormAct& op, const T* grad_out, const T* x, T* grad_x, int64_t unit, int64_t begin,
                           int64_t end, const double* mean, const double* rstd, const Along* along) {
  const T* const grad = kept_in_grad_x<T, kActivation> ? grad_x : grad_out;
  if (op.order == Order::kChannelsFirst) {
    const Channels channels(op, unit / op.groups, kUnitOfZ<kActivation>);
    const int64_t channel = unit % op.groups * op.width();
    const GradientCoefficients g = gradient_coefficients(*mean, *rstd, *along);
    for (int64_t c = begin; c < end; ++c) {
      const ChannelCoefficients k = channels.coefficients(channel + c, *mean, *rstd);
      const int64_t at = c * op.pixels;
      gradient_run<T, kActivation>(grad + at, x + at, grad_x + at, op.pixels, k, g);
    }
    return;
  }
  const Chunks chunks(op);
  const int64_t row = chunks.row();
  RowCoefficients k(op, chunks, unit, mean, rstd, kUnitOfZ<kActivation>);
  RowBuffers<2> buffers(row);
  float *const slope = buffers[0], *const constant = buffers[1];
  for (int64_t c = 0; c < op.channels; ++c) {
    const int64_t g = c / op.width();
    const GradientCoefficients values = gradient_coefficients(mean[g], rstd[g], along[g]);
    slope[c] = values.slope;
    constant[c] = values.constant;
  }
  for (int i = 0; i < 2; ++i) repeat_row(buffers[i], chunks.repeat(), op.channels);
  for (int64_t i = end - 1; i >= begin; --i) {
    const int64_t first = chunks.pixel(i) * op.channels, size = chunks.pixels(i) * op.channels;
    for_rows(first, size, row, takes_rows_abreast<T>(op), [&](auto rows, int64_t at, int64_t n) {
      gradient_rows<rows(), T, kActivation>(grad + at, x + at, grad_x + at, row, n, k, slope, constant);
    });
  }
}

template <class T>
static void part_sums(const NormAct& op, const T* grad_out, const T* x, T* grad_x, int64_t unit, int64_t begin,
                      int64_t end, const double* mean, const double* rstd, ChannelSums* sums) {
  if (op.activation)
    part_sums<T, true>(op, grad_out, x, grad_x, unit, begin, end, mean, rstd, sums);
  else
    part_sums<T, false>(op, grad_out, x, grad_x, unit, begin, end, mean, rstd, sums);
}
template <class T>
static void gradient_parts(const NormAct& op, const T* grad_out, const T* x, T* grad_x, int64_t unit, int64_t begin,
                           int64_t end, const double* mean, const double* rstd, const Along* along) {
  if (op.activation)
    gradient_parts<T, true>(op, grad_out, x, grad_x, unit, begin, end, mean, rstd, along);
  else
    gradient_parts<T, false>(op, grad_out, x, grad_x, unit, begin, end, mean, rstd, along);
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
