/* What all kernels share: bfloat16 in vectors, and the exponential. */
#ifndef LORALOOP_KERNELS_H
#define LORALOOP_KERNELS_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))

typedef uint16_t bf16;

/* At least this much memory, 64 bytes aligned, or NULL; what is in it is left over from earlier calls. */
void *open_workspace(size_t bytes);
void close_workspace(void *memory);

/* 16 values from bfloat16, which is the upper half of a float. */
INLINE __m512 load_bf16(const bf16 *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}

INLINE __m512 load_bf16_mask(__mmask16 m, const bf16 *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}

INLINE void store_bf16(bf16 *p, __m512 x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(x)); }

INLINE void store_bf16_mask(bf16 *p, __mmask16 m, __m512 x) { _mm256_mask_storeu_epi16(p, m, (__m256i)_mm512_cvtneps_pbh(x)); }

/* 2^x for every x: 0 and infinity beyond the range. The fraction of x goes through a polynomial of degree 5 (relative error
   8.2e-8 besides rounding, minimax over [0, 1), exact at 0); scalef multiplies by 2^floor(x). */
INLINE __m512 exp2_ps(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, 0x09); /* x - floor(x) */
  __m512 p = _mm512_set1_ps(0.0018671300495043397f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.009017030708491802f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05579991266131401f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24016444385051727f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931512951850891f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

#endif
