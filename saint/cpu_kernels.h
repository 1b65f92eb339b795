// Shared by the C++ kernels; see saint/cpu_kernels.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#if defined(__SSE__)
#include <immintrin.h>
#endif

static inline float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; i++) sum += x[i] * y[i];
  return sum;
}
