// Reads a tile of an image, whatever its dtype and layout, as float32 in the memory order of another image; included
// by kernel files, once per instruction set.
namespace ddpm_fast {
namespace DDPM_FAST_ISA {

template <class T> static void widen(float* out, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, count - i));
    store_lanes(out + i, load_lanes(from + i, n), n);
  }
}

// Element i of the tile lies at channel c, pixel p of the target's order.
template <class T>
static void gather(float* out, const T* from, const Source& source, const Image& target, int64_t first, int64_t count) {
  const bool channels_first = target.order() == Order::kChannelsFirst;
  const int64_t inner = channels_first ? target.pixels : target.channels;
  const int64_t inner_stride = channels_first ? source.image.pixel_stride : source.image.channel_stride;
  const int64_t outer_stride = channels_first ? source.image.channel_stride : source.image.pixel_stride;
  int64_t outer = first / inner, start = first % inner;
  while (count > 0) {
    const int64_t n = std::min(inner - start, count);
    const T* const row = from + outer * outer_stride + start * inner_stride;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(row[i * inner_stride]);
    out += n;
    count -= n;
    start = 0;
    ++outer;
  }
}

template <class T>
static const float* read_as(const Source& source, const Image& target, int64_t sample, int64_t first, int64_t count,
                            float* buffer) {
  const T* const from = static_cast<const T*>(source.data) + sample * source.image.sample_stride;
  if (!source.aligned_with(target)) {
    gather(buffer, from, source, target, first, count);
    return buffer;
  }
  if constexpr (std::is_same_v<T, float>) return from + first;
  widen(buffer, from + first, count);
  return buffer;
}

// The tile itself where it is float32 in the target's order already, otherwise a copy in the buffer.
static inline const float* read(const Source& source, const Image& target, int64_t sample, int64_t first, int64_t count,
                                float* buffer) {
  switch (source.type) {
    case ScalarType::Half: return read_as<Half>(source, target, sample, first, count, buffer);
    case ScalarType::BFloat16: return read_as<BFloat16>(source, target, sample, first, count, buffer);
    case ScalarType::Byte: return read_as<uint8_t>(source, target, sample, first, count, buffer);
    default: return read_as<float>(source, target, sample, first, count, buffer);
  }
}

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
