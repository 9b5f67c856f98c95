// Vectors abreast: n of them, worked on in turn, operation by operation. Philox and Box-Muller are chains of operations
// that wait for each other, and the processor does not look far enough ahead to fill the gaps with the next vectors.
//
// No include guard: noise.h includes this file once per instruction set, in its namespace.

template <int n, class T> struct Row {
  T v[n];
};

#define DDPM_FAST_EACH_VECTOR(type, expression)                       \
  {                                                                   \
    Row<n, type> r;                                                   \
    DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) r.v[i] = expression; \
    return r;                                                         \
  }
template <int n> DDPM_FAST_INLINE Row<n, F> operator+(Row<n, F> a, Row<n, F> b)
    DDPM_FAST_EACH_VECTOR(F, a.v[i] + b.v[i])
template <int n> DDPM_FAST_INLINE Row<n, F> operator-(Row<n, F> a, Row<n, F> b)
    DDPM_FAST_EACH_VECTOR(F, a.v[i] - b.v[i])
template <int n> DDPM_FAST_INLINE Row<n, F> operator*(Row<n, F> a, Row<n, F> b)
    DDPM_FAST_EACH_VECTOR(F, a.v[i] * b.v[i])
template <int n> DDPM_FAST_INLINE Row<n, F> max(Row<n, F> a, Row<n, F> b) DDPM_FAST_EACH_VECTOR(F, max(a.v[i], b.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, F> sqrt(Row<n, F> a) DDPM_FAST_EACH_VECTOR(F, sqrt(a.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, U> operator-(Row<n, U> a, Row<n, U> b)
    DDPM_FAST_EACH_VECTOR(U, a.v[i] - b.v[i])
template <int n> DDPM_FAST_INLINE Row<n, U> operator&(Row<n, U> a, Row<n, U> b)
    DDPM_FAST_EACH_VECTOR(U, a.v[i] & b.v[i])
template <int n> DDPM_FAST_INLINE Row<n, U> operator^(Row<n, U> a, Row<n, U> b)
    DDPM_FAST_EACH_VECTOR(U, a.v[i] ^ b.v[i])
template <int bits, int n> DDPM_FAST_INLINE Row<n, U> shift_left(Row<n, U> a)
    DDPM_FAST_EACH_VECTOR(U, shift_left<bits>(a.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, F> from_int(Row<n, U> a) DDPM_FAST_EACH_VECTOR(F, from_int(a.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, U> bits(Row<n, F> a) DDPM_FAST_EACH_VECTOR(U, bits(a.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, F> from_bits(Row<n, U> a) DDPM_FAST_EACH_VECTOR(F, from_bits(a.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, Mask> negative(Row<n, U> a) DDPM_FAST_EACH_VECTOR(Mask, negative(a.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, F> select(Row<n, Mask> m, Row<n, F> yes, Row<n, F> no)
    DDPM_FAST_EACH_VECTOR(F, select(m.v[i], yes.v[i], no.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, W> spread(Row<n, U> a) DDPM_FAST_EACH_VECTOR(W, spread(a.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, U> gather_words(Row<n, W> a) DDPM_FAST_EACH_VECTOR(U, gather_words(a.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, W> multiply(Row<n, W> a, uint32_t m)
    DDPM_FAST_EACH_VECTOR(W, multiply(a.v[i], m))
template <int n> DDPM_FAST_INLINE Row<n, W> high(Row<n, W> a) DDPM_FAST_EACH_VECTOR(W, high(a.v[i]))
template <int n> DDPM_FAST_INLINE Row<n, W> mix(Row<n, W> a, Row<n, W> b, uint32_t key)
    DDPM_FAST_EACH_VECTOR(W, mix(a.v[i], b.v[i], key))
#undef DDPM_FAST_EACH_VECTOR

// Philox and Box-Muller for n vectors; their words and numbers are rows.
template <int n> struct Abreast {
  using F = Row<n, DDPM_FAST_ISA::F>;
  using U = Row<n, DDPM_FAST_ISA::U>;
  using W = Row<n, DDPM_FAST_ISA::W>;
  using Mask = Row<n, DDPM_FAST_ISA::Mask>;
  DDPM_FAST_INLINE F splat(float x) {
    F r;
    DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) r.v[i] = DDPM_FAST_ISA::splat(x);
    return r;
  }
  DDPM_FAST_INLINE U splat(uint32_t x) {
    U r;
    DDPM_FAST_UNROLL for (int i = 0; i < n; ++i) r.v[i] = DDPM_FAST_ISA::splat(x);
    return r;
  }
#include "ddpm_fast/normal.h"
#include "ddpm_fast/philox.h"
};
