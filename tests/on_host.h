// What the programs share that run csrc/cuda's threads on the host: arrays come through stdin and go to stdout.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

template <class T>
std::vector<T> input(long long count) {
  std::vector<T> values(count);
  if (count && std::fread(values.data(), sizeof(T), count, stdin) != (size_t)count) std::exit(3);
  return values;
}

template <class T>
void output(const std::vector<T>& values) {
  if (!values.empty()) std::fwrite(values.data(), sizeof(T), values.size(), stdout);
}

// A value that a kernel overwrites: what it leaves out cannot pass for a result.
template <class T>
std::vector<T> poisoned(long long count) {
  return std::vector<T>(count, T(0) / T(0));
}
