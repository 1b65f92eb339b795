// Sums and maxima of every latent over every sentence, for saint/evidence/rankings.py.

#include <vector>

#include "cpu_kernels.h"

extern "C" {

// Sentence i is entries offsets[i] to offsets[i + 1] of values and indices, in token order; a
// token's latents are distinct. The outputs have room for every entry; returns how many pairs there are.
// Sums are added up in token order.
int64_t saint_reduce_by_sentence(int64_t n_sentences, int64_t n_latents,
                                 const int64_t* offsets, const float* values,
                                 const int32_t* indices, int64_t* sentences, int64_t* latents,
                                 int64_t* n_tokens, double* sums, float* maxima,
                                 int64_t /* threads */) {
  std::vector<int64_t> pair_of(n_latents, -1);
  int64_t n = 0;
  for (int64_t sentence = 0; sentence < n_sentences; sentence++) {
    const int64_t first = n;
    for (int64_t e = offsets[sentence]; e < offsets[sentence + 1]; e++) {
      const float value = values[e];
      if (!(value > 0)) continue;
      int64_t& pair = pair_of[indices[e]];
      if (pair < first) {  // none, or an earlier sentence's
        pair = n++;
        sentences[pair] = sentence;
        latents[pair] = indices[e];
        n_tokens[pair] = 0;
        sums[pair] = maxima[pair] = 0;
      }
      n_tokens[pair]++;
      sums[pair] += value;
      maxima[pair] = std::max(maxima[pair], value);
    }
  }
  return n;
}

}  // extern "C"
