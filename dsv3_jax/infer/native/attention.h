// Attention of a token to the latents of its text (section 2.1.1, eq. 10).
#pragma once

#include "arena.h"
#include "matmul.h"

// mixed[h] = sum_s softmax_s(query[h] . cache[s]) cache[s][..rank], of some heads,
// over the first `seen` positions of a cache [S, width]. Queries are already
// multiplied with the up-projection of keys, and scaled.
static void attend(Rows query, const float* cache, long width, long rank, long seen, OutRows mixed,
                   long heads) {
  Arena::Scope scope(arena());
  const long padded = (seen + LANES - 1) / LANES * LANES;
  float** weight = make_rows(heads, padded);
  float* total = arena().make<float>(heads);
  multiply_transposed(query, cache, width, weight, heads, seen, width);
  for (long h = 0; h < heads; h++) {
    float* w = weight[h];
    std::fill(w + seen, w + padded, -INFINITY);
    Vec tops = load(w);
    for (long s = LANES; s < padded; s += LANES) tops = tops > load(w + s) ? tops : load(w + s);
    const float top = largest(tops);
    Vec sums{};
    for (long s = 0; s < padded; s += LANES) {
      const Vec e = exp(load(w + s) - top);
      store(w + s, e);
      sums += e;
    }
    total[h] = sum(sums);
    std::memset(mixed[h], 0, 4 * rank);
  }
  multiply(weight, 0, cache, width, mixed, heads, rank, seen);
  for (long h = 0; h < heads; h++)
    for (long j = 0; j < rank; j++) mixed[h][j] /= total[h];
}
