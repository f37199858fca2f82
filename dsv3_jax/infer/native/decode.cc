// Transformer layers for the few tokens of a decode step, in float32.
//
// One call computes all layers: every weight is read once, where it lies,
// whatever the number of tokens. The numbers of a token depend neither on which
// others are there nor on the number of threads, see matmul.h and layers.h.
// Tokens that are not valid cost nothing: their states stay as they are, and
// nothing is written to the cache. Equations are those of arXiv:2412.19437.
#include <optional>

#include "attention.h"
#include "ffi_frame.h"
#include "layers.h"
#include "router.h"
#include "threads.h"

struct Model {
  long d, n_heads, q_rank, rank, nope, rope, v;
  long n_layers, n_dense_layers;
  bool shared_experts;
  Router router;
  float eps, latent_eps, divisor;

  long qk() const { return nope + rope; }
  long width() const { return rank + rope; }  // of the cache
};

// The parameters of a layer, with its cache, as they lie in their arrays.
struct Layer {
  const float *attention_norm, *q_down, *q_norm, *q_up, *kv_down, *kv_norm, *up_k, *up_v, *out;
  const float *ffn_norm, *gate_up, *down;  // of the dense network, or shared experts
  const float *router = nullptr, *bias, *expert_gate_up, *expert_down;
  long f = 0, expert_f = 0;
  float* cache;
  int32_t *load, *experts;
};

// One call: the tokens that are valid, and what the phases of a layer hand on.
class Forward {
 public:
  explicit Forward(Frame& frame) : frame_(frame), scope_(arena()) {
    read_model();
    read_tokens();
    for (long l = 0; l < c.n_layers && !frame.failed(); l++) layers_.push_back(read_layer(l));
    if (!frame.has_read_all()) frame.fail("too many arguments");
  }

  void run() {
    Threads threads(frame_);
    threads_ = &threads;
    make_buffers();
    for (const Layer& layer : layers_) {
      attention(layer);
      feed_forward(layer);
    }
    threads.each("residual", m, [&](long i) { add_feed_forward(i); });
  }
  long n_tokens() const { return m; }

 private:
  // Attributes, and what the shapes of x and of the first layer tell.
  void read_model() {
    b = frame_.dim(0), t = frame_.dim(1), c.d = frame_.dim(2);
    c.n_layers = frame_.integer("n_layers");
    c.n_dense_layers = frame_.integer("n_dense_layers");
    c.n_heads = frame_.integer("n_heads");
    c.q_rank = frame_.integer("q_rank");
    c.rank = frame_.integer("kv_rank");
    c.nope = frame_.integer("nope_dim");
    c.rope = frame_.integer("rope_dim");
    c.v = frame_.integer("v_dim");
    c.shared_experts = frame_.integer("shared_experts");
    c.router.n_experts = frame_.integer("n_experts");
    c.router.top_k = frame_.integer("top_k");
    c.router.n_groups = frame_.integer("n_groups");
    c.router.top_groups = frame_.integer("top_groups");
    c.router.softmax = frame_.integer("softmax");
    c.router.renormalize = frame_.integer("renormalize");
    c.router.scale = frame_.number("gate_scale");
    c.eps = frame_.number("norm_eps");
    c.latent_eps = frame_.number("latent_norm_eps");
    c.divisor = frame_.number("softmax_divisor");
  }

  // Tokens [b, t]: states, angles, positions; result 0 are the states.
  void read_tokens() {
    const float* x = frame_.next(b * t * c.d);
    cos = frame_.next(b * t * c.rope / 2);
    sin = frame_.next(b * t * c.rope / 2);
    const int32_t* start = frame_.next<int32_t>(b, XLA_FFI_DataType_S32);
    const bool* valid = frame_.next<bool>(b * t, XLA_FFI_DataType_PRED);
    length = frame_.dim(1);
    if (frame_.failed()) return;
    float* y = frame_.result(0);
    if (x != y) std::memcpy(y, x, 4 * b * t * c.d);
    token = arena().make<long>(b * t), position = arena().make<long>(b * t);
    state = make_rows(y, b * t, c.d);
    for (long i = 0; i < b * t; i++)
      if (valid[i]) {
        token[m] = i, position[m] = start[i / t] + i % t, state[m] = y + i * c.d;
        m++;
      }
  }

  // Results 1 .. n_layers are the caches; loads of experts, and the experts of
  // each token, n_experts of one that is not valid, are behind them.
  Layer read_layer(long l) {
    Layer p;
    const long n = c.n_heads;
    const float* kept = frame_.next(b * length * c.width());
    p.cache = frame_.result(1 + l);
    if (kept != p.cache && !frame_.failed())
      std::memcpy(p.cache, kept, 4 * b * length * c.width());
    p.attention_norm = frame_.next(c.d);
    p.q_down = c.q_rank ? frame_.next(c.d * c.q_rank) : nullptr;
    p.q_norm = c.q_rank ? frame_.next(c.q_rank) : nullptr;
    p.q_up = frame_.next((c.q_rank ? c.q_rank : c.d) * n * c.qk());
    p.kv_down = frame_.next(c.d * c.width());
    p.kv_norm = frame_.next(c.rank);
    p.up_k = frame_.next(n * c.nope * c.rank);
    p.up_v = frame_.next(n * c.rank * c.v);
    p.out = frame_.next(n * c.v * c.d);
    p.ffn_norm = frame_.next(c.d);
    const bool routed = l >= c.n_dense_layers;
    if (routed) {
      const long e = c.router.n_experts;
      p.router = frame_.next(c.d * e);
      p.bias = frame_.next(e);
      p.expert_f = frame_.dim(3);
      p.expert_gate_up = frame_.next(e * c.d * 2 * p.expert_f);
      p.expert_down = frame_.next(e * p.expert_f * c.d);
      p.load = frame_.result<int32_t>(1 + c.n_layers) + (l - c.n_dense_layers) * e;
      const long n_choices = b * t * c.router.top_k;
      p.experts = frame_.result<int32_t>(2 + c.n_layers) + (l - c.n_dense_layers) * n_choices;
      if (!frame_.failed()) std::fill_n(p.load, e, 0), std::fill_n(p.experts, n_choices, e);
    }
    if (!routed || c.shared_experts) {
      p.f = frame_.dim(2);
      p.gate_up = frame_.next(c.d * 2 * p.f);
      p.down = frame_.next(p.f * c.d);
    }
    return p;
  }

  void make_buffers() {
    normed = make_rows(m, c.d);
    q_latent = make_rows(m, std::max(c.q_rank, 1L));
    query = make_rows(m * c.n_heads, c.width());
    mixed = make_rows(m * c.n_heads, c.rank);
    value = make_rows(m, c.n_heads * c.v);
    chosen = arena().make<int>(m * c.router.top_k);
    gates = arena().make<float>(m * c.router.top_k);
  }

  void run_slices(const char* phase, std::initializer_list<Product> products) {
    long n = 0;
    for (const Product& product : products) n += product.slices();
    threads_->each(phase, n, [&](long i) {
      for (const Product& product : products) {
        if (i < product.slices()) return product.slice(i);
        i -= product.slices();
      }
    });
  }

  // x += out(attention(norm(x)))
  void attention(const Layer& p) {
    Arena::Scope scope(arena());
    threads_->each("norm", m, [&](long i) {
      add_feed_forward(i);
      rms_norm(normed[i], state[i], p.attention_norm, c.d, c.eps);
    });
    const long n = c.n_heads;
    const Product kv = product(normed, p.kv_down, m, c.d, c.width());
    Product q = c.q_rank ? product(normed, p.q_down, m, c.d, c.q_rank)
                         : product(normed, p.q_up, m, c.d, n * c.qk());
    run_slices("down", {q, kv});
    threads_->each("latents", m, [&](long i) {
      if (c.q_rank) {  // eq. 6
        q.out.copy_to(q_latent[i], i, 0, c.q_rank);
        rms_norm(q_latent[i], q_latent[i], p.q_norm, c.q_rank, c.latent_eps);
      }
      if (position[i] < length) write_cache(p, kv, i);
    });
    if (c.q_rank) {
      q = product(q_latent, p.q_up, m, c.q_rank, n * c.qk());
      run_slices("q_up", {q});
    }
    threads_->each("absorb", n, [&](long head) { make_queries(p, q, head); });
    // Heads of a token read the same latents; they are apart only for one token.
    const long parts = m < threads_->count ? std::min(n, threads_->count) : 1;
    threads_->each("attend", m * parts, [&](long item) {
      const long i = item / parts, part = item % parts;
      const long from = part * n / parts, to = (part + 1) * n / parts;
      const float* of_text = p.cache + token[i] / t * length * c.width();
      attend(query + i * n + from, of_text, c.width(), c.rank, std::min(position[i] + 1, length),
             mixed + i * n + from, to - from);
    });
    threads_->each("values", n, [&](long head) { make_values(p, head); });
    const Product out = product(value, p.out, m, n * c.v, c.d);
    run_slices("out", {out});
    threads_->each("norm", m, [&](long i) {
      out.out.add_to(state[i], i);
      rms_norm(normed[i], state[i], p.ffn_norm, c.d, c.eps);
    });
  }

  const float* cos_of(long i) const { return cos + token[i] * c.rope / 2; }
  const float* sin_of(long i) const { return sin + token[i] * c.rope / 2; }

  // The latent and the rotated key of a token (eq. 1, 3).
  void write_cache(const Layer& p, const Product& kv, long i) {
    float* to = p.cache + (token[i] / t * length + position[i]) * c.width();
    kv.out.copy_to(to, i, 0, c.width());
    rms_norm(to, to, p.kv_norm, c.rank, c.latent_eps);
    rotate(to + c.rank, cos_of(i), sin_of(i), c.rope);
  }

  // Queries of a head against the cache: the up-projection of keys is absorbed.
  void make_queries(const Layer& p, const Product& q, long head) {
    Arena::Scope scope(arena());
    float** own = make_rows(m, c.qk());
    float** absorbed = arena().make<float*>(m);
    for (long i = 0; i < m; i++) {
      q.out.copy_to(own[i], i, head * c.qk(), (head + 1) * c.qk());
      absorbed[i] = query[i * c.n_heads + head];
      std::memset(absorbed[i], 0, 4 * c.rank);
      std::memcpy(absorbed[i] + c.rank, own[i] + c.nope, 4 * c.rope);
      rotate(absorbed[i] + c.rank, cos_of(i), sin_of(i), c.rope);
    }
    const float* w = p.up_k + head * c.nope * c.rank;
    multiply(own, 0, w, c.rank, absorbed, m, c.rank, c.nope);
    for (long i = 0; i < m; i++)
      for (long j = 0; j < c.width(); j++) absorbed[i][j] /= c.divisor;
  }

  // Values of a head: the up-projection behind the weighted sum.
  void make_values(const Layer& p, long head) {
    Arena::Scope scope(arena());
    float** y = arena().make<float*>(m);
    float** x = arena().make<float*>(m);
    for (long i = 0; i < m; i++) {
      x[i] = mixed[i * c.n_heads + head];
      y[i] = value[i] + head * c.v;
      std::memset(y[i], 0, 4 * c.v);
    }
    multiply(x, 0, p.up_v + head * c.rank * c.v, c.v, y, m, c.v, c.rank);
  }

  // The feed-forward network, or experts: their outputs are added to the states
  // at the beginning of the next phase.
  void feed_forward(const Layer& p) {
    // Buffers of the layer before were read in `attention`.
    ffn_scope_.emplace(arena());
    const long k = c.router.top_k;
    FeedForward own{p.gate_up, p.down, c.d, p.f, m, normed, nullptr, nullptr, {}, {}};
    if (p.f) {
      own.hidden = Partial::make(m, n_slices(c.d), 2 * p.f);
      own.out = Partial::make(m, n_slices(p.f), c.d);
    }
    own_out_ = own.out, routed_out_ = {};
    const long own_up = p.f ? n_slices(c.d) : 0, own_down = p.f ? n_slices(p.f) : 0;
    Product affinity{};
    if (p.router) affinity = product(normed, p.router, m, c.d, c.router.n_experts);
    const long router_slices = affinity.slices();
    threads_->each("own up", router_slices + own_up, [&](long i) {
      if (i < router_slices) return affinity.slice(i);
      own.up_slice(i - router_slices);
    });
    if (!p.router)
      return threads_->each("own down", own_down, [&](long i) { own.down_slice(i); });
    threads_->each("route", m, [&](long i) {
      Arena::Scope scope(arena());
      float* scores = arena().make<float>(c.router.n_experts);
      affinity.out.copy_to(scores, i, 0, c.router.n_experts);
      c.router.choose(scores, p.bias, chosen + i * k, gates + i * k);
      std::copy_n(chosen + i * k, k, p.experts + token[i] * k);
    });
    experts(p, own, own_down);
  }

  void experts(const Layer& p, const FeedForward& own, long own_down) {
    const long n = c.router.n_experts, k = c.router.top_k, f = p.expert_f;
    const ByExpert by = ByExpert::make(chosen, gates, m, k, n);
    const bool whole = m * k >= 16;  // an expert is an item of its own
    routed_out_ = Partial::make(m * k, whole ? 1 : n_slices(f), c.d);
    Partial hidden;
    if (!whole) hidden = Partial::make(m * k, n_slices(c.d), 2 * f);
    FeedForward* used = arena().make<FeedForward>(std::min(n, m * k));
    long n_used = 0;
    for (long e = 0; e < n; e++) {
      const long first = by.first[e], count = by.first[e + 1] - first;
      p.load[e] = count;
      if (!count) continue;
      const float** x = arena().make<const float*>(count);
      for (long i = 0; i < count; i++) x[i] = normed[by.token[first + i]];
      const float *gate_up = p.expert_gate_up + e * c.d * 2 * f, *down = p.expert_down + e * f * c.d;
      used[n_used++] = {gate_up, down, c.d, f, count, x, by.slot + first, by.gate + first,
                        hidden, routed_out_};
    }
    if (whole)
      return threads_->each("experts", own_down + n_used, [&](long i) {
        if (i < own_down) return own.down_slice(i);
        used[i - own_down].all();
      });
    const long ups = n_slices(c.d), downs = n_slices(f);
    threads_->each("expert up", n_used * ups, [&](long i) { used[i / ups].up_slice(i % ups); });
    threads_->each("expert down", own_down + n_used * downs, [&](long i) {
      if (i < own_down) return own.down_slice(i);
      i -= own_down;
      used[i / downs].down_slice(i % downs);
    });
  }

  void add_feed_forward(long i) {
    if (own_out_.n) own_out_.add_to(state[i], i);
    for (long j = 0; routed_out_.n && j < c.router.top_k; j++)
      routed_out_.add_to(state[i], i * c.router.top_k + j);
  }

  Frame& frame_;
  Arena::Scope scope_;
  std::vector<Layer> layers_;
  Threads* threads_ = nullptr;
  Model c;
  long b, t, length = 0, m = 0;  // texts, tokens of each, positions of a cache, valid tokens
  const float *cos, *sin;
  // Of each valid token: its index in [b, t], its position, its state.
  long *token, *position;
  float **state, **normed, **q_latent, **query, **mixed, **value;
  int* chosen;
  float* gates;
  std::optional<Arena::Scope> ffn_scope_;
  Partial own_out_, routed_out_;
};

// Logits of valid rows, x @ head.T; those of others are 0.
static void logits(Frame& frame) {
  const long rows = frame.dim(0), d = frame.dim(1);
  const float* x = frame.next(rows * d);
  const bool* valid = frame.next<bool>(rows, XLA_FFI_DataType_PRED);
  const long n_classes = frame.dim(0);
  const float* head = frame.next(n_classes * d);
  if (frame.failed()) return;
  float* y = frame.result(0);
  Arena::Scope scope(arena());
  const float** in = arena().make<const float*>(rows);
  float** out = arena().make<float*>(rows);
  long m = 0;
  for (long i = 0; i < rows; i++) {
    if (valid[i])
      in[m] = x + i * d, out[m++] = y + i * n_classes;
    else
      std::fill_n(y + i * n_classes, n_classes, 0);
  }
  if (!m) return;
  constexpr long BLOCK = 64;  // classes of an item
  Threads threads(frame);
  threads.each("head", (n_classes + BLOCK - 1) / BLOCK, [&](long i) {
    Arena::Scope scope(arena());
    float** columns = arena().make<float*>(m);
    for (long r = 0; r < m; r++) columns[r] = out[r] + i * BLOCK;
    const long n = std::min(BLOCK, n_classes - i * BLOCK);
    multiply_transposed(in, head + i * BLOCK * d, d, columns, m, n, d);
  });
}

extern "C" XLA_FFI_Error* dsv3_forward(XLA_FFI_CallFrame* call) {
  Frame frame(call);
  if (frame.is_version_query()) return nullptr;
  Forward forward(frame);
  if (!frame.failed() && forward.n_tokens()) forward.run();
  return frame.error();
}

extern "C" XLA_FFI_Error* dsv3_logits(XLA_FFI_CallFrame* call) {
  Frame frame(call);
  if (!frame.is_version_query()) logits(frame);
  return frame.error();
}

// Both products of x [m, k], with w [k, n] and with v [n, k], to [m, n] each: a
// library is tried with it before it is used.
extern "C" void dsv3_products(const float* x, const float* w, const float* v, float* y, float* z,
                              int64_t m, int64_t n, int64_t k) {
  Arena::Scope scope(arena());
  float **in = make_rows((float*)x, m, k), **out = make_rows(y, m, n);
  std::fill_n(y, m * n, 0.f);
  multiply(in, 0, w, n, out, m, n, k);
  multiply_transposed(in, v, k, make_rows(z, m, n), m, n, k);
}
