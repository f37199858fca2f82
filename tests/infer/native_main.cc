// Calls of the decode kernel from several threads over one pool, as those of
// virtual devices; the program is built with sanitizers. It prints "same" if the
// results do not depend on the number of threads, nor on what else runs.
#include "decode.cc"

#include <condition_variable>
#include <cstdio>
#include <deque>
#include <random>

// In place of XLA's pool, with a queue.
struct Pool {
  explicit Pool(int n) {
    for (int i = 0; i < n; i++) threads.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      ended = true;
    }
    changed.notify_all();
    for (auto& thread : threads) thread.join();
  }
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      changed.wait(lock, [this] { return ended || !tasks.empty(); });
      if (tasks.empty()) return;
      auto [task, data] = tasks.front();
      tasks.pop_front();
      lock.unlock();
      task(data);
    }
  }
  void add(XLA_FFI_Task* task, void* data) {
    {
      std::lock_guard<std::mutex> lock(mutex);
      tasks.push_back({task, data});
    }
    changed.notify_one();
  }

  std::vector<std::thread> threads;
  std::deque<std::pair<XLA_FFI_Task*, void*>> tasks;
  std::mutex mutex;
  std::condition_variable changed;
  bool ended = false;
};

static std::string last_error;

static XLA_FFI_Api make_api() {
  XLA_FFI_Api api{};
  api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* args) {
    last_error = args->message;
    return (XLA_FFI_Error*)&last_error;
  };
  api.XLA_FFI_ThreadPool_NumThreads = [](XLA_FFI_ThreadPool_NumThreads_Args* args) {
    *args->num_threads = ((Pool*)args->ctx)->threads.size();
    return (XLA_FFI_Error*)nullptr;
  };
  api.XLA_FFI_ThreadPool_Schedule = [](XLA_FFI_ThreadPool_Schedule_Args* args) {
    ((Pool*)args->ctx)->add(args->task, args->data);
    return (XLA_FFI_Error*)nullptr;
  };
  return api;
}

// A call with buffers of its own, each exactly as long as it must be.
struct Call {
  std::vector<std::unique_ptr<std::vector<char>>> memory;
  std::vector<std::unique_ptr<std::vector<int64_t>>> dims;
  std::deque<XLA_FFI_Buffer> buffers;
  std::deque<XLA_FFI_ByteSpan> names;
  std::deque<XLA_FFI_Scalar> scalars;
  std::deque<int64_t> integers;
  std::deque<float> floats;
  std::vector<void*> args, rets, attributes;
  std::vector<XLA_FFI_ByteSpan*> attribute_names;
  std::mt19937 random{7};

  XLA_FFI_Buffer* buffer(std::vector<int64_t> shape, XLA_FFI_DataType type, int size) {
    int64_t n = size;
    for (int64_t dim : shape) n *= dim;
    memory.push_back(std::make_unique<std::vector<char>>(n));
    dims.push_back(std::make_unique<std::vector<int64_t>>(shape));
    buffers.push_back({});
    auto& b = buffers.back();
    b.dtype = type, b.data = memory.back()->data(), b.rank = shape.size();
    b.dims = dims.back()->data();
    return &b;
  }
  float* normal(std::vector<int64_t> shape, float scale) {
    auto* b = buffer(shape, XLA_FFI_DataType_F32, 4);
    std::normal_distribution<float> draw(0, scale);
    float* values = (float*)b->data;
    for (size_t i = 0; i < memory.back()->size() / 4; i++) values[i] = draw(random);
    args.push_back(b);
    return values;
  }
  void result(std::vector<int64_t> shape, XLA_FFI_DataType type = XLA_FFI_DataType_F32) {
    rets.push_back(buffer(shape, type, 4));
  }
  void attribute(const char* name, int64_t value) {
    integers.push_back(value);
    scalar(name, &integers.back());
  }
  void attribute(const char* name, float value) {
    floats.push_back(value);
    scalar(name, &floats.back());
  }
  void scalar(const char* name, void* value) {
    names.push_back({name, std::strlen(name)});
    scalars.push_back({XLA_FFI_DataType_S64, value});
    attribute_names.push_back(&names.back());
    attributes.push_back(&scalars.back());
  }
  bool run(const XLA_FFI_Api& api, Pool* pool, XLA_FFI_Handler* handler) {
    XLA_FFI_CallFrame frame{};
    frame.api = &api, frame.ctx = (XLA_FFI_ExecutionContext*)pool;
    frame.args.size = args.size(), frame.args.args = args.data();
    frame.rets.size = rets.size(), frame.rets.rets = rets.data();
    frame.attrs.size = attributes.size(), frame.attrs.attrs = attributes.data();
    frame.attrs.names = attribute_names.data();
    return !handler(&frame);
  }
  std::vector<char> results() const {
    std::vector<char> all;
    for (void* ret : rets)
      for (auto& bytes : memory)
        if (bytes->data() == ((XLA_FFI_Buffer*)ret)->data)
          all.insert(all.end(), bytes->begin(), bytes->end());
    return all;
  }
};

// Odd sizes, so that every remainder of a vector is met.
static std::unique_ptr<Call> forward_call(int64_t b, int64_t t, int64_t q_rank) {
  auto call = std::make_unique<Call>();
  const int64_t d = 70, n = 3, rank = 21, nope = 11, rope = 6, v = 9, e = 8, f = 37, s = 20;
  auto sizes = {std::pair{"n_layers", 3L}, {"n_dense_layers", 1}, {"n_heads", n}, {"q_rank", q_rank},
                {"kv_rank", rank}, {"nope_dim", nope}, {"rope_dim", rope}, {"v_dim", v},
                {"shared_experts", 1}, {"n_experts", e}, {"top_k", 3}, {"n_groups", 4},
                {"top_groups", 2}, {"softmax", q_rank == 0}, {"renormalize", 1}};
  for (auto& [name, value] : sizes) call->attribute(name, (int64_t)value);
  for (const char* name : {"gate_scale", "norm_eps", "latent_norm_eps", "softmax_divisor"})
    call->attribute(name, name[0] == 'g' ? 2.5f : name[0] == 's' ? 4.f : 1e-6f);
  call->normal({b, t, d}, 1), call->normal({b, t, rope / 2}, 1), call->normal({b, t, rope / 2}, 1);
  auto* start = call->buffer({b}, XLA_FFI_DataType_S32, 4);
  for (int i = 0; i < b; i++) ((int32_t*)start->data)[i] = i * 5 % (s - 1);
  call->args.push_back(start);
  auto* valid = call->buffer({b, t}, XLA_FFI_DataType_PRED, 1);
  for (int i = 0; i < b * t; i++) ((bool*)valid->data)[i] = i % 7 != 3;
  call->args.push_back(valid);
  call->result({b, t, d});
  for (int l = 0; l < 3; l++) {
    call->normal({b, s, rank + rope}, 1), call->normal({d}, 1);
    if (q_rank) call->normal({d, q_rank}, .1f), call->normal({q_rank}, 1);
    call->normal({q_rank ? q_rank : d, n, nope + rope}, .2f);
    call->normal({d, rank + rope}, .1f), call->normal({rank}, 1);
    call->normal({n, nope, rank}, .2f), call->normal({n, rank, v}, .2f), call->normal({n, v, d}, .2f);
    call->normal({d}, 1);
    if (l) {
      call->normal({d, e}, .1f), call->normal({e}, .1f);
      call->normal({e, d, 2, f}, .1f), call->normal({e, f, d}, .1f);
    }
    call->normal({d, 2, f}, .1f), call->normal({f, d}, .1f);
    call->result({b, s, rank + rope});
  }
  call->result({2, e}, XLA_FFI_DataType_S32), call->result({2, b, t, 3}, XLA_FFI_DataType_S32);
  return call;
}

static std::unique_ptr<Call> logits_call(int64_t rows) {
  auto call = std::make_unique<Call>();
  call->normal({rows, 70}, 1);
  auto* valid = call->buffer({rows}, XLA_FFI_DataType_PRED, 1);
  for (int i = 0; i < rows; i++) ((bool*)valid->data)[i] = i % 5 != 1;
  call->args.push_back(valid);
  call->normal({333, 70}, 1), call->result({rows, 333});
  return call;
}

int main() {
  const XLA_FFI_Api api = make_api();
  using Make = std::unique_ptr<Call> (*)();
  const std::pair<XLA_FFI_Handler*, Make> cases[] = {
      {dsv3_forward, [] { return forward_call(1, 1, 0); }},
      {dsv3_forward, [] { return forward_call(3, 2, 33); }},
      {dsv3_forward, [] { return forward_call(17, 1, 33); }},
      {dsv3_forward, [] { return forward_call(1, 19, 0); }},
      {dsv3_logits, [] { return logits_call(1); }},
      {dsv3_logits, [] { return logits_call(11); }},
  };
  for (auto& [handler, make] : cases) {
    std::vector<char> expected;
    for (int n_threads : {1, 2, 8}) {
      Pool pool(n_threads);
      std::vector<std::thread> devices;  // more than the pool has threads
      std::vector<std::unique_ptr<Call>> calls;
      std::atomic<int> failed{0};
      for (int i = 0; i < 3; i++) calls.push_back(make());
      for (auto& call : calls)
        devices.emplace_back([&, handler = handler] {
          for (int repeat = 0; repeat < 5; repeat++) failed += !call->run(api, &pool, handler);
        });
      for (auto& device : devices) device.join();
      if (failed) return std::printf("failed: %s\n", last_error.c_str()), 1;
      for (auto& call : calls) {
        if (expected.empty()) expected = call->results();
        if (call->results() != expected) return std::printf("different with %d threads\n", n_threads), 1;
      }
    }
  }
  std::printf("same\n");
}
