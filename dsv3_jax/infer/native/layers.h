// Layers of a few rows: RMSNorm, RoPE, and the feed-forward networks.
#pragma once

#include "arena.h"
#include "matmul.h"

// y = x / rms(x) * scale
static void rms_norm(float* y, const float* x, const float* scale, long n, float eps) {
  Vec squares{};
  const long whole = n - n % LANES;
  for (long j = 0; j < whole; j += LANES) squares += load(x + j) * load(x + j);
  if (whole < n) squares += load_first(x + whole, n - whole) * load_first(x + whole, n - whole);
  const float inverse = 1 / std::sqrt(sum(squares) / n + eps);
  for (long j = 0; j < n; j++) y[j] = x[j] * inverse * scale[j];
}

// Rotates the pairs (2i, 2i + 1) by angles whose cosines and sines are given.
static void rotate(float* x, const float* cos, const float* sin, long dim) {
  for (long i = 0; i < dim / 2; i++) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    x[2 * i] = even * cos[i] - odd * sin[i];
    x[2 * i + 1] = even * sin[i] + odd * cos[i];
  }
}

// --- products that threads share ---
//
// A product x @ w is cut into slices of the contracted dim: weights are then read
// in the order in which they lie, by several threads even for one row of x. The
// result of a row is the sum of its slices in order, whoever has computed them.

constexpr long SLICE = 64;  // rows of weights
static inline long n_slices(long k) { return (k + SLICE - 1) / SLICE; }

struct Partial {  // sums of the slices of a product, [rows, slices, n]
  float* sums = nullptr;
  long slices = 0, n = 0;

  static Partial make(long rows, long slices, long n) {
    return {arena().make<float>(rows * slices * n), slices, n};
  }
  float* at(long row, long slice) const { return sums + (row * slices + slice) * n; }

  // y += the columns from .. to of a row's result
  void add_to(float* y, long row, long from, long to) const {
    const float* first = at(row, 0);
    long j = from;
    for (; j + LANES <= to; j += LANES) {
      Vec total = load(first + j);
      for (long s = 1; s < slices; s++) total += load(first + s * n + j);
      store(y + j - from, load(y + j - from) + total);
    }
    for (; j < to; j++) {
      float total = first[j];
      for (long s = 1; s < slices; s++) total += first[s * n + j];
      y[j - from] += total;
    }
  }
  void add_to(float* y, long row) const { add_to(y, row, 0, n); }
  void copy_to(float* y, long row, long from, long to) const {
    std::memset(y, 0, 4 * (to - from));
    add_to(y, row, from, to);
  }
};

// Slice s of x @ w, w [k, out.n], for m rows of x. Row i goes to row slots[i] of
// `out`, or to row i; the slice begins in column `at` of x.
static void multiply_slice(Rows x, long at, const float* w, long k, const Partial& out,
                           const int* slots, long m, long s) {
  Arena::Scope scope(arena());
  float** y = arena().make<float*>(m);
  for (long i = 0; i < m; i++) {
    y[i] = out.at(slots ? slots[i] : i, s);
    std::memset(y[i], 0, 4 * out.n);
  }
  multiply(x, at, w + s * SLICE * out.n, out.n, y, m, out.n, std::min(SLICE, k - s * SLICE));
}

struct Product {  // x @ w of rows in order
  Rows x;
  const float* w;
  long k, m;
  Partial out;
  long slices() const { return n_slices(k); }
  void slice(long s) const { multiply_slice(x, s * SLICE, w, k, out, nullptr, m, s); }
};

static inline Product product(Rows x, const float* w, long m, long k, long n) {
  return {x, w, k, m, Partial::make(m, n_slices(k), n)};
}

// down(silu(gate(x)) * up(x)) of the tokens of an expert, or of all tokens.
struct FeedForward {
  const float *gate_up, *down;  // [d, 2, f], [f, d]
  long d, f, m;
  Rows x;
  const int* slots;    // rows of `hidden` and `out`; null: in order
  const float* gates;  // of each row; null: 1
  Partial hidden, out;

  void up_slice(long s) const {
    multiply_slice(x, s * SLICE, gate_up, d, hidden, slots, m, s);
  }
  void down_slice(long s) const {
    Arena::Scope scope(arena());
    float** act = make_rows(m, SLICE);
    activate(hidden, slots, s, act);
    multiply_slice(act, 0, down, f, out, slots, m, s);
  }
  // The same sums, one slice after the other; the hidden state stays in the cache
  // of the processor. `out` has one slice.
  void all() const {
    Arena::Scope scope(arena());
    const Partial own = Partial::make(m, 1, 2 * f), more = Partial::make(m, 1, std::max(2 * f, d));
    for (long s = 0; s < n_slices(d); s++) {
      const Partial sums{s ? more.sums : own.sums, 1, 2 * f};
      multiply_slice(x, s * SLICE, gate_up + s * SLICE * 2 * f, d - s * SLICE, sums, nullptr, m, 0);
      for (long i = 0; s && i < m; i++) sums.add_to(own.at(i, 0), i);
    }
    float** act = make_rows(m, SLICE);
    for (long s = 0; s < n_slices(f); s++) {
      const Partial sums{more.sums, 1, d};
      activate(own, nullptr, s, act);
      if (!s) {
        multiply_slice(act, 0, down, f, out, slots, m, 0);
        continue;
      }
      multiply_slice(act, 0, down + s * SLICE * d, f - s * SLICE, sums, nullptr, m, 0);
      for (long i = 0; i < m; i++) sums.add_to(out.at(slots[i], 0), i);
    }
  }

 private:
  // gates * silu(gate(x)) * up(x), columns of slice s
  void activate(const Partial& hidden, const int* slots, long s, float** act) const {
    const long from = s * SLICE, to = std::min(f, from + SLICE);
    float gate[SLICE] = {}, up[SLICE] = {};
    for (long i = 0; i < m; i++) {
      hidden.copy_to(gate, slots ? slots[i] : i, from, to);
      hidden.copy_to(up, slots ? slots[i] : i, f + from, f + to);
      const Vec scale = Vec{} + (gates ? gates[i] : 1.f);
      for (long j = 0; j < SLICE; j += LANES) {
        const Vec a = load(gate + j);
        store(act[i] + j, scale * (a / (1.f + exp(-a))) * load(up + j));
      }
    }
  }
};
