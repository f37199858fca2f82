// Time of each phase of the calls of a process, printed when it ends; only in a
// library that CXX="g++ -DPROFILE" has built.
#pragma once

#include <chrono>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>

class Timer {
 public:
  explicit Timer(const char* phase) : phase_(phase) {}
  ~Timer() {
    const std::chrono::duration<double, std::micro> us = std::chrono::steady_clock::now() - start_;
    static Table table;
    std::lock_guard<std::mutex> lock(table.mutex);
    auto& [count, total] = table.phases[phase_];
    count++, total += us.count();
  }

 private:
  struct Table {
    std::mutex mutex;
    std::map<std::string, std::pair<long, double>> phases;
    ~Table() {
      for (auto& [phase, found] : phases)
        std::fprintf(stderr, "%-12s %8ld x %9.2f us\n", phase.c_str(), found.first,
                     found.second / found.first);
    }
  };
  const char* phase_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};
