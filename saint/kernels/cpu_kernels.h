// Shared by the C++ kernels; see saint/cpu_kernels.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#if defined(__SSE__)
#include <immintrin.h>
#endif

static inline float dot(const float* x, const float* y, int64_t n) {
  constexpr int kLanes = 64;  // enough sums side by side to hide the latency of an addition
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
#pragma omp simd
    for (int j = 0; j < kLanes; j++) lanes[j] += x[i + j] * y[i + j];
  float sum = 0;
  for (; i < n; i++) sum += x[i] * y[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int j = 0; j < width; j++) lanes[j] += lanes[j + width];
  return sum + lanes[0];
}

// Ask for a row's first lines: the processor sees by itself that the others follow.
static inline void prefetch(const float* row, int64_t n) {
  for (int64_t i = 0; i < n && i < 128; i += 16) __builtin_prefetch(row + i);
}
