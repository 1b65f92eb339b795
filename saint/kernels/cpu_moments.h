// Adam's moments in 8 bits: the format and the rounding stand in saint/moments.py.
#pragma once

#include <vector>

#include "cpu_kernels.h"

constexpr float kLeastScale = 1e-30f;

static inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}

static inline float unit(uint32_t half) { return ((float)(int32_t)half + 0.5f) / 65536; }

template <int kPower>
static inline float power_of(float x) {
  const float square = x * x;
  return kPower == 2 ? square : square * square;
}

// share in [0, 1], its kPower-th root, and a uniform number.
template <int kTop, int kPower>
static inline int32_t code_of(float share, float root, float uniform) {
  const int32_t low = std::min((int32_t)(root * kTop), kTop - 1);
  const float below = power_of<kPower>((float)low / kTop);
  const float above = power_of<kPower>((float)(low + 1) / kTop);
  return low + (uniform * (above - below) < share - below);
}

static inline float inverse_scale(float* scale) {
  if (*scale < kLeastScale) *scale = 0;
  return *scale > 0 ? 1 / *scale : 0;
}

// One row's moments in float32.
struct MomentRow {
  std::vector<float> m, v;

  explicit MomentRow(int64_t d) : m(d), v(d) {}

  void decode(const int8_t* first, const uint8_t* second, float scale_m, float scale_v) {
    const int64_t d = m.size();
    float *to_m = m.data(), *to_v = v.data();
#pragma omp simd
    for (int64_t i = 0; i < d; i++) {
      const float c = (float)first[i] / 127;
      to_m[i] = c * std::fabs(c) * scale_m;
      to_v[i] = power_of<4>((float)second[i] / 255) * scale_v;
    }
  }

  void encode(int8_t* first, uint8_t* second, float* scale_m, float* scale_v, uint32_t key) const {
    const int64_t d = m.size();
    const float *from_m = m.data(), *from_v = v.data();
    float largest_m = 0, largest_v = 0;
#pragma omp simd reduction(max : largest_m, largest_v)
    for (int64_t i = 0; i < d; i++) {
      largest_m = std::max(largest_m, std::fabs(from_m[i]));
      largest_v = std::max(largest_v, from_v[i]);
    }
    *scale_m = largest_m, *scale_v = largest_v;
    const float inverse_m = inverse_scale(scale_m), inverse_v = inverse_scale(scale_v);
#pragma omp simd
    for (int64_t i = 0; i < d; i++) {
      const uint32_t h = mix(key + (uint32_t)i);
      const float share_m = std::min(std::fabs(from_m[i]) * inverse_m, 1.0f);
      const float share_v = std::min(from_v[i] * inverse_v, 1.0f);
      const int32_t c = code_of<127, 2>(share_m, std::sqrt(share_m), unit(h >> 16));
      const int32_t least = share_v > 0;
      first[i] = (int8_t)(from_m[i] < 0 ? -c : c);
      second[i] = (uint8_t)std::max(
          code_of<255, 4>(share_v, std::sqrt(std::sqrt(share_v)), unit(h & 0xffff)), least);
    }
  }
};
