// Expert choice (section 2.1.2 of arXiv:2412.19437, eq. 12-16).
#pragma once

#include <functional>
#include <limits>

#include "arena.h"
#include "vector.h"

struct Router {
  long n_experts, top_k, n_groups, top_groups;
  bool softmax, renormalize;
  float scale;

  // Scores of experts in place of their affinities.
  void score(float* s) const {
    if (softmax) {
      const float top = *std::max_element(s, s + n_experts);
      float total = 0;
      for (long e = 0; e < n_experts; e++) total += s[e] = exp1(s[e] - top);
      for (long e = 0; e < n_experts; e++) s[e] /= total;
    } else {
      for (long e = 0; e < n_experts; e++) s[e] = 1 / (1 + exp1(-s[e]));
    }
  }

  // The top_k experts of a token, with their gates. Bias and groups act on the
  // choice alone; the lower index wins where two are equal.
  void choose(float* scores, const float* bias, int* chosen, float* gates) const {
    Arena::Scope scope(arena());
    score(scores);
    float* biased = arena().make<float>(n_experts);
    for (long e = 0; e < n_experts; e++) biased[e] = scores[e] + bias[e];
    if (n_groups > 1) limit_to_groups(biased);
    float total = 0;
    for (long k = 0; k < top_k; k++) {
      chosen[k] = take_largest(biased, n_experts);
      total += gates[k] = scores[chosen[k]];
    }
    for (long k = 0; k < top_k; k++)
      gates[k] = scale * (renormalize ? gates[k] / (total + 1e-18f) : gates[k]);
  }

 private:
  static constexpr float NONE = -std::numeric_limits<float>::infinity();

  static long take_largest(float* values, long n) {
    const long best = std::max_element(values, values + n) - values;
    values[best] = NONE;
    return best;
  }

  // -inf for experts outside of the top_groups groups, which rank by the sum of
  // their two best experts, with softmax by the best one.
  void limit_to_groups(float* biased) const {
    const long size = n_experts / n_groups, n_best = std::min<long>(softmax ? 1 : 2, size);
    float* rank = arena().make<float>(n_groups);
    float* sorted = arena().make<float>(size);
    for (long g = 0; g < n_groups; g++) {
      std::copy_n(biased + g * size, size, sorted);
      std::partial_sort(sorted, sorted + n_best, sorted + size, std::greater<float>());
      rank[g] = 0;
      for (long i = 0; i < n_best; i++) rank[g] += sorted[i];
    }
    bool* selected = arena().make<bool>(n_groups);
    std::fill_n(selected, n_groups, false);
    for (long i = 0; i < top_groups; i++) selected[take_largest(rank, n_groups)] = true;
    for (long e = 0; e < n_experts; e++)
      if (!selected[e / size]) biased[e] = NONE;
  }
};

// The choices of all tokens by expert: slot i * top_k + j is choice j of token i.
struct ByExpert {
  int *first;  // [E + 1] of the lists below
  int *token, *slot;
  float* gate;

  static ByExpert make(const int* chosen, const float* gates, long m, long top_k, long n_experts) {
    const long n = m * top_k;
    ByExpert by{arena().make<int>(n_experts + 1), arena().make<int>(n), arena().make<int>(n),
                arena().make<float>(n)};
    std::fill_n(by.first, n_experts + 1, 0);
    for (long i = 0; i < n; i++) by.first[chosen[i] + 1]++;
    for (long e = 0; e < n_experts; e++) by.first[e + 1] += by.first[e];
    int* next = arena().make<int>(n_experts);
    std::copy_n(by.first, n_experts, next);
    for (long i = 0; i < n; i++) {
      const int at = next[chosen[i]]++;
      by.token[at] = i / top_k, by.slot[at] = i, by.gate[at] = gates[i];
    }
    return by;
  }
};
