// Vectors of floats, by the vector extensions of GCC and clang.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
constexpr int LANES = 16;
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#else
constexpr int LANES = 8;  // two registers where they hold four
#define EVEN_LANES 0, 2, 4, 6, 8, 10, 12, 14
#define ODD_LANES 1, 3, 5, 7, 9, 11, 13, 15
#endif

typedef float Vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t IntVec __attribute__((vector_size(4 * LANES), aligned(4)));

// An array of vectors stays in registers only where its loops are unrolled.
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// GCC would rather load a vector anew for each of its uses.
static inline Vec in_register(Vec v) {
#ifdef __AVX__
  asm("" : "+v"(v));
#endif
  return v;
}

static inline Vec load(const float* p) { return *(const Vec*)p; }
static inline void store(float* p, Vec v) { *(Vec*)p = v; }

// The first n lanes at p, then zeros.
static inline Vec load_first(const float* p, long n) {
  Vec v{};
  std::memcpy(&v, p, 4 * n);
  return v;
}

// Sums of pairs of neighbours: those of a, then those of b.
static inline Vec add_pairs(Vec a, Vec b) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, EVEN_LANES) +
         __builtin_shufflevector(a, b, ODD_LANES);
#else
  return __builtin_shuffle(a, b, IntVec{EVEN_LANES}) +
         __builtin_shuffle(a, b, IntVec{ODD_LANES});
#endif
}

// The sum of each of LANES vectors, in a lane each.
template <int N = LANES>
static inline Vec sums(const Vec* a) {
  if constexpr (N == 1)
    return a[0];
  else
    return add_pairs(sums<N / 2>(a), sums<N / 2>(a + N / 2));
}

static inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += v[i];
  return total;
}

static inline float largest(Vec v) {
  float top = v[0];
  for (int i = 1; i < LANES; i++) top = top > v[i] ? top : v[i];
  return top;
}

// e^x to about 1e-7: x = n log 2 + r with |r| <= log(2) / 2, and a polynomial of
// r. Beyond -87 and 88 the result is that of the bound.
static inline Vec exp(Vec x) {
  const Vec low = Vec{} - 87.f, high = Vec{} + 88.f;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Vec rounder = Vec{} + 12582912.f;  // 1.5 * 2^23: the sum is an integer
  Vec n = x * 1.44269504088896341f + rounder;
  const IntVec bits = (IntVec)n;
  n -= rounder;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec y = Vec{} + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.f;
  return (Vec)((IntVec)y + (bits << 23));
}
static inline float exp1(float x) { return exp(Vec{} + x)[0]; }
