// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Written in W, a word or a vector of words as it is multiplied, which the including file defines together with
// multiply() (the 64-bit product, whose low half is a word again), high() and mix() (exclusive or); it includes this
// file in its own namespace, hence no include guard.

struct PhiloxKey {
  uint32_t low, high;
};

// r holds the counter on entry and the random words on return. A round multiplies two of the four words and mixes
// the products with the other two and with a key that advances by a Weyl sequence.
DDPM_FAST_INLINE void philox(W (&r)[4], PhiloxKey key) {
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const W product0 = multiply(r[0], 0xd2511f53u), product1 = multiply(r[2], 0xcd9e8d57u);
    r[0] = mix(high(product1), r[1], key.low);
    r[1] = product1;
    r[2] = mix(high(product0), r[3], key.high);
    r[3] = product0;
    key.low += 0x9e3779b9u;
    key.high += 0xbb67ae85u;
  }
}
