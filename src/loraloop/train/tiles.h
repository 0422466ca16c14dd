/* Tiles of 1 KiB and their products, with AMX or with AVX512-BF16.

   "A" tiles hold 16 rows of 32 values along the inner dimension, "B" tiles hold 16 pairs along the inner dimension of 16 columns.
   Both instruction sets read the same tiles. All work is done in groups of 32 tokens. */
#ifndef LORALOOP_TILES_H
#define LORALOOP_TILES_H

#include "kernels.h"

#include <string.h>

enum { TILE = 512, MAX_DIM = 256 };

static const int IDENTITY[MAX_DIM / 32] = {0, 1, 2, 3, 4, 5, 6, 7};

INLINE void *take(char **at, size_t bytes) {
  void *p = *at;
  *at += (bytes + 63) & ~(size_t)63;
  return p;
}

INLINE int smaller(int a, int b) { return a < b ? a : b; }
INLINE int larger(int a, int b) { return a > b ? a : b; }

/* Transpose 16 x 16 values of 32 bits. */
INLINE void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

INLINE void store_tile(bf16 *to, const __m512i r[16]) {
  for (int i = 0; i < 16; i++) _mm512_store_si512((void *)(to + 32 * i), r[i]);
}

/* Pack 32 tokens of x (rows after `n` count as zero) into up to four forms; a form that is NULL is not wanted.
   a: x as A, tiles [2][dim/32]; bt: x^T as B, likewise; b: x as B, tiles [dim/16]; at: x^T as A, likewise. */
static void pack(const bf16 *x, int64_t row, int n, int dim, bf16 *a, bf16 *bt, bf16 *b, bf16 *at) {
  const int dk = (dim + 31) / 32;
  __m512i r[16];
  for (int i = 0; i < 2 && (a || bt); i++)
    for (int k = 0; k < dk; k++) {
      const __mmask32 columns = dim - 32 * k >= 32 ? 0xffffffffu : 0xffffu;
      for (int t = 0; t < 16; t++)
        r[t] = 16 * i + t < n ? _mm512_maskz_loadu_epi16(columns, x + (16 * i + t) * row + 32 * k) : _mm512_setzero_si512();
      if (a) store_tile(a + (i * dk + k) * TILE, r);
      if (!bt) continue;
      transpose(r);
      store_tile(bt + (i * dk + k) * TILE, r);
    }
  for (int d = 0; d < 2 * dk && (b || at); d++) {
    for (int t = 0; t < 16; t++) {
      __m256i even = _mm256_setzero_si256(), odd = even;
      if (2 * t < n && 16 * d < dim) even = _mm256_loadu_si256((const __m256i *)(x + 2 * t * row + 16 * d));
      if (2 * t + 1 < n && 16 * d < dim) odd = _mm256_loadu_si256((const __m256i *)(x + (2 * t + 1) * row + 16 * d));
      r[t] = _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    if (b) store_tile(b + d * TILE, r);
    if (!at) continue;
    transpose(r);
    store_tile(at + d * TILE, r);
  }
}

/* Write 16 dimensions of 16 queries, held transposed in `tile` and multiplied by `factor` a lane, as rows of bfloat16. */
INLINE void unpack(const float *tile, __m512 factor, bf16 *to, int64_t row, int n) {
  __m512i r[16];
  for (int i = 0; i < 16; i++) r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(tile + 16 * i), factor));
  transpose(r);
  for (int i = 0; i < 16 && i < n; i++) store_bf16(to + i * row, _mm512_castsi512_ps(r[i]));
}

/* Two rows of 16 to bfloat16, interleaved: a row of a B tile. */
INLINE __m512i interleaved(__m512i rows) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                         18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, rows);
}

INLINE __m512i two_rows(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

/* Where the tiles of an operand are: the second along the outer dimension, and the steps along the inner one, in values. */
typedef struct {
  const bf16 *at;
  int64_t outer, inner;
  const int *steps;
} Operand;

#define OPERAND(at, outer, inner, steps) ((Operand){(at), (outer), (inner), (steps)})

INLINE void multiply_amx(float *c, int64_t down, int64_t right, Operand a, Operand b, int n, int add) {
  __asm__ volatile("" ::: "memory"); /* the tile loads of some compilers do not say that they read memory */
  if (add) {
    _tile_loadd(0, c, 64);
    _tile_loadd(1, c + right, 64);
    _tile_loadd(2, c + down, 64);
    _tile_loadd(3, c + down + right, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < n; k++) {
    const bf16 *ak = a.at + a.steps[k] * a.inner, *bk = b.at + b.steps[k] * b.inner;
    _tile_loadd(4, ak, 64);
    _tile_loadd(6, bk, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, bk + b.outer, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, ak + a.outer, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 64);
  _tile_stored(1, c + right, 64);
  _tile_stored(2, c + down, 64);
  _tile_stored(3, c + down + right, 64);
  __asm__ volatile("" ::: "memory");
}

/* One tile of c = or += a b with AVX512-BF16. */
INLINE void multiply_tile(float *c, const bf16 *a, int64_t a_inner, const int *a_steps, const bf16 *b, int64_t b_inner, const int *b_steps,
                          int n, int add) {
  __m512 sum[16];
  for (int m = 0; m < 16; m++) sum[m] = add ? _mm512_load_ps(c + 16 * m) : _mm512_setzero_ps();
  for (int k = 0; k < n; k++) {
    const bf16 *ak = a + a_steps[k] * a_inner, *bk = b + b_steps[k] * b_inner;
    for (int p = 0; p < 16; p++) {
      const __m512bh column = (__m512bh)_mm512_load_si512((const void *)(bk + 32 * p));
      for (int m = 0; m < 16; m++) {
        int32_t pair;
        memcpy(&pair, ak + 32 * m + 2 * p, 4);
        sum[m] = _mm512_dpbf16_ps(sum[m], (__m512bh)_mm512_set1_epi32(pair), column);
      }
    }
  }
  for (int m = 0; m < 16; m++) _mm512_store_ps(c + 16 * m, sum[m]);
}

INLINE void multiply_avx(float *c, int64_t down, int64_t right, Operand a, Operand b, int n, int add) {
  for (int i = 0; i < 2; i++)
    for (int j = 0; j < 2; j++)
      multiply_tile(c + i * down + j * right, a.at + i * a.outer, a.inner, a.steps, b.at + j * b.outer, b.inner, b.steps, n, add);
}

/* c (2 x 2 tiles of float, `down` and `right` apart) = or += a b, over n inner steps. */
INLINE void multiply(int amx, float *c, int64_t down, int64_t right, Operand a, Operand b, int n, int add) {
  if (amx)
    multiply_amx(c, down, right, a, b, n, add);
  else
    multiply_avx(c, down, right, a, b, n, add);
}

/* c (1 x 2 tiles, `right` apart) = a b over n inner steps. Short, so that it runs in the tile unit beside vector code that follows. */
INLINE void multiply_row(int amx, float *c, int64_t right, Operand a, Operand b, int n) {
  if (!amx) {
    for (int j = 0; j < 2; j++) multiply_tile(c + j * right, a.at, a.inner, a.steps, b.at + j * b.outer, b.inner, b.steps, n, 0);
    return;
  }
  __asm__ volatile("" ::: "memory");
  _tile_zero(4);
  _tile_zero(5);
  for (int k = 0; k < n; k++) {
    const bf16 *bk = b.at + b.steps[k] * b.inner;
    _tile_loadd(6, a.at + a.steps[k] * a.inner, 64);
    _tile_loadd(7, bk, 64);
    _tile_dpbf16ps(4, 6, 7);
    _tile_loadd(7, bk + b.outer, 64);
    _tile_dpbf16ps(5, 6, 7);
  }
  _tile_stored(4, c, 64);
  _tile_stored(5, c + right, 64);
  __asm__ volatile("" ::: "memory");
}

/* Eight tiles of 16 rows of 64 bytes. What the thread had set is put back: another library may think that it still holds. */
typedef struct {
  char bytes[64];
} __attribute__((aligned(64))) TileState;

INLINE void tiles_on(int amx, TileState *saved) {
  if (!amx) return;
  TileState own;
  memset(&own, 0, sizeof own);
  memset(saved, 0, sizeof *saved);
  own.bytes[0] = 1;
  for (int i = 0; i < 8; i++) {
    own.bytes[16 + 2 * i] = 64;
    own.bytes[48 + i] = 16;
  }
  _tile_storeconfig(saved);
  __asm__ volatile("" ::: "memory");
  _tile_loadconfig(&own);
}

INLINE void tiles_off(int amx, TileState *saved) {
  if (!amx) return;
  __asm__ volatile("" ::: "memory");
  if (saved->bytes[0])
    _tile_loadconfig(saved);
  else
    _tile_release();
}

#endif
