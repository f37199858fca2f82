// Products of a few rows with a weight matrix, in float32.
//
// A sum has the same order for a row alone and among others, hence the same
// bits: over the contracted dim in order, in both products.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

using Rows = const float* const*;
using OutRows = float* const*;

// --- y += x @ w, w [k, n] with rows `stride` apart ---

// M rows of x. The weights are read in the order in which they lie, which
// memory is fastest at.
template <int M>
static void multiply_in_order(Rows x, long at, const float* w, long stride, OutRows y_rows,
                              long n, long k) {
  float* y[M];
  UNROLL for (int i = 0; i < M; i++) y[i] = y_rows[i];
  for (long r = 0; r < k; r++, w += stride) {
    float a[M];
    UNROLL for (int i = 0; i < M; i++) a[i] = x[i][at + r];
    long j = 0;
    for (; j + LANES <= n; j += LANES) {
      const Vec v = load(w + j);
      UNROLL for (int i = 0; i < M; i++) store(y[i] + j, load(y[i] + j) + a[i] * v);
    }
    for (; j < n; j++)
      for (int i = 0; i < M; i++) y[i][j] = std::fma(a[i], w[j], y[i][j]);
  }
}

constexpr long STEP = 16;  // rows of weights that stay in the first cache
constexpr int TALL = LANES == 16 ? 8 : 6;  // rows of x whose sums fit into registers

// M rows of x by N vectors of columns; asks for the weights of the next step.
template <int M, int N>
static inline void tile(Rows x, long at, const float* w, long stride, OutRows y, long j,
                        long k, bool prefetch) {
  Vec acc[M][N];
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int v = 0; v < N; v++) acc[i][v] = load(y[i] + j + v * LANES);
  for (long r = 0; r < k; r++) {
    const float* p = w + r * stride + j;
    Vec b[N];
    UNROLL for (int v = 0; v < N; v++) {
      if (prefetch) __builtin_prefetch(p + STEP * stride + v * LANES);
      b[v] = in_register(load(p + v * LANES));
    }
    UNROLL for (int i = 0; i < M; i++)
      UNROLL for (int v = 0; v < N; v++) acc[i][v] += x[i][at + r] * b[v];
  }
  UNROLL for (int i = 0; i < M; i++)
    UNROLL for (int v = 0; v < N; v++) store(y[i] + j + v * LANES, acc[i][v]);
}

template <int M>
static void tiles(Rows x, long at, const float* w, long stride, OutRows y, long n, long k,
                  bool prefetch) {
  constexpr int N = M > 4 || (M == 4 && LANES < 16) ? 2 : 4;
  long j = 0;
  for (; j + N * LANES <= n; j += N * LANES) tile<M, N>(x, at, w, stride, y, j, k, prefetch);
  for (; j + LANES <= n; j += LANES) tile<M, 1>(x, at, w, stride, y, j, k, prefetch);
  for (; j < n; j++)
    for (int i = 0; i < M; i++)
      for (long r = 0; r < k; r++) y[i][j] = std::fma(x[i][at + r], w[r * stride + j], y[i][j]);
}

// Columns `at` to `at` + k of m rows of x.
static void multiply(Rows x, long at, const float* w, long stride, OutRows y, long m, long n,
                     long k) {
  if (m == 1) return multiply_in_order<1>(x, at, w, stride, y, n, k);
  if (m == 2) return multiply_in_order<2>(x, at, w, stride, y, n, k);
  if (m == 3) return multiply_in_order<3>(x, at, w, stride, y, n, k);
  for (const long end = at + k; at < end; at += STEP, w += STEP * stride) {
    const long here = std::min(STEP, end - at);
    long i = 0;
    for (; i + TALL <= m; i += TALL) tiles<TALL>(x + i, at, w, stride, y + i, n, here, i == 0);
    for (; i + 4 <= m; i += 4) tiles<4>(x + i, at, w, stride, y + i, n, here, i == 0);
    for (; i + 2 <= m; i += 2) tiles<2>(x + i, at, w, stride, y + i, n, here, false);
    for (; i < m; i++) tiles<1>(x + i, at, w, stride, y + i, n, here, false);
  }
}

// --- y = x @ w.T, w [n, k] with rows `stride` apart ---

// M rows of x by LANES / M rows of w, one of the latter after the other if
// M is 1: in the order in which they lie.
template <int M>
static inline void dots(Rows x, const float* w, long stride, OutRows y, long c, long n, long k) {
  constexpr int N = LANES / M;
  Vec acc[M * N];
  const float* row[N];
  for (int v = 0; v < N; v++) row[v] = w + std::min(c + v, n - 1) * stride;
  const long whole = k - k % LANES;
  if constexpr (M == 1) {
    for (int v = 0; v < N; v++) {
      Vec total{};
      for (long j = 0; j < whole; j += LANES) total += load(x[0] + j) * load(row[v] + j);
      acc[v] = total;
    }
  } else {
    UNROLL for (int a = 0; a < M * N; a++) acc[a] = Vec{};
    for (long j = 0; j < whole; j += LANES) {
      Vec b[N];
      UNROLL for (int v = 0; v < N; v++) b[v] = in_register(load(row[v] + j));
      UNROLL for (int i = 0; i < M; i++) {
        const Vec a = in_register(load(x[i] + j));
        UNROLL for (int v = 0; v < N; v++) acc[i * N + v] += a * b[v];
      }
    }
  }
  if (whole < k) {
    UNROLL for (int i = 0; i < M; i++) {
      const Vec a = load_first(x[i] + whole, k - whole);
      UNROLL for (int v = 0; v < N; v++)
        acc[i * N + v] += a * load_first(row[v] + whole, k - whole);
    }
  }
  float all[LANES];
  store(all, sums(acc));
  const long here = std::min<long>(N, n - c);
  for (int i = 0; i < M; i++) std::memcpy(y[i] + c, all + i * N, 4 * here);
}

static void multiply_transposed(Rows x, const float* w, long stride, OutRows y, long m, long n,
                                long k) {
  long i = 0;
  auto rows = [&](auto height) {
    constexpr int M = decltype(height)::value;
    for (; i + M <= m; i += M)
      for (long c = 0; c < n; c += LANES / M) dots<M>(x + i, w, stride, y + i, c, n, k);
  };
  rows(std::integral_constant<int, 4>());
  rows(std::integral_constant<int, 2>());
  rows(std::integral_constant<int, 1>());
}
