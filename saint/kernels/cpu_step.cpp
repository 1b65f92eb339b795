// The TopK autoencoder's training step on a CPU, around the one dense product (which torch does).
// Compiled at first use and called through ctypes by cpu.py; all arrays are contiguous
// float32 or int32 (offsets int64, moments also 8-bit codes), row-major. Every sum has one fixed
// order, whatever the number of threads: a step gives the same bits each time.

#include <cstring>
#include <vector>

#include "cpu_moments.h"

namespace {

constexpr float kMinNormaliser = 1e-12f;
constexpr int64_t kChunks = 256;  // of latents, each with its own share of b_pre's gradient

// Moments of latents that rest decay towards zero: denormal arithmetic would be a hundred times
// slower than the rest of the step.
struct FlushDenormals {
#if defined(__SSE__)
  unsigned saved = _mm_getcsr();
  FlushDenormals() { _mm_setcsr(saved | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved); }
#endif
};

void add_scaled(float* out, const float* x, float scale, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; i++) out[i] += scale * x[i];
}

// out = Σ_j weights[j] · rows[which[j]], four rows at a time.
void weighted_sum(float* out, const float* rows, const int32_t* which, const float* weights,
                  int64_t count, int64_t n) {
  if (count == 1) {
    const float *r = rows + which[0] * n, w = weights[0];
#pragma omp simd
    for (int64_t i = 0; i < n; i++) out[i] = w * r[i];
    return;
  }
  std::memset(out, 0, n * sizeof(float));
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const float *r0 = rows + which[j] * n, *r1 = rows + which[j + 1] * n;
    const float *r2 = rows + which[j + 2] * n, *r3 = rows + which[j + 3] * n;
    const float w0 = weights[j], w1 = weights[j + 1], w2 = weights[j + 2], w3 = weights[j + 3];
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
      out[i] += w0 * r0[i] + w1 * r1[i] + (w2 * r2[i] + w3 * r3[i]);
  }
  for (; j < count; j++) add_scaled(out, rows + which[j] * n, weights[j], n);
}

}  // namespace

extern "C" {

// What a batch's gradient is made of: entry e of latent l (starts[l] ≤ e < starts[l + 1]) is
// token tokens[e], its row rows[e], with activation values[e] and ∂loss/∂activation g_values[e].
struct Gradient {
  int64_t n_latents, d_model;
  const int32_t *starts, *tokens, *rows;
  const float *values, *g_values;
  const float *a, *g;  // the encoder's input by token, ∂loss/∂reconstruction by row
  // AuxK: position of each latent among the dead ones or -1, and their own gradients.
  const int32_t* aux_position;
  const float *aux_dec, *aux_enc, *aux_b;
};

// One parameter tensor with Adam's two moments: float32, or int8 and uint8 codes with a scale per
// row for m and then for v.
struct Parameter {
  float* p;
  void *m, *v;
  float* scales;  // null: float32
};

struct Parameters {
  Parameter w_enc, b_enc, w_dec, b_pre;
};

struct AdamStep {
  float beta1, beta2, step_size, inverse_root_correction2, eps;
  uint32_t n_steps, lazy;  // lazy: latents without a gradient stay as they are
};

}  // extern "C"

namespace {

// gradient: null for a latent at rest. scale: the clipping factor.
void adam(float* p, float* m, float* v, const float* gradient, int64_t n, float scale,
          const AdamStep& s) {
  const float b1 = s.beta1, b2 = s.beta2, rate = s.step_size, eps = s.eps;
  const float root = s.inverse_root_correction2;
  if (gradient == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
      m[i] *= b1;
      v[i] *= b2;
      p[i] -= rate * m[i] / (std::sqrt(v[i]) * root + eps);
    }
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; i++) {
    const float g = scale * gradient[i];
    m[i] += (1 - b1) * (g - m[i]);
    v[i] = b2 * v[i] + (1 - b2) * g * g;
    p[i] -= rate * m[i] / (std::sqrt(v[i]) * root + eps);
  }
}

// Adam on row l of a parameter (n_rows, d); number: the tensor's in the rounding.
void adam_row(const Parameter& at, int64_t l, int64_t n_rows, const float* gradient, int64_t d,
              float scale, const AdamStep& s, uint32_t number, MomentRow& row) {
  float* p = at.p + l * d;
  if (at.scales == nullptr) {
    adam(p, (float*)at.m + l * d, (float*)at.v + l * d, gradient, d, scale, s);
    return;
  }
  int8_t* first = (int8_t*)at.m + l * d;
  uint8_t* second = (uint8_t*)at.v + l * d;
  float *scale_m = at.scales + l, *scale_v = scale_m + n_rows;
  if (gradient == nullptr && *scale_m == 0 && *scale_v == 0) return;  // all zero, and stays so
  row.decode(first, second, *scale_m, *scale_v);
  adam(p, row.m.data(), row.v.data(), gradient, d, scale, s);
  row.encode(first, second, scale_m, scale_v, mix(mix(2 * s.n_steps + number) ^ (uint32_t)l));
}

// One latent's gradients, its decoder's without the component along the (unit) direction w_dec.
struct Rows {
  std::vector<float> dec, enc;
  float b = 0;

  explicit Rows(int64_t d) : dec(d), enc(d) {}

  bool build(const Gradient& x, int64_t latent, const float* w_dec) {
    const int64_t d = x.d_model, start = x.starts[latent], count = x.starts[latent + 1] - start;
    const int64_t aux = x.aux_position ? x.aux_position[latent] : -1;
    if (count == 0 && aux < 0) return false;
    b = 0;
    if (count > 0) {
      weighted_sum(dec.data(), x.g, x.rows + start, x.values + start, count, d);
      weighted_sum(enc.data(), x.a, x.tokens + start, x.g_values + start, count, d);
      for (int64_t e = start; e < start + count; e++) b += x.g_values[e];
    } else {
      std::fill(dec.begin(), dec.end(), 0.0f);
      std::fill(enc.begin(), enc.end(), 0.0f);
    }
    if (aux >= 0) {
      add_scaled(dec.data(), x.aux_dec + aux * d, 1, d);
      add_scaled(enc.data(), x.aux_enc + aux * d, 1, d);
      b += x.aux_b[aux];
    }
    add_scaled(dec.data(), w_dec, -dot(dec.data(), w_dec, d), d);
    return true;
  }
};

}  // namespace

extern "C" {

// Give each token a row for each nested dictionary (ends: their sizes, ascending), of the latents
// that it adds; of token t, entries offsets[t] to offsets[t + 1] are put in another order.
void saint_nest(int64_t n_tokens, int64_t n_parts, const int64_t* ends, const float* values,
                const int32_t* indices, const int64_t* offsets, float* nested_values,
                int32_t* nested_indices, int64_t* nested_offsets, int64_t threads) {
  nested_offsets[n_tokens * n_parts] = offsets[n_tokens];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < n_tokens; t++) {
    int64_t to = offsets[t], least = 0;
    for (int64_t part = 0; part < n_parts; least = ends[part++]) {
      nested_offsets[t * n_parts + part] = to;
      for (int64_t e = offsets[t]; e < offsets[t + 1]; e++) {
        if (indices[e] < least || indices[e] >= ends[part]) continue;
        nested_values[to] = values[e];
        nested_indices[to++] = indices[e];
      }
    }
  }
}

// Decode n tokens and go back. Token t has the rows t · parts to (t + 1) · parts, row r the entries
// offsets[r] to offsets[r + 1]; a part's reconstruction is the sum of the rows up to its own. Squared
// error per row and Σx² per token, g = ∂loss/∂(a row's sum) for the loss factor/2 · Σ_rows ‖error‖² /
// ‖x‖², g_values = ∂loss/∂activation, where it is 0 only if at_rest. While a token's decoder rows
// are in the cache they serve both directions.
void saint_reconstruct(int64_t n, int64_t d, int64_t parts, int64_t at_rest, const float* x,
                       const float* w_dec, const float* b_pre, double factor, const float* values,
                       const int32_t* indices, const int64_t* offsets, float* g, float* g_values,
                       float* squared, float* normaliser, uint8_t* fired, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
#pragma omp for schedule(dynamic, 8)
    for (int64_t t = 0; t < n; t++) {
      const float *token = x + t * d, *before = nullptr;
      normaliser[t] = std::max(dot(token, token, d), kMinNormaliser * d);
      for (int64_t row = t * parts; row < (t + 1) * parts; row++) {
        float* error = g + row * d;
        const int64_t first = offsets[row];
        weighted_sum(error, w_dec, indices + first, values + first, offsets[row + 1] - first, d);
        if (before) {
          add_scaled(error, before, 1, d);
        } else {
#pragma omp simd
          for (int64_t i = 0; i < d; i++) error[i] += b_pre[i] - token[i];
        }
        squared[row] = dot(error, error, d);
        before = error;
      }
      const float scale = (float)(factor / normaliser[t]);
      const float* after = nullptr;
      for (int64_t row = (t + 1) * parts - 1; row >= t * parts; row--) {
        float* error = g + row * d;
#pragma omp simd
        for (int64_t i = 0; i < d; i++) error[i] *= scale;
        if (after) add_scaled(error, after, 1, d);
        for (int64_t e = offsets[row]; e < offsets[row + 1]; e++) {
          const bool active = values[e] > 0;
          g_values[e] = active || at_rest ? dot(error, w_dec + indices[e] * d, d) : 0;
          if (active) __atomic_store_n(fired + indices[e], 1, __ATOMIC_RELAXED);
        }
        after = error;
      }
    }
  }
}

// products[e] = row r of g (n_rows, d) · w_dec's row indices[e], of r's entries offsets[r] to
// offsets[r + 1].
void saint_gather_dot(int64_t n_rows, int64_t d, const float* g, const float* w_dec,
                      const int32_t* indices, const int64_t* offsets, float* products,
                      int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 8)
  for (int64_t row = 0; row < n_rows; row++)
    for (int64_t e = offsets[row]; e < offsets[row + 1]; e++)
      products[e] = dot(g + row * d, w_dec + indices[e] * d, d);
}

// Sort the active entries by latent, rows ascending (counting sort); row r's entries are offsets[r]
// to offsets[r + 1]. starts: (n_latents + 1); the others have room for every entry.
void saint_group(int64_t n_rows, int64_t n_latents, const int64_t* offsets, const int32_t* indices,
                 const float* values, const float* g_values, int32_t* starts, int32_t* rows,
                 float* values_by_latent, float* g_values_by_latent, int64_t /* threads */) {
  std::fill(starts, starts + n_latents + 1, 0);
  for (int64_t e = 0; e < offsets[n_rows]; e++) starts[indices[e] + 1] += values[e] > 0;
  for (int64_t l = 0; l < n_latents; l++) starts[l + 1] += starts[l];
  std::vector<int32_t> next(starts, starts + n_latents);
  for (int64_t r = 0; r < n_rows; r++)
    for (int64_t e = offsets[r]; e < offsets[r + 1]; e++) {
      if (!(values[e] > 0)) continue;
      const int32_t to = next[indices[e]]++;
      rows[to] = (int32_t)r;
      values_by_latent[to] = values[e];
      g_values_by_latent[to] = g_values[e];
    }
}

// Return the squared norm of the whole gradient (decoder's projected). grad_b_pre: Σ_tokens g, from
// which Σ_latents ∂loss/∂b_enc · w_enc is taken here.
double saint_norm(const Gradient* gradient, const Parameters* at, float* grad_b_pre,
                  int64_t threads) {
  const Gradient& x = *gradient;
  const int64_t d = x.d_model, chunks = std::min(kChunks, x.n_latents);
  std::vector<double> squares(chunks);
  std::vector<float> shares(chunks * d);
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    Rows rows(d);
#pragma omp for schedule(dynamic, 1)
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t end = x.n_latents * (c + 1) / chunks;
      for (int64_t l = x.n_latents * c / chunks; l < end; l++) {
        if (!rows.build(x, l, at->w_dec.p + l * d)) continue;
        add_scaled(shares.data() + c * d, at->w_enc.p + l * d, -rows.b, d);
        squares[c] += (double)dot(rows.dec.data(), rows.dec.data(), d) +
                      dot(rows.enc.data(), rows.enc.data(), d) + (double)rows.b * rows.b;
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < d; i++) {
      double sum = grad_b_pre[i];
      for (int64_t c = 0; c < chunks; c++) sum += shares[c * d + i];
      grad_b_pre[i] = (float)sum;
    }
  }
  double total = 0;
  for (double share : squares) total += share;
  for (int64_t i = 0; i < d; i++) total += (double)grad_b_pre[i] * grad_b_pre[i];
  return total;
}

// One Adam step with the gradient scaled by `scale`, then unit decoder directions: every weight
// and moment is read and written once, and no gradient ever is.
void saint_update(const Gradient* gradient, const Parameters* at, const AdamStep* step,
                  double scale, const float* grad_b_pre, int64_t threads) {
  const Gradient& x = *gradient;
  const int64_t d = x.d_model;
#pragma omp parallel num_threads(threads)
  {
    FlushDenormals flush;
    Rows rows(d);
    MomentRow moments(d);
#pragma omp for schedule(dynamic, 16)
    for (int64_t l = 0; l < x.n_latents; l++) {
      const Parameter &dec = at->w_dec, &enc = at->w_enc, &b = at->b_enc;
      float* direction = dec.p + l * d;
      const bool active = rows.build(x, l, direction);
      if (step->lazy && !active) continue;
      adam_row(dec, l, x.n_latents, active ? rows.dec.data() : nullptr, d, (float)scale, *step, 1,
               moments);
      const float length = std::sqrt(dot(direction, direction, d));
      const float inverse = 1 / std::max(length, kMinNormaliser);
#pragma omp simd
      for (int64_t i = 0; i < d; i++) direction[i] *= inverse;
      adam_row(enc, l, x.n_latents, active ? rows.enc.data() : nullptr, d, (float)scale, *step, 0,
               moments);
      adam(b.p + l, (float*)b.m + l, (float*)b.v + l, active ? &rows.b : nullptr, 1,
           (float)scale, *step);
    }
  }
  adam(at->b_pre.p, (float*)at->b_pre.m, (float*)at->b_pre.v, grad_b_pre, d, (float)scale, *step);
}

}  // extern "C"
