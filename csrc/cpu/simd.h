// Sixteen lanes of float32 (F) and of uint32 (U), the same on every instruction set: one register with AVX-512,
// two with AVX2, arrays elsewhere. Kernels are written once in these types; since every operation below is one
// IEEE operation a lane, all instruction sets give the same bits.
//
// No include guard: for_each_isa.h includes this file once per instruction set, each time in a namespace of its own.
namespace ddpm_fast {
namespace DDPM_FAST_ISA {

constexpr int kLanes = 16;
#define DDPM_FAST_INLINE static inline __attribute__((always_inline))

// Before loops over registers, which have to be unrolled whole, or the registers become memory; arrays are memory
// anyway.
#if defined(DDPM_FAST_ISA_AVX512) || defined(DDPM_FAST_ISA_AVX2)
#define DDPM_FAST_UNROLL _Pragma("GCC unroll 16")
#else
#define DDPM_FAST_UNROLL _Pragma("GCC unroll 1")
#endif

#if defined(DDPM_FAST_ISA_AVX512)

struct F { __m512 v; };
struct U { __m512i v; };
struct Mask { __mmask16 v; };

DDPM_FAST_INLINE F splat(float x) { return {_mm512_set1_ps(x)}; }
DDPM_FAST_INLINE U splat(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
DDPM_FAST_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
DDPM_FAST_INLINE U load(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
DDPM_FAST_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
DDPM_FAST_INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
DDPM_FAST_INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
DDPM_FAST_INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
DDPM_FAST_INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
DDPM_FAST_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
DDPM_FAST_INLINE F sqrt(F a) { return {_mm512_sqrt_ps(a.v)}; }
// The second operand where either is NaN, as the x86 instruction has it.
DDPM_FAST_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
DDPM_FAST_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
DDPM_FAST_INLINE U operator+(U a, U b) { return {_mm512_add_epi32(a.v, b.v)}; }
DDPM_FAST_INLINE U operator-(U a, U b) { return {_mm512_sub_epi32(a.v, b.v)}; }
DDPM_FAST_INLINE U operator&(U a, U b) { return {_mm512_and_si512(a.v, b.v)}; }
DDPM_FAST_INLINE U operator|(U a, U b) { return {_mm512_or_si512(a.v, b.v)}; }
DDPM_FAST_INLINE U operator^(U a, U b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int n> DDPM_FAST_INLINE U shift_left(U a) { return {_mm512_slli_epi32(a.v, n)}; }
template <int n> DDPM_FAST_INLINE U shift_right(U a) { return {_mm512_srli_epi32(a.v, n)}; }
DDPM_FAST_INLINE F from_int(U a) { return {_mm512_cvtepi32_ps(a.v)}; }  // the lanes read as signed
// Elements index % 8 of a table of eight, which `table` holds twice.
DDPM_FAST_INLINE U lookup8(U table, U index) { return {_mm512_permutexvar_epi32(index.v, table.v)}; }
DDPM_FAST_INLINE U bits(F a) { return {_mm512_castps_si512(a.v)}; }
DDPM_FAST_INLINE F from_bits(U a) { return {_mm512_castsi512_ps(a.v)}; }
DDPM_FAST_INLINE Mask negative(U a) { return {_mm512_movepi32_mask(a.v)}; }
DDPM_FAST_INLINE F select(Mask m, F yes, F no) { return {_mm512_mask_blend_ps(m.v, no.v, yes.v)}; }

// Words as Philox multiplies them, the even and the odd lanes apart: the low half of each 64-bit lane counts, the high
// half may hold anything.
struct W { __m512i even, odd; };
DDPM_FAST_INLINE W spread(U a) { return {a.v, _mm512_srli_epi64(a.v, 32)}; }
DDPM_FAST_INLINE U gather_words(W a) {
  return {_mm512_mask_blend_epi32(0xaaaa, a.even, _mm512_slli_epi64(a.odd, 32))};
}
DDPM_FAST_INLINE W multiply(W a, uint32_t m) {
  const __m512i v = splat(m).v;
  return {_mm512_mul_epu32(a.even, v), _mm512_mul_epu32(a.odd, v)};
}
DDPM_FAST_INLINE W high(W a) { return {_mm512_srli_epi64(a.even, 32), _mm512_srli_epi64(a.odd, 32)}; }
DDPM_FAST_INLINE W mix(W a, W b, uint32_t key) {
  const __m512i k = splat(key).v;
  return {_mm512_ternarylogic_epi32(a.even, b.even, k, 0x96), _mm512_ternarylogic_epi32(a.odd, b.odd, k, 0x96)};
}

// Transposes the 4x4 blocks that lanes 4q..4q+3 of a, b, c, d form.
DDPM_FAST_INLINE void transpose4(F& a, F& b, F& c, F& d) {
  const __m512 ab0 = _mm512_unpacklo_ps(a.v, b.v), ab1 = _mm512_unpackhi_ps(a.v, b.v);
  const __m512 cd0 = _mm512_unpacklo_ps(c.v, d.v), cd1 = _mm512_unpackhi_ps(c.v, d.v);
  a.v = _mm512_shuffle_ps(ab0, cd0, 0x44);
  b.v = _mm512_shuffle_ps(ab0, cd0, 0xee);
  c.v = _mm512_shuffle_ps(ab1, cd1, 0x44);
  d.v = _mm512_shuffle_ps(ab1, cd1, 0xee);
}
// Lanes 4q..4q+3 from, or to, p + q * stride.
DDPM_FAST_INLINE F load_quarters(const float* p, int64_t stride) {
  const __m512 v = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
  return {_mm512_insertf32x4(_mm512_insertf32x4(v, _mm_loadu_ps(p + 2 * stride), 2), _mm_loadu_ps(p + 3 * stride), 3)};
}
DDPM_FAST_INLINE void store_quarters(float* p, int64_t stride, F a) {
  _mm_storeu_ps(p, _mm512_castps512_ps128(a.v));
  _mm_storeu_ps(p + stride, _mm512_extractf32x4_ps(a.v, 1));
  _mm_storeu_ps(p + 2 * stride, _mm512_extractf32x4_ps(a.v, 2));
  _mm_storeu_ps(p + 3 * stride, _mm512_extractf32x4_ps(a.v, 3));
}
template <int q> DDPM_FAST_INLINE void store_quarter(float* p, F a) { _mm_storeu_ps(p, _mm512_extractf32x4_ps(a.v, q)); }
// a[0], b[0], c[0], a[1], ...: every output takes a and b by one permutation, then c.
DDPM_FAST_INLINE void store_threes(float* p, F a, F b, F c) {
  alignas(64) static constexpr int kFromAB[3][kLanes] = {{0, 16, 0, 1, 17, 0, 2, 18, 0, 3, 19, 0, 4, 20, 0, 5},
                                                         {21, 0, 6, 22, 0, 7, 23, 0, 8, 24, 0, 9, 25, 0, 10, 26},
                                                         {0, 11, 27, 0, 12, 28, 0, 13, 29, 0, 14, 30, 0, 15, 31, 0}};
  alignas(64) static constexpr int kFromC[3][kLanes] = {{0, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 0, 4, 0},
                                                        {0, 5, 0, 0, 6, 0, 0, 7, 0, 0, 8, 0, 0, 9, 0, 0},
                                                        {10, 0, 0, 11, 0, 0, 12, 0, 0, 13, 0, 0, 14, 0, 0, 15}};
  constexpr __mmask16 kC[3] = {0x4924, 0x2492, 0x9249};
  DDPM_FAST_UNROLL for (int i = 0; i < 3; ++i) {
    const __m512 ab = _mm512_permutex2var_ps(a.v, _mm512_load_si512(kFromAB[i]), b.v);
    _mm512_storeu_ps(p + i * kLanes, _mm512_mask_permutexvar_ps(ab, kC[i], _mm512_load_si512(kFromC[i]), c.v));
  }
}

DDPM_FAST_INLINE F load(const Half* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
DDPM_FAST_INLINE void store(Half* p, F a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
DDPM_FAST_INLINE F load(const BFloat16* p) {
  alignas(64) static constexpr uint16_t kToHigh[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                       0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
  const __m512i raw = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_load_si512(kToHigh), raw))};
}
DDPM_FAST_INLINE void store_high_halves(BFloat16* p, U a) {
  alignas(64) static constexpr uint16_t kFromHigh[32] = {1,  3,  5,  7,  9,  11, 13, 15,
                                                         17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i halves = _mm512_permutexvar_epi16(_mm512_load_si512(kFromHigh), a.v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(halves));
}
DDPM_FAST_INLINE F load(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
DDPM_FAST_INLINE Mask is_nan(F a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
// The sum of the lanes, halves added to each other: lane i to lane i + 8, then to i + 4, i + 2 and i + 1.
DDPM_FAST_INLINE float sum_of_lanes(F a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
// The largest lane, in the same order, a NaN treated as max does.
DDPM_FAST_INLINE float max_of_lanes(F a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#elif defined(DDPM_FAST_ISA_AVX2)

struct F { __m256 a, b; };
struct U { __m256i a, b; };
struct Mask { __m256 a, b; };

DDPM_FAST_INLINE F splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
DDPM_FAST_INLINE U splat(uint32_t x) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
  return {v, v};
}
DDPM_FAST_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
DDPM_FAST_INLINE U load(const uint32_t* p) {
  const __m256i* q = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
DDPM_FAST_INLINE void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
DDPM_FAST_INLINE F operator+(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
DDPM_FAST_INLINE F operator-(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
DDPM_FAST_INLINE F operator*(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
DDPM_FAST_INLINE F operator/(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
DDPM_FAST_INLINE F fma(F x, F y, F z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
DDPM_FAST_INLINE F sqrt(F x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
DDPM_FAST_INLINE F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
DDPM_FAST_INLINE F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
DDPM_FAST_INLINE U operator+(U x, U y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
DDPM_FAST_INLINE U operator-(U x, U y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
DDPM_FAST_INLINE U operator&(U x, U y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
DDPM_FAST_INLINE U operator|(U x, U y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
DDPM_FAST_INLINE U operator^(U x, U y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
template <int n> DDPM_FAST_INLINE U shift_left(U x) {
  return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
}
template <int n> DDPM_FAST_INLINE U shift_right(U x) {
  return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)};
}
DDPM_FAST_INLINE F from_int(U x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
DDPM_FAST_INLINE U lookup8(U table, U index) {
  return {_mm256_permutevar8x32_epi32(table.a, index.a), _mm256_permutevar8x32_epi32(table.a, index.b)};
}
DDPM_FAST_INLINE U bits(F x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
DDPM_FAST_INLINE F from_bits(U x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
DDPM_FAST_INLINE Mask negative(U x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
DDPM_FAST_INLINE F select(Mask m, F yes, F no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}

struct W { __m256i even_a, even_b, odd_a, odd_b; };
DDPM_FAST_INLINE W spread(U x) { return {x.a, x.b, _mm256_srli_epi64(x.a, 32), _mm256_srli_epi64(x.b, 32)}; }
DDPM_FAST_INLINE U gather_words(W x) {
  return {_mm256_blend_epi32(x.even_a, _mm256_slli_epi64(x.odd_a, 32), 0xaa),
          _mm256_blend_epi32(x.even_b, _mm256_slli_epi64(x.odd_b, 32), 0xaa)};
}
DDPM_FAST_INLINE W multiply(W x, uint32_t m) {
  const __m256i v = splat(m).a;
  return {_mm256_mul_epu32(x.even_a, v), _mm256_mul_epu32(x.even_b, v), _mm256_mul_epu32(x.odd_a, v),
          _mm256_mul_epu32(x.odd_b, v)};
}
DDPM_FAST_INLINE W high(W x) {
  return {_mm256_srli_epi64(x.even_a, 32), _mm256_srli_epi64(x.even_b, 32), _mm256_srli_epi64(x.odd_a, 32),
          _mm256_srli_epi64(x.odd_b, 32)};
}
DDPM_FAST_INLINE W mix(W x, W y, uint32_t key) {
  const __m256i k = splat(key).a;
  return {_mm256_xor_si256(_mm256_xor_si256(x.even_a, k), y.even_a),
          _mm256_xor_si256(_mm256_xor_si256(x.even_b, k), y.even_b),
          _mm256_xor_si256(_mm256_xor_si256(x.odd_a, k), y.odd_a),
          _mm256_xor_si256(_mm256_xor_si256(x.odd_b, k), y.odd_b)};
}

DDPM_FAST_INLINE void transpose4_half(__m256& a, __m256& b, __m256& c, __m256& d) {
  const __m256 ab0 = _mm256_unpacklo_ps(a, b), ab1 = _mm256_unpackhi_ps(a, b);
  const __m256 cd0 = _mm256_unpacklo_ps(c, d), cd1 = _mm256_unpackhi_ps(c, d);
  a = _mm256_shuffle_ps(ab0, cd0, 0x44);
  b = _mm256_shuffle_ps(ab0, cd0, 0xee);
  c = _mm256_shuffle_ps(ab1, cd1, 0x44);
  d = _mm256_shuffle_ps(ab1, cd1, 0xee);
}
DDPM_FAST_INLINE void transpose4(F& x, F& y, F& z, F& w) {
  transpose4_half(x.a, y.a, z.a, w.a);
  transpose4_half(x.b, y.b, z.b, w.b);
}
DDPM_FAST_INLINE __m256 load_halves(const float* p, int64_t stride) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + stride), 1);
}
DDPM_FAST_INLINE F load_quarters(const float* p, int64_t stride) {
  return {load_halves(p, stride), load_halves(p + 2 * stride, stride)};
}
DDPM_FAST_INLINE void store_quarters(float* p, int64_t stride, F x) {
  _mm_storeu_ps(p, _mm256_castps256_ps128(x.a));
  _mm_storeu_ps(p + stride, _mm256_extractf128_ps(x.a, 1));
  _mm_storeu_ps(p + 2 * stride, _mm256_castps256_ps128(x.b));
  _mm_storeu_ps(p + 3 * stride, _mm256_extractf128_ps(x.b, 1));
}
template <int q> DDPM_FAST_INLINE void store_quarter(float* p, F x) {
  _mm_storeu_ps(p, _mm256_extractf128_ps(q < 2 ? x.a : x.b, q % 2));
}
DDPM_FAST_INLINE void store_threes_half(float* p, __m256 a, __m256 b, __m256 c) {
  const __m256 ab = _mm256_shuffle_ps(a, b, 0x88);  // a0 a2 b0 b2 of each quarter
  const __m256 bc = _mm256_shuffle_ps(b, c, 0xdd);  // b1 b3 c1 c3
  const __m256 ca = _mm256_shuffle_ps(c, a, 0xd8);  // c0 c2 a1 a3
  const __m256 first = _mm256_shuffle_ps(ab, ca, 0x88), second = _mm256_shuffle_ps(bc, ab, 0xd8),
               third = _mm256_shuffle_ps(ca, bc, 0xdd);
  _mm256_storeu_ps(p, _mm256_permute2f128_ps(first, second, 0x20));
  _mm256_storeu_ps(p + 8, _mm256_permute2f128_ps(third, first, 0x30));
  _mm256_storeu_ps(p + 16, _mm256_permute2f128_ps(second, third, 0x31));
}
DDPM_FAST_INLINE void store_threes(float* p, F x, F y, F z) {
  store_threes_half(p, x.a, y.a, z.a);
  store_threes_half(p + 24, x.b, y.b, z.b);
}

DDPM_FAST_INLINE F load(const Half* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
}
DDPM_FAST_INLINE void store(Half* p, F x) {
  __m128i* q = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(q, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(q + 1, _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
DDPM_FAST_INLINE F load(const BFloat16* p) {
  const __m128i* q = reinterpret_cast<const __m128i*>(p);
  const __m256i a = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16);
  const __m256i b = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16);
  return {_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)};
}
DDPM_FAST_INLINE void store_high_halves(BFloat16* p, U x) {
  const __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(x.a, 16), _mm256_srli_epi32(x.b, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
DDPM_FAST_INLINE F load(const uint8_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(raw)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(raw, 8)))};
}
DDPM_FAST_INLINE Mask is_nan(F x) {
  return {_mm256_cmp_ps(x.a, x.a, _CMP_UNORD_Q), _mm256_cmp_ps(x.b, x.b, _CMP_UNORD_Q)};
}
DDPM_FAST_INLINE float sum_of_lanes(F x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
DDPM_FAST_INLINE float max_of_lanes(F x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

#else

struct F { float v[kLanes]; };
struct U { uint32_t v[kLanes]; };
struct Mask { uint32_t v[kLanes]; };

#define DDPM_FAST_EACH(type, expression)             \
  {                                                  \
    type r;                                          \
    for (int i = 0; i < kLanes; ++i) r.v[i] = expression; \
    return r;                                        \
  }
DDPM_FAST_INLINE uint32_t word(float x) {
  uint32_t w;
  std::memcpy(&w, &x, 4);
  return w;
}
DDPM_FAST_INLINE float real(uint32_t w) {
  float x;
  std::memcpy(&x, &w, 4);
  return x;
}
DDPM_FAST_INLINE F splat(float x) DDPM_FAST_EACH(F, x)
DDPM_FAST_INLINE U splat(uint32_t x) DDPM_FAST_EACH(U, x)
DDPM_FAST_INLINE F load(const float* p) DDPM_FAST_EACH(F, p[i])
DDPM_FAST_INLINE U load(const uint32_t* p) DDPM_FAST_EACH(U, p[i])
DDPM_FAST_INLINE void store(float* p, F a) { std::memcpy(p, a.v, sizeof a.v); }
DDPM_FAST_INLINE F operator+(F a, F b) DDPM_FAST_EACH(F, a.v[i] + b.v[i])
DDPM_FAST_INLINE F operator-(F a, F b) DDPM_FAST_EACH(F, a.v[i] - b.v[i])
DDPM_FAST_INLINE F operator*(F a, F b) DDPM_FAST_EACH(F, a.v[i] * b.v[i])
DDPM_FAST_INLINE F operator/(F a, F b) DDPM_FAST_EACH(F, a.v[i] / b.v[i])
DDPM_FAST_INLINE F fma(F a, F b, F c) DDPM_FAST_EACH(F, __builtin_fmaf(a.v[i], b.v[i], c.v[i]))
DDPM_FAST_INLINE F sqrt(F a) DDPM_FAST_EACH(F, __builtin_sqrtf(a.v[i]))
DDPM_FAST_INLINE F min(F a, F b) DDPM_FAST_EACH(F, (a.v[i] < b.v[i] ? a.v[i] : b.v[i]))
DDPM_FAST_INLINE F max(F a, F b) DDPM_FAST_EACH(F, (a.v[i] > b.v[i] ? a.v[i] : b.v[i]))
DDPM_FAST_INLINE U operator+(U a, U b) DDPM_FAST_EACH(U, a.v[i] + b.v[i])
DDPM_FAST_INLINE U operator-(U a, U b) DDPM_FAST_EACH(U, a.v[i] - b.v[i])
DDPM_FAST_INLINE U operator&(U a, U b) DDPM_FAST_EACH(U, a.v[i] & b.v[i])
DDPM_FAST_INLINE U operator|(U a, U b) DDPM_FAST_EACH(U, a.v[i] | b.v[i])
DDPM_FAST_INLINE U operator^(U a, U b) DDPM_FAST_EACH(U, a.v[i] ^ b.v[i])
template <int n> DDPM_FAST_INLINE U shift_left(U a) DDPM_FAST_EACH(U, a.v[i] << n)
template <int n> DDPM_FAST_INLINE U shift_right(U a) DDPM_FAST_EACH(U, a.v[i] >> n)
DDPM_FAST_INLINE F from_int(U a) DDPM_FAST_EACH(F, static_cast<float>(static_cast<int32_t>(a.v[i])))
DDPM_FAST_INLINE U lookup8(U table, U index) DDPM_FAST_EACH(U, table.v[index.v[i] % 8])
DDPM_FAST_INLINE U bits(F a) DDPM_FAST_EACH(U, word(a.v[i]))
DDPM_FAST_INLINE F from_bits(U a) DDPM_FAST_EACH(F, real(a.v[i]))
DDPM_FAST_INLINE Mask negative(U a) DDPM_FAST_EACH(Mask, a.v[i] >> 31)
DDPM_FAST_INLINE F select(Mask m, F yes, F no) DDPM_FAST_EACH(F, (m.v[i] ? yes.v[i] : no.v[i]))

struct W { uint64_t v[kLanes]; };
DDPM_FAST_INLINE W spread(U a) DDPM_FAST_EACH(W, a.v[i])
DDPM_FAST_INLINE U gather_words(W a) DDPM_FAST_EACH(U, static_cast<uint32_t>(a.v[i]))
DDPM_FAST_INLINE W multiply(W a, uint32_t m) DDPM_FAST_EACH(W, static_cast<uint64_t>(static_cast<uint32_t>(a.v[i])) * m)
DDPM_FAST_INLINE W high(W a) DDPM_FAST_EACH(W, a.v[i] >> 32)
DDPM_FAST_INLINE W mix(W a, W b, uint32_t key) DDPM_FAST_EACH(W, a.v[i] ^ b.v[i] ^ key)

DDPM_FAST_INLINE void transpose4(F& a, F& b, F& c, F& d) {
  const F in[4] = {a, b, c, d};
  F* const out[4] = {&a, &b, &c, &d};
  for (int q = 0; q < kLanes; q += 4)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < 4; ++j) out[i]->v[q + j] = in[j].v[q + i];
}
DDPM_FAST_INLINE F load_quarters(const float* p, int64_t stride) DDPM_FAST_EACH(F, p[i / 4 * stride + i % 4])
DDPM_FAST_INLINE void store_quarters(float* p, int64_t stride, F a) {
  for (int i = 0; i < kLanes; ++i) p[i / 4 * stride + i % 4] = a.v[i];
}
template <int q> DDPM_FAST_INLINE void store_quarter(float* p, F a) { std::memcpy(p, a.v + 4 * q, 16); }
DDPM_FAST_INLINE void store_threes(float* p, F a, F b, F c) {
  for (int i = 0; i < kLanes; ++i) p[3 * i] = a.v[i], p[3 * i + 1] = b.v[i], p[3 * i + 2] = c.v[i];
}

DDPM_FAST_INLINE F load(const Half* p) DDPM_FAST_EACH(F, static_cast<float>(p[i]))
DDPM_FAST_INLINE void store(Half* p, F a) {
  for (int i = 0; i < kLanes; ++i) p[i] = Half(a.v[i]);
}
DDPM_FAST_INLINE F load(const BFloat16* p) DDPM_FAST_EACH(F, static_cast<float>(p[i]))
DDPM_FAST_INLINE void store_high_halves(BFloat16* p, U a) {
  for (int i = 0; i < kLanes; ++i) p[i].x = static_cast<uint16_t>(a.v[i] >> 16);
}
DDPM_FAST_INLINE F load(const uint8_t* p) DDPM_FAST_EACH(F, static_cast<float>(p[i]))
DDPM_FAST_INLINE Mask is_nan(F a) DDPM_FAST_EACH(Mask, a.v[i] != a.v[i])
DDPM_FAST_INLINE float sum_of_lanes(F a) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}
DDPM_FAST_INLINE float max_of_lanes(F a) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) a.v[i] = a.v[i] > a.v[i + half] ? a.v[i] : a.v[i + half];
  return a.v[0];
}

#endif

// Round to nearest even, as torch does; a NaN becomes torch's quiet one.
DDPM_FAST_INLINE void store(BFloat16* p, F a) {
  const U b = bits(a);
  const U rounded = b + splat(0x7fffu) + (shift_right<16>(b) & splat(1u));
  store_high_halves(p, bits(select(is_nan(a), from_bits(splat(0x7fc00000u)), from_bits(rounded))));
}

// A partial vector: the first n lanes, the rest zero on loading and left alone on storing.
template <class T> DDPM_FAST_INLINE F load(const T* p, int n) {
  T buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T> DDPM_FAST_INLINE void store(T* p, F a, int n) {
  T buffer[kLanes];
  store(buffer, a);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
}
// For float without that detour through memory, which costs more than most arithmetic.
#if defined(DDPM_FAST_ISA_AVX512)
DDPM_FAST_INLINE F load(const float* p, int n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p)};
}
DDPM_FAST_INLINE void store(float* p, F a, int n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), a.v);
}
#elif defined(DDPM_FAST_ISA_AVX2)
DDPM_FAST_INLINE __m256i lane_mask(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
DDPM_FAST_INLINE F load(const float* p, int n) {
  return {_mm256_maskload_ps(p, lane_mask(n)),
          n > 8 ? _mm256_maskload_ps(p + 8, lane_mask(n - 8)) : _mm256_setzero_ps()};
}
DDPM_FAST_INLINE void store(float* p, F a, int n) {
  _mm256_maskstore_ps(p, lane_mask(n), a.a);
  if (n > 8) _mm256_maskstore_ps(p + 8, lane_mask(n - 8), a.b);
}
#endif

// Quarter q of a, b, c and d to p + 4q, p + 4q + 1, ... times the stride, in that order.
template <int q = 0> DDPM_FAST_INLINE void store_quarters_in_turn(float* p, int64_t stride, F a, F b, F c, F d) {
  store_quarter<q>(p, a);
  store_quarter<q>(p + stride, b);
  store_quarter<q>(p + 2 * stride, c);
  store_quarter<q>(p + 3 * stride, d);
  if constexpr (q < 3) store_quarters_in_turn<q + 1>(p + 4 * stride, stride, a, b, c, d);
}

// The last vector of a run may be partial; the test costs nothing beside the arithmetic.
template <class T> DDPM_FAST_INLINE F load_lanes(const T* p, int n) { return n == kLanes ? load(p) : load(p, n); }
template <class T> DDPM_FAST_INLINE void store_lanes(T* p, F a, int n) {
  if (n == kLanes) store(p, a);
  else store(p, a, n);
}

DDPM_FAST_INLINE F operator+(F a, float b) { return a + splat(b); }
DDPM_FAST_INLINE F operator-(F a, float b) { return a - splat(b); }
DDPM_FAST_INLINE F operator*(F a, float b) { return a * splat(b); }
DDPM_FAST_INLINE F operator-(float a, F b) { return splat(a) - b; }
DDPM_FAST_INLINE F max(F a, float b) { return max(a, splat(b)); }
DDPM_FAST_INLINE F min(F a, float b) { return min(a, splat(b)); }

#include "ddpm_fast/normal.h"
#include "ddpm_fast/philox.h"
#include "ddpm_fast/step.h"

}  // namespace DDPM_FAST_ISA
}  // namespace ddpm_fast
