// The call frame of XLA's foreign function interface, by its C interface alone:
// the header for C++ takes a compiler longer than all the rest.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "xla/ffi/api/c_api.h"

class Frame {
 public:
  explicit Frame(XLA_FFI_CallFrame* frame) : frame_(frame) {}

  // A handler is asked for its version before it is used.
  bool is_version_query() const {
    auto* extension = frame_->extension_start;
    if (!extension || extension->type != XLA_FFI_Extension_Metadata) return false;
    auto* metadata = ((XLA_FFI_Metadata_Extension*)extension)->metadata;
    metadata->api_version.major_version = XLA_FFI_API_MAJOR;
    metadata->api_version.minor_version = XLA_FFI_API_MINOR;
    return true;
  }

  // The next argument, of `size` values of a type.
  template <class T = float>
  const T* next(long size, XLA_FFI_DataType dtype = XLA_FFI_DataType_F32) {
    const long i = next_++;
    if (i >= frame_->args.size) return fail("too few arguments"), nullptr;
    const auto* buffer = (XLA_FFI_Buffer*)frame_->args.args[i];
    long found = 1;
    for (long d = 0; d < buffer->rank; d++) found *= buffer->dims[d];
    if (found != size || buffer->dtype != dtype)
      fail("argument " + std::to_string(i) + " has " + std::to_string(found) + " values of type " +
           std::to_string(buffer->dtype) + " in place of " + std::to_string(size) + " of type " +
           std::to_string(dtype));
    return (const T*)buffer->data;
  }
  // A dim of the argument `ahead` after the next one.
  long dim(long i, long ahead = 0) const {
    if (next_ + ahead >= frame_->args.size) return 0;
    const auto* buffer = (XLA_FFI_Buffer*)frame_->args.args[next_ + ahead];
    return i < buffer->rank ? buffer->dims[i] : 0;
  }
  bool has_read_all() const { return next_ == frame_->args.size; }

  template <class T = float>
  T* result(long i) const {
    return (T*)((XLA_FFI_Buffer*)frame_->rets.rets[i])->data;
  }

  template <class T>
  T attribute(const char* name) {
    for (long i = 0; i < frame_->attrs.size; i++) {
      const auto* span = frame_->attrs.names[i];
      if (std::strlen(name) == span->len && !std::memcmp(name, span->ptr, span->len))
        return *(T*)((XLA_FFI_Scalar*)frame_->attrs.attrs[i])->value;
    }
    return fail(std::string("no attribute ") + name), T();
  }
  long integer(const char* name) { return attribute<int64_t>(name); }
  float number(const char* name) { return attribute<float>(name); }

  bool failed() const { return !error_.empty(); }
  void fail(const std::string& error) {
    if (error_.empty()) error_ = error;
  }
  XLA_FFI_Error* error() const {
    if (!failed()) return nullptr;
    XLA_FFI_Error_Create_Args args{};
    args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
    args.message = error_.c_str();
    args.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
    return frame_->api->XLA_FFI_Error_Create(&args);
  }

  // Threads of XLA's pool; 1 where there is none.
  long n_threads() const {
    int64_t n = 1;
    XLA_FFI_ThreadPool_NumThreads_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE;
    args.ctx = frame_->ctx;
    args.num_threads = &n;
    return ok(frame_->api->XLA_FFI_ThreadPool_NumThreads(&args)) ? n : 1;
  }
  bool schedule(XLA_FFI_Task* task, void* data) const {
    XLA_FFI_ThreadPool_Schedule_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
    args.ctx = frame_->ctx;
    args.task = task;
    args.data = data;
    return ok(frame_->api->XLA_FFI_ThreadPool_Schedule(&args));
  }

 private:
  bool ok(XLA_FFI_Error* error) const {
    if (!error) return true;
    XLA_FFI_Error_Destroy_Args args{};
    args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
    args.error = error;
    frame_->api->XLA_FFI_Error_Destroy(&args);
    return false;
  }

  XLA_FFI_CallFrame* frame_;
  long next_ = 0;
  std::string error_;
};
