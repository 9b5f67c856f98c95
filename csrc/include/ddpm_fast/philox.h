// Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//
// Written in U, a uint32 or a vector of them, which the including file defines together with splat() and
// multiply_wide(); it includes this file in its own namespace, hence no include guard.

struct PhiloxKey {
  uint32_t low, high;
};

// r holds the counter on entry and the random words on return. A round multiplies two of the four words and mixes
// the products with the other two and with a key that advances by a Weyl sequence.
DDPM_FAST_INLINE void philox(U (&r)[4], PhiloxKey key) {
  const U m0 = splat(0xd2511f53u), m1 = splat(0xcd9e8d57u);
  for (int round = 0; round < 10; ++round) {
    U low0, high0, low1, high1;
    multiply_wide(r[0], m0, low0, high0);
    multiply_wide(r[2], m1, low1, high1);
    r[0] = high1 ^ r[1] ^ splat(key.low);
    r[1] = low1;
    r[2] = high0 ^ r[3] ^ splat(key.high);
    r[3] = low0;
    key.low += 0x9e3779b9u;
    key.high += 0xbb67ae85u;
  }
}
