/* Element-wise passes over rows of bfloat16: float32 inside, rounded once, one read and one write of memory.

   `row` arguments count values from one row to the next. Rows are spread over threads; a row's result depends on nothing else.
   Every function returns 0. */
#include "kernels.h"

#include <math.h>

/* The lanes of the 16 columns from i on that there are. */
INLINE __mmask16 lanes(int64_t i, int64_t n) { return n - i >= 16 ? 0xffff : (__mmask16)((1u << (n - i)) - 1); }

/* Rows that are worth a second thread: a thread's start costs as much as some thousand values. */
#define SPREAD _Pragma("omp parallel for schedule(static) num_threads((int)n_threads) if (n_rows * n > 16384)")

/* out = x * rsqrt(mean(x^2) + eps) * weight; rstd keeps the second factor. */
int rms_norm(int64_t n_threads, int64_t n_rows, int64_t n, const bf16 *x, int64_t x_row, const bf16 *weight, double eps, bf16 *out,
             int64_t out_row, float *rstd) {
  SPREAD
  for (int64_t t = 0; t < n_rows; t++) {
    const bf16 *from = x + t * x_row;
    bf16 *to = out + t * out_row;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
      const __m512 v = load_bf16_mask(lanes(i, n), from + i);
      sum = _mm512_fmadd_ps(v, v, sum);
    }
    rstd[t] = 1.0f / sqrtf(_mm512_reduce_add_ps(sum) / (float)n + (float)eps);
    const __m512 by = _mm512_set1_ps(rstd[t]);
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = lanes(i, n);
      store_bf16_mask(to + i, m, _mm512_mul_ps(_mm512_mul_ps(load_bf16_mask(m, from + i), by), load_bf16_mask(m, weight + i)));
    }
  }
  return 0;
}

/* d_x += rstd * (g - x rstd^2 mean(g x)) with g = d_out * weight. */
int rms_norm_backward(int64_t n_threads, int64_t n_rows, int64_t n, const bf16 *d_out, int64_t d_out_row, const bf16 *x, int64_t x_row,
                      const bf16 *weight, const float *rstd, bf16 *d_x, int64_t d_x_row) {
  SPREAD
  for (int64_t t = 0; t < n_rows; t++) {
    const bf16 *d = d_out + t * d_out_row, *from = x + t * x_row;
    bf16 *to = d_x + t * d_x_row;
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = lanes(i, n);
      const __m512 g = _mm512_mul_ps(load_bf16_mask(m, d + i), load_bf16_mask(m, weight + i));
      sum = _mm512_fmadd_ps(g, load_bf16_mask(m, from + i), sum);
    }
    const float r = rstd[t];
    const __m512 by = _mm512_set1_ps(r), back = _mm512_set1_ps(r * r * r * _mm512_reduce_add_ps(sum) / (float)n);
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = lanes(i, n);
      const __m512 g = _mm512_mul_ps(load_bf16_mask(m, d + i), load_bf16_mask(m, weight + i));
      const __m512 gradient = _mm512_fnmadd_ps(load_bf16_mask(m, from + i), back, _mm512_mul_ps(g, by));
      store_bf16_mask(to + i, m, _mm512_add_ps(load_bf16_mask(m, to + i), gradient));
    }
  }
  return 0;
}

/* 1 / (1 + e^-x). */
INLINE __m512 sigmoid(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp2_ps(_mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896341f)))));
}

/* out = gate * sigmoid(gate) * up. */
int swiglu(int64_t n_threads, int64_t n_rows, int64_t n, const bf16 *gate, int64_t gate_row, const bf16 *up, int64_t up_row, bf16 *out,
           int64_t out_row) {
  SPREAD
  for (int64_t t = 0; t < n_rows; t++)
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = lanes(i, n);
      const __m512 g = load_bf16_mask(m, gate + t * gate_row + i), u = load_bf16_mask(m, up + t * up_row + i);
      store_bf16_mask(out + t * out_row + i, m, _mm512_mul_ps(_mm512_mul_ps(g, sigmoid(g)), u));
    }
  return 0;
}

/* From d_h: the gradients of gate and up, and h = silu(gate) * up again. Outputs may be the inputs' own memory. */
int swiglu_backward(int64_t n_threads, int64_t n_rows, int64_t n, const bf16 *d_h, int64_t d_h_row, const bf16 *gate, int64_t gate_row,
                    const bf16 *up, int64_t up_row, bf16 *d_gate, int64_t d_gate_row, bf16 *d_up, int64_t d_up_row, bf16 *h,
                    int64_t h_row) {
  const __m512 one = _mm512_set1_ps(1.0f);
  SPREAD
  for (int64_t t = 0; t < n_rows; t++)
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = lanes(i, n);
      const __m512 g = load_bf16_mask(m, gate + t * gate_row + i), u = load_bf16_mask(m, up + t * up_row + i);
      const __m512 d = load_bf16_mask(m, d_h + t * d_h_row + i), s = sigmoid(g), silu = _mm512_mul_ps(g, s);
      /* silu' = s + g s (1 - s) */
      const __m512 slope = _mm512_fmadd_ps(silu, _mm512_sub_ps(one, s), s);
      store_bf16_mask(d_gate + t * d_gate_row + i, m, _mm512_mul_ps(_mm512_mul_ps(d, u), slope));
      store_bf16_mask(d_up + t * d_up_row + i, m, _mm512_mul_ps(d, silu));
      store_bf16_mask(h + t * h_row + i, m, _mm512_mul_ps(silu, u));
    }
  return 0;
}

/* Rotate the halves of each head in place: (a, b) to (a cos - b sin, b cos + a sin), with sin times `sign`. n is a head's half. */
int rope(int64_t n_threads, int64_t n_rows, int64_t n, bf16 *x, int64_t x_row, int64_t n_heads, const float *cosine, const float *sine,
         double sign) {
  const __m512 turn = _mm512_set1_ps((float)sign);
#pragma omp parallel for schedule(static) num_threads((int)n_threads) if (n_rows * n * n_heads > 16384)
  for (int64_t t = 0; t < n_rows; t++)
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = lanes(i, n);
      const __m512 c = _mm512_maskz_loadu_ps(m, cosine + t * n + i), s = _mm512_mul_ps(turn, _mm512_maskz_loadu_ps(m, sine + t * n + i));
      for (int64_t h = 0; h < n_heads; h++) {
        bf16 *first = x + t * x_row + h * 2 * n + i;
        const __m512 a = load_bf16_mask(m, first), b = load_bf16_mask(m, first + n);
        store_bf16_mask(first, m, _mm512_fmsub_ps(a, c, _mm512_mul_ps(b, s)));
        store_bf16_mask(first + n, m, _mm512_fmadd_ps(b, c, _mm512_mul_ps(a, s)));
      }
    }
  return 0;
}

/* 16 logits, of either type, from column i on. */
INLINE __m512 logits_at(int wide, __mmask16 m, const void *row, int64_t i) {
  return wide ? _mm512_maskz_loadu_ps(m, (const float *)row + i) : load_bf16_mask(m, (const bf16 *)row + i);
}

/* One row: its log-sum-exp, and in place softmax * coef. Maximum and sum are taken together, a lane apart: a lane's sum is scaled
   when its maximum grows, which soon is never. */
INLINE float softmax_row(int wide, void *row, int64_t n, float coef) {
  const __m512 log2e = _mm512_set1_ps(1.44269504088896341f);
  __m512 top = _mm512_set1_ps(-1e30f), sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 64) {
    __m512 v[4], best = top;
    for (int j = 0; j < 4; j++) {
      const int64_t at = i + 16 * j;
      const __mmask16 m = at < n ? lanes(at, n) : 0;
      v[j] = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), m, _mm512_mul_ps(logits_at(wide, m, row, at), log2e));
      best = _mm512_max_ps(best, v[j]);
    }
    if (_mm512_cmp_ps_mask(best, top, _CMP_GT_OQ)) {
      sum = _mm512_mul_ps(sum, exp2_ps(_mm512_sub_ps(top, best)));
      top = best;
    }
    for (int j = 0; j < 4; j++) sum = _mm512_add_ps(sum, exp2_ps(_mm512_sub_ps(v[j], top)));
  }
  const float highest = _mm512_reduce_max_ps(top);
  const float total = _mm512_reduce_add_ps(_mm512_mul_ps(sum, exp2_ps(_mm512_sub_ps(top, _mm512_set1_ps(highest)))));
  const __m512 by = _mm512_set1_ps(coef / total), shift = _mm512_set1_ps(highest);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 m = lanes(i, n);
    const __m512 v = _mm512_mul_ps(by, exp2_ps(_mm512_fmsub_ps(logits_at(wide, m, row, i), log2e, shift)));
    if (wide)
      _mm512_mask_storeu_ps((float *)row + i, m, v);
    else
      store_bf16_mask((bf16 *)row + i, m, v);
  }
  return highest * 0.69314718055994531f + logf(total);
}

int head_softmax(int64_t n_threads, int64_t n_rows, int64_t n, void *logits, int64_t row, int64_t wide, const float *coef, float *lse) {
  SPREAD
  for (int64_t t = 0; t < n_rows; t++)
    lse[t] = wide ? softmax_row(1, (float *)logits + t * row, n, coef[t]) : softmax_row(0, (bf16 *)logits + t * row, n, coef[t]);
  return 0;
}

/* 32 bits that look random for each of 16 counters: a finalizer of full avalanche over key and counter. */
INLINE __m512i mix(__m512i counter, __m512i key) {
  __m512i h = _mm512_xor_si512(counter, key);
  h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 16)), _mm512_set1_epi32(0x7feb352d));
  h = _mm512_mullo_epi32(_mm512_xor_si512(h, _mm512_srli_epi32(h, 15)), _mm512_set1_epi32((int)0x846ca68b));
  return _mm512_xor_si512(h, _mm512_srli_epi32(h, 16));
}

/* out = x * mask / keep, or out += that when `add`. A value is kept when 16 bits drawn from (key, its row, its column) are below
   `keep` * 65536, so the same key gives the same mask, in whatever order and by however many threads. Rows count from `first`. */
int dropout(int64_t n_threads, int64_t n_rows, int64_t n, const bf16 *x, int64_t x_row, bf16 *out, int64_t out_row, int64_t key,
            int64_t first, double keep, int64_t add) {
  const __m512i limit = _mm512_set1_epi32((int)(keep * 65536.0 + 0.5)), low = _mm512_set1_epi32(0xffff);
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 factor = _mm512_set1_ps((float)(1.0 / keep));
  SPREAD
  for (int64_t t = 0; t < n_rows; t++) {
    /* a row's own key, mixed twice so that neighbouring rows and keys have nothing in common */
    const __m512i row = mix(mix(_mm512_set1_epi32((int)(first + t)), _mm512_set1_epi32((int)key)), _mm512_set1_epi32((int)(key >> 32)));
    for (int64_t i = 0; i < n; i += 32) {
      const __m512i drawn = mix(_mm512_add_epi32(lane, _mm512_set1_epi32((int)i)), row);
      for (int64_t half = 0; half < 2 && i + 16 * half < n; half++) {
        const int64_t at = i + 16 * half;
        const __mmask16 m = lanes(at, n);
        const __m512i bits = half ? _mm512_srli_epi32(drawn, 16) : _mm512_and_si512(drawn, low);
        const __mmask16 kept = _mm512_cmplt_epu32_mask(bits, limit);
        __m512 value = _mm512_maskz_mul_ps(kept, load_bf16_mask(m, x + t * x_row + at), factor);
        if (add) value = _mm512_add_ps(value, load_bf16_mask(m, out + t * out_row + at));
        store_bf16_mask(out + t * out_row + at, m, value);
      }
    }
  }
  return 0;
}
