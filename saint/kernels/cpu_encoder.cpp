// The encoder's exact selection: top-k of float32 pre-activations without sorting, and of a cheap
// product of small whole numbers whose candidates are scored again in float32.
//
// Rows x are rounded to x̃ = scale · q with whole numbers q, so that a product of two rows errs by
// about σ² = (‖a − ã‖² ‖w‖² + ‖w − w̃‖² ‖a‖²) / d. Every latent whose rounded
// pre-activation could, with an error of 6σ, be among a token's k largest is scored exactly. A
// token falls back to the float32 product (the caller does it) when its k-th exact value does not
// stand clear of what was left out, or when any candidate erred by more than 6σ.

#include <cstring>
#include <functional>
#include <limits>
#include <utility>
#include <vector>

#include "cpu_kernels.h"

namespace {

constexpr float kSigmas = 6;
constexpr float kSlack = 1.5f;  // σ that the exact k-th value may lie below the rounded one
constexpr int64_t kStep = 64;   // rows of bytes are padded to multiples of this

// Largest |q| of the encoder's input and of its weights. Without VNNI products of bytes are summed
// in 16 bits: four pairs of 127 · 31 fit.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int kInputLevels = 127, kWeightLevels = 127;
#define SAINT_ROUNDED_PRODUCT 1
#elif defined(__AVX2__)
constexpr int kInputLevels = 63, kWeightLevels = 31;
#define SAINT_ROUNDED_PRODUCT 1
#else
constexpr int kInputLevels = 63, kWeightLevels = 31;
#define SAINT_ROUNDED_PRODUCT 0
#endif
constexpr int kInputOffset = kInputLevels + 1;  // the instructions want one side unsigned

// The k largest of pre + bias: groups' maxima first, then only the groups that can matter.
class TopK {
 public:
  using Entry = std::pair<float, int32_t>;

  TopK(int64_t n, int64_t k) : n_(n), k_(k) {
    while (group_ < 128 && n / (group_ * 2) >= 8 * k) group_ *= 2;
    maxima_.resize((n + group_ - 1) / group_);
  }

  // Find the k largest; returns the k-th, or -inf where there are fewer numbers than k.
  float find(const float* pre, const float* bias) {
    const float threshold = group_maxima(pre, bias);
    found_.clear();
    for_each_above(pre, bias, threshold, threshold, [this](float value, int64_t i) {
      found_.emplace_back(value, (int32_t)i);
    });
    return keep_largest(found_);
  }

  // Call visit(value, i) for values ≥ threshold, in groups whose maximum is ≥ group_threshold.
  template <typename Visit>
  void for_each_above(const float* pre, const float* bias, float group_threshold, float threshold,
                      Visit visit) const {
    for (size_t g = 0; g < maxima_.size(); g++) {
      if (maxima_[g] < group_threshold) continue;
      const int64_t end = std::min(n_, (int64_t)(g + 1) * group_);
      for (int64_t i = g * group_; i < end; i++) {
        const float value = pre[i] + bias[i];
        if (value >= threshold) visit(value, i);
      }
    }
  }

  // Move the k largest to the front, of equals the first latents; returns the k-th.
  float keep_largest(std::vector<Entry>& entries) const {
    if ((int64_t)entries.size() < k_) return -std::numeric_limits<float>::infinity();
    std::nth_element(entries.begin(), entries.begin() + (k_ - 1), entries.end(),
                     [](const Entry& x, const Entry& y) {
                       return x.first != y.first ? x.first > y.first : x.second < y.second;
                     });
    return entries[k_ - 1].first;
  }

  // Fewer than k numbers: the others are NaN, and so will be the loss.
  void write(const std::vector<Entry>& entries, float* values, int32_t* indices) const {
    for (int64_t j = 0; j < k_; j++) {
      const bool there = j < (int64_t)entries.size();
      values[j] = there ? std::max(entries[j].first, 0.0f) : std::nanf("");
      indices[j] = there ? entries[j].second : 0;
    }
  }

  const std::vector<Entry>& found() const { return found_; }

 private:
  // At least k elements are ≥ the k-th largest maximum of the groups.
  float group_maxima(const float* pre, const float* bias) {
    const float lowest = -std::numeric_limits<float>::infinity();
    for (size_t g = 0; g < maxima_.size(); g++) {
      const int64_t start = g * group_, count = std::min(group_, n_ - start);
      float best = lowest;
      const float *p = pre + start, *b = bias + start;
#pragma omp simd reduction(max : best)
      for (int64_t i = 0; i < count; i++) best = std::max(best, p[i] + b[i]);
      maxima_[g] = best;
    }
    if ((int64_t)maxima_.size() <= k_) return lowest;
    sorted_ = maxima_;
    std::nth_element(sorted_.begin(), sorted_.begin() + (k_ - 1), sorted_.end(),
                     std::greater<float>());
    return sorted_[k_ - 1];
  }

  int64_t n_, k_, group_ = 16;
  std::vector<float> maxima_, sorted_;
  std::vector<Entry> found_;
};

// Call visit(value, i) for every value pre[i] + bias[i] ≥ low.
template <typename Visit>
void for_each_reaching(const float* pre, const float* bias, int64_t n, float low, Visit visit) {
  constexpr int64_t kGroup = 32;
  for (int64_t start = 0; start < n; start += kGroup) {
    const int64_t end = std::min(n, start + kGroup);
    float best = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : best)
    for (int64_t i = start; i < end; i++) best = std::max(best, pre[i] + bias[i]);
    if (best < low) continue;
    for (int64_t i = start; i < end; i++)
      if (pre[i] + bias[i] >= low) visit(pre[i] + bias[i], i);
  }
}

// Each token's entries, until the caller has room for them: `saint_take` copies and frees them.
using Found = std::vector<std::vector<TopK::Entry>>;

#if SAINT_ROUNDED_PRODUCT
// Compilers like to load an operand again for every product: this keeps it in its register.
#define SAINT_IN_REGISTER(x) asm("" : "+x"(x))

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#undef SAINT_IN_REGISTER
#define SAINT_IN_REGISTER(x) asm("" : "+v"(x))
constexpr int kTokens = 4, kLatents = 4;
using Sums = __m512i;

inline Sums zero() { return _mm512_setzero_si512(); }
inline int32_t total(Sums sums) { return _mm512_reduce_add_epi32(sums); }

// Add the products of kStep bytes of each row.
template <int T, int L, int kBytes>
inline void add_products(Sums (&sums)[T][L], const uint8_t* a, const int8_t* w, int64_t stride) {
  static_assert(kBytes == kStep);
  Sums x[T];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
    x[t] = _mm512_loadu_si512(a + t * stride);
    SAINT_IN_REGISTER(x[t]);
  }
#pragma GCC unroll 4
  for (int l = 0; l < L; l++) {
    Sums y = _mm512_loadu_si512(w + l * stride);
    SAINT_IN_REGISTER(y);
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) sums[t][l] = _mm512_dpbusd_epi32(sums[t][l], x[t], y);
  }
}
constexpr int64_t kLongStep = kStep;
#else
constexpr int kTokens = 4, kLatents = 2;
using Sums = __m256i;

inline Sums zero() { return _mm256_setzero_si256(); }
inline int32_t total(Sums sums) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

// Add the products of kBytes bytes of each row: in 16 bits, then once in 32.
template <int T, int L, int kBytes>
inline void add_products(Sums (&sums)[T][L], const uint8_t* a, const int8_t* w, int64_t stride) {
  Sums pairs[T][L];
#pragma GCC unroll 4
  for (int i = 0; i < kBytes; i += 32) {
    Sums x[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) {
      x[t] = _mm256_loadu_si256((const __m256i*)(a + t * stride + i));
      SAINT_IN_REGISTER(x[t]);
    }
#pragma GCC unroll 4
    for (int l = 0; l < L; l++) {
      Sums y = _mm256_loadu_si256((const __m256i*)(w + l * stride + i));
      SAINT_IN_REGISTER(y);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) {
        const Sums products = _mm256_maddubs_epi16(x[t], y);
        pairs[t][l] = i ? _mm256_add_epi16(pairs[t][l], products) : products;
        SAINT_IN_REGISTER(pairs[t][l]);
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++)
#pragma GCC unroll 4
    for (int l = 0; l < L; l++) {
      const Sums wide = _mm256_madd_epi16(pairs[t][l], _mm256_set1_epi16(1));
      sums[t][l] = _mm256_add_epi32(sums[t][l], wide);
    }
}
constexpr int64_t kLongStep = 2 * kStep;
#endif

// sums[t][l] = Σ a[t] · w[l] over `stride` bytes, a multiple of kStep.
template <int T, int L>
void tile(const uint8_t* a, const int8_t* w, int64_t stride, int32_t* sums, int64_t sums_stride) {
  Sums s[T][L];
  for (int t = 0; t < T; t++)
    for (int l = 0; l < L; l++) s[t][l] = zero();
  int64_t i = 0;
  for (; i + kLongStep <= stride; i += kLongStep)
    add_products<T, L, kLongStep>(s, a + i, w + i, stride);
  if (i < stride) add_products<T, L, kStep>(s, a + i, w + i, stride);
  for (int t = 0; t < T; t++)
    for (int l = 0; l < L; l++) sums[t * sums_stride + l] = total(s[t][l]);
}
#endif

// A Walsh-Hadamard transform over 64 places each `n / 64` apart: orthogonal, so products stay what
// they are, while a few large entries are spread over many and rounding errs like noise.
void rotate(float* x, int64_t n) {
  for (int64_t half = n / 2; half >= n / kStep; half /= 2)
    for (int64_t start = 0; start < n; start += 2 * half) {
      float *low = x + start, *high = low + half;
#pragma omp simd
      for (int64_t i = 0; i < half; i++) {
        const float sum = low[i] + high[i];
        high[i] = low[i] - high[i];
        low[i] = sum;
      }
    }
#pragma omp simd
  for (int64_t i = 0; i < n; i++) x[i] *= 0.125f;
}

}  // namespace

extern "C" {

// Rows (n, stride) of whole numbers with what the error bound needs of each row x.
struct Rounded {
  int64_t stride;
  uint8_t* q;  // int8, or for the encoder's input uint8 with kInputOffset added
  float* scale;
  float* square;  // ‖x‖²
  float* error;   // ‖x − x̃‖²
  int32_t* sum;   // Σ q
};

// Whether this CPU has instructions that make the rounded product worth while.
int64_t saint_has_rounded_product(int64_t /* threads */) { return SAINT_ROUNDED_PRODUCT; }

int64_t saint_input_offset(int64_t /* threads */) { return kInputOffset; }

// Round rows x (n, d), of the encoder's input or of its weights, after one rotation of both.
void saint_round(int64_t n, int64_t d, int64_t is_input, const float* x, const Rounded* to,
                 int64_t threads) {
  const int levels = is_input ? kInputLevels : kWeightLevels, add = is_input ? kInputOffset : 0;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(to->stride);
    float* row = buffer.data();
#pragma omp for schedule(dynamic, 64)
    for (int64_t r = 0; r < n; r++) {
      std::fill(std::copy_n(x + r * d, d, row), row + to->stride, 0.0f);
      rotate(row, to->stride);
      float largest = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < to->stride; i++) largest = std::max(largest, std::fabs(row[i]));
      const float scale = largest / levels, inverse = largest > 0 ? levels / largest : 0;
      float square = 0, error = 0;
      int32_t sum = 0;
      uint8_t* q = to->q + r * to->stride;
#pragma omp simd reduction(+ : square, error, sum)
      for (int64_t i = 0; i < to->stride; i++) {
        const float rounded = std::nearbyint(row[i] * inverse), off = row[i] - scale * rounded;
        const int32_t whole = (int32_t)rounded;
        square += row[i] * row[i];
        error += off * off;
        sum += whole;
        q[i] = (uint8_t)(whole + add);
      }
      to->scale[r] = scale;
      to->square[r] = square;
      to->error[r] = error;
      to->sum[r] = sum;
    }
  }
}

// pre (n_tokens, n_latents) = the product of rounded rows a and w.
void saint_rounded_product(int64_t n_tokens, int64_t n_latents, const Rounded* a, const Rounded* w,
                           float* pre, int64_t threads) {
#if SAINT_ROUNDED_PRODUCT
  const int64_t stride = a->stride;
  const int64_t block = std::max<int64_t>(kLatents, (320 << 10) / stride / kLatents * kLatents);
#pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> sums(kTokens * block);
#pragma omp for schedule(dynamic, 1)
    for (int64_t start = 0; start < n_latents; start += block) {
      const int64_t count = std::min(block, n_latents - start);
      const int8_t* weights = (const int8_t*)w->q + start * stride;
      for (int64_t t = 0; t < n_tokens; t += kTokens) {
        const int64_t tokens = std::min<int64_t>(kTokens, n_tokens - t);
        const uint8_t* rows = a->q + t * stride;
        int64_t l = 0;
        if (tokens == kTokens)
          for (; l + kLatents <= count; l += kLatents)
            tile<kTokens, kLatents>(rows, weights + l * stride, stride, sums.data() + l, block);
        for (; l < count; l++)
          for (int64_t i = 0; i < tokens; i++)
            tile<1, 1>(rows + i * stride, weights + l * stride, stride,
                       sums.data() + i * block + l, block);
        for (int64_t i = 0; i < tokens; i++) {
          float* out = pre + (t + i) * n_latents + start;
          const int32_t *s = sums.data() + i * block, *sum = w->sum + start;
          const float *scale = w->scale + start, token_scale = a->scale[t + i];
#pragma omp simd
          for (int64_t j = 0; j < count; j++)
            out[j] = token_scale * scale[j] * (float)(s[j] - kInputOffset * sum[j]);
        }
      }
    }
  }
#endif
}

}  // extern "C"

namespace {

// What the error bound needs of a token, beside the weights': see the top of this file.
struct Bound {
  const Rounded *a, *w;
  int64_t d;
  float most_square = 0, most_error = 0;

  Bound(const Rounded* a, const Rounded* w, int64_t d, int64_t n_latents) : a(a), w(w), d(d) {
    for (int64_t l = 0; l < n_latents; l++) {
      most_square = std::max(most_square, w->square[l]);
      most_error = std::max(most_error, w->error[l]);
    }
  }

  float of(int64_t t, float square, float error) const {
    return std::sqrt((a->error[t] * square + a->square[t] * error) / d);
  }
  float sigma(int64_t t, int64_t l) const { return of(t, w->square[l], w->error[l]); }
  float widest(int64_t t) const { return of(t, most_square, most_error); }

  // Replace candidates' rounded values by exact ones; false where any erred by more than 6σ.
  bool score(int64_t t, const float* token, const float* weights, const float* bias,
             std::vector<TopK::Entry>& candidates) const {
    bool sure = true;
    for (size_t i = 0; i < candidates.size(); i++) {
      auto& [value, l] = candidates[i];
      if (i + 1 < candidates.size()) prefetch(weights + candidates[i + 1].second * d, d);
      const float exact = dot(token, weights + l * d, d) + bias[l];
      // Written so that a NaN is not sure either; 1e-5: rounding of the float32 sums.
      const float room = 1e-5f * std::sqrt(a->square[t] * w->square[l]);
      if (!(std::fabs(exact - value) <= kSigmas * sigma(t, l) + room)) sure = false;
      value = exact;
    }
    return sure;
  }
};

}  // namespace

extern "C" {

// Keep the k largest of the exact a · wᵀ + bias, given their rounded product in pre.
// unsure[t]: 1 where the float32 product must decide. Returns the number of candidates.
int64_t saint_rescore(int64_t n_tokens, int64_t n_latents, int64_t d, int64_t k, const float* a,
                      const float* w, const float* bias, const Rounded* rounded_a,
                      const Rounded* rounded_w, const float* pre, float* values, int32_t* indices,
                      uint8_t* unsure, int64_t threads) {
  const Bound bound(rounded_a, rounded_w, d, n_latents);
  int64_t n_candidates = 0;
#pragma omp parallel num_threads(threads) reduction(+ : n_candidates)
  {
    TopK topk(n_latents, k);
    std::vector<TopK::Entry> candidates;
#pragma omp for schedule(dynamic, 8)
    for (int64_t t = 0; t < n_tokens; t++) {
      const float* row = pre + t * n_latents;
      const float kth = topk.find(row, bias);
      float usual = 0;
      for (const auto& entry : topk.found()) usual = std::max(usual, bound.sigma(t, entry.second));
      const float cut = kth - kSlack * usual, low = cut - kSigmas * bound.widest(t);
      candidates.clear();
      topk.for_each_above(row, bias, low, low, [&](float value, int64_t l) {
        if (value + kSigmas * bound.sigma(t, l) >= cut) candidates.emplace_back(value, (int32_t)l);
      });
      n_candidates += candidates.size();
      // With very many candidates the float32 product is cheaper.
      const bool sure = (int64_t)candidates.size() <= std::max(16 * k + 256, n_latents / 8) &&
                        bound.score(t, a + t * d, w, bias, candidates);
      unsure[t] = !(sure && topk.keep_largest(candidates) >= cut);
      if (!unsure[t]) topk.write(candidates, values + t * k, indices + t * k);
    }
  }
  return n_candidates;
}

// Find where the exact a · wᵀ + bias exceeds 0, given the rounded product in pre: how many of each
// token in counts, 0 and unsure[t] where the float32 product must decide. Returns what `saint_take`
// takes, and the number of candidates in n_candidates.
int64_t saint_rescore_above(int64_t n_tokens, int64_t n_latents, int64_t d, const float* a,
                            const float* w, const float* bias, const Rounded* rounded_a,
                            const Rounded* rounded_w, const float* pre, int64_t* counts,
                            uint8_t* unsure, int64_t* n_candidates, int64_t threads) {
  const Bound bound(rounded_a, rounded_w, d, n_latents);
  Found* found = new Found(n_tokens);
  int64_t total = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8) reduction(+ : total)
  for (int64_t t = 0; t < n_tokens; t++) {
    auto& entries = (*found)[t];
    for_each_reaching(pre + t * n_latents, bias, n_latents, -kSigmas * bound.widest(t),
                      [&](float value, int64_t l) {
                        if (value + kSigmas * bound.sigma(t, l) >= 0)
                          entries.emplace_back(value, (int32_t)l);
                      });
    total += entries.size();
    unsure[t] = (int64_t)entries.size() > std::max<int64_t>(512, n_latents / 8) ||
                !bound.score(t, a + t * d, w, bias, entries);
    if (unsure[t]) entries.clear();
    const auto at_rest = [](const TopK::Entry& entry) { return !(entry.first > 0); };
    entries.erase(std::remove_if(entries.begin(), entries.end(), at_rest), entries.end());
    counts[t] = entries.size();
  }
  *n_candidates = total;
  return (int64_t)found;
}

// The same of the float32 product in pre (n_rows, n).
int64_t saint_above(int64_t n_rows, int64_t n, const float* pre, const float* bias, int64_t* counts,
                    int64_t threads) {
  Found* found = new Found(n_rows);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
  for (int64_t t = 0; t < n_rows; t++) {
    auto& entries = (*found)[t];
    for_each_reaching(pre + t * n, bias, n, 0, [&](float value, int64_t l) {
      if (value > 0) entries.emplace_back(value, (int32_t)l);
    });
    counts[t] = entries.size();
  }
  return (int64_t)found;
}

// Copy what was found of n tokens into room for all their entries, and free it.
void saint_take(int64_t n, int64_t found, float* values, int32_t* indices, int64_t /* threads */) {
  Found* tokens = (Found*)found;
  for (int64_t t = 0; t < n; t++)
    for (const auto& [value, latent] : (*tokens)[t]) *values++ = value, *indices++ = latent;
  delete tokens;
}

// Keep the k largest of pre + bias in each row of pre (n_rows, n), after ReLU.
void saint_topk(int64_t n_rows, int64_t n, int64_t k, const float* pre, const float* bias,
                float* values, int32_t* indices, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    TopK topk(n, k);
#pragma omp for schedule(dynamic, 8)
    for (int64_t t = 0; t < n_rows; t++) {
      topk.find(pre + t * n, bias);
      topk.write(topk.found(), values + t * k, indices + t * k);
    }
  }
}

}  // extern "C"
