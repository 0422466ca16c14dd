/* The product of a thin and a wide matrix over their rows, which is LoRA's weight gradient: out (ranks, n) += u^T y.

   It is bound by memory: y is read once, u and the sums stay in the caches. A task is a panel of y's columns, which nobody else adds
   to, and takes y in pieces of some hundred rows: interleaved by pairs of rows as the products want it, then multiplied. A piece is
   summed by itself first, which keeps the rounding of long sums small. The order of the rows is the order of the sums: results depend
   neither on the number of threads nor on the panels. */
#include "tiles.h"

#include <omp.h>

enum { PIECE = 4, PANEL = 1536 }; /* groups of 32 rows in a piece, at most 8; columns in a panel at most: wide ones stream better */

typedef struct {
  int64_t n_rows, n, n_ranks;     /* T, N, R */
  int64_t u_row, y_row, out_row;  /* values from one row to the next */
  int64_t n_threads, amx;
} RankCall;

typedef struct {
  bf16 *y;    /* a piece of y as B: [PIECE][panel / 16], columns in the order of `pair_rows` */
  float *sum; /* [panel / 32][rank tiles][2] */
  float *now; /* 2 x 2 tiles: what a piece gives */
} RankScratch;

INLINE __mmask32 columns_left(int64_t n) { return n >= 32 ? 0xffffffffu : (1u << n) - 1; }

/* 32 rows (those after `n` count as zero) of 32 columns (those not in `m` likewise) as two B tiles. The first has columns 0 to 3 of
   every 8, the second has the others: interleaving within 128 bits is one plain shuffle. `next` rows further is what comes next. */
INLINE void pair_rows(const bf16 *x, int64_t row, int n, __mmask32 m, int64_t next, bf16 *to, int64_t right) {
  for (int t = 0; t < 16; t++) {
    const bf16 *even = x + 2 * t * row;
    __m512i first = _mm512_setzero_si512(), second = first;
    _mm_prefetch((const char *)(even + next), _MM_HINT_T1);
    _mm_prefetch((const char *)(even + row + next), _MM_HINT_T1);
    if (2 * t < n) first = _mm512_maskz_loadu_epi16(m, even);
    if (2 * t + 1 < n) second = _mm512_maskz_loadu_epi16(m, even + row);
    _mm512_store_si512((void *)(to + 32 * t), _mm512_unpacklo_epi16(first, second));
    _mm512_store_si512((void *)(to + right + 32 * t), _mm512_unpackhi_epi16(first, second));
  }
}

/* 32 rows of u as u^T, A tiles [rank tiles]; ranks in the order of `pair_rows`. */
INLINE void pack_ranks(const RankCall *c, const bf16 *u, int group, int tiles, bf16 *to) {
  const int n = smaller(32, c->n_rows - 32 * group);
  for (int i = 0; i < tiles; i += 2) {
    bf16 *pair = to + i * TILE;
    pair_rows(u + 32 * group * c->u_row + 16 * i, c->u_row, n, columns_left(c->n_ranks - 16 * i), 0, pair, TILE);
    for (int j = 0; j < 2; j++) {
      __m512i r[16];
      for (int t = 0; t < 16; t++) r[t] = _mm512_load_si512((const void *)(pair + j * TILE + 32 * t));
      transpose(r);
      store_tile(pair + j * TILE, r);
    }
  }
}

/* Where row (or column) i of tile j of a pair belongs. */
INLINE int place_of(int j, int i) { return 8 * (i / 4) + 4 * j + i % 4; }

/* Add the sums of 32 columns to `out`, back in order. */
INLINE void add_sums(const RankCall *c, const float *sum, int tiles, int64_t column, float *out) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  const __mmask32 m = columns_left(c->n - column);
  for (int i = 0; i < tiles; i++)
    for (int r = 0; r < 16; r++) {
      const int64_t rank = 32 * (i / 2) + place_of(i % 2, r);
      if (rank >= c->n_ranks) continue;
      float *to = out + rank * c->out_row + column;
      const __m512 first = _mm512_load_ps(sum + 512 * i + 16 * r), second = _mm512_load_ps(sum + 512 * i + 256 + 16 * r);
      const __m512 a = _mm512_permutex2var_ps(first, low, second), b = _mm512_permutex2var_ps(first, high, second);
      const __mmask16 ma = (__mmask16)m, mb = (__mmask16)(m >> 16);
      _mm512_mask_storeu_ps(to, ma, _mm512_add_ps(_mm512_maskz_loadu_ps(ma, to), a));
      _mm512_mask_storeu_ps(to + 16, mb, _mm512_add_ps(_mm512_maskz_loadu_ps(mb, to + 16), b));
    }
}

/* Columns from `column` on, `pairs` times 32 of them; ut is the whole of u^T as A. */
INLINE void multiply_panel(int amx, const RankCall *c, RankScratch w, const bf16 *ut, const bf16 *y, int tiles, int64_t column, int pairs,
                           float *out) {
  const int n_groups = (c->n_rows + 31) / 32;
  memset(w.sum, 0, (size_t)pairs * tiles * 512 * sizeof(float));
  for (int group = 0; group < n_groups; group += PIECE) {
    const int n = smaller(PIECE, n_groups - group);
    for (int g = 0; g < n; g++) {
      const int64_t row = 32 * (group + g);
      const int64_t next = row + 64 <= c->n_rows ? 32 * c->y_row : 0;
      for (int j = 0; j < pairs; j++)
        pair_rows(y + row * c->y_row + column + 32 * j, c->y_row, smaller(32, c->n_rows - row), columns_left(c->n - column - 32 * j), next,
                  w.y + (2 * pairs * g + 2 * j) * TILE, TILE);
    }
    for (int j = 0; j < pairs; j++)
      for (int i = 0; i < tiles; i += 2) {
        float *sum = w.sum + (j * tiles + i) * 512;
        multiply(amx, w.now, 512, 256, OPERAND(ut + (group * tiles + i) * TILE, TILE, tiles * TILE, IDENTITY),
                 OPERAND(w.y + 2 * j * TILE, TILE, 2 * pairs * TILE, IDENTITY), n, 0);
        for (int r = 0; r < 1024; r += 16) _mm512_store_ps(sum + r, _mm512_add_ps(_mm512_load_ps(sum + r), _mm512_load_ps(w.now + r)));
      }
  }
  for (int j = 0; j < pairs; j++) add_sums(c, w.sum + j * tiles * 512, tiles, column + 32 * j, out);
}

INLINE void multiply_ranks(int amx, const RankCall *c, const bf16 *u, const bf16 *y, float *out, int panel, int tiles, bf16 *ut,
                           char *scratch, size_t each) {
  const int n_groups = (c->n_rows + 31) / 32, n_panels = (c->n + panel - 1) / panel;
#pragma omp parallel num_threads((int)c->n_threads)
  {
#pragma omp for schedule(static)
    for (int g = 0; g < n_groups; g++) pack_ranks(c, u, g, tiles, ut + g * tiles * TILE);
    TileState saved;
    tiles_on(amx, &saved);
    char *at = scratch + omp_get_thread_num() * each;
    RankScratch w;
    w.y = take(&at, PIECE * panel / 16 * TILE * sizeof(bf16));
    w.sum = take(&at, panel / 32 * tiles * 512 * sizeof(float));
    w.now = take(&at, 1024 * sizeof(float));
#pragma omp for schedule(dynamic, 1) nowait
    for (int p = 0; p < n_panels; p++) {
      const int64_t column = (int64_t)p * panel, width = c->n - column < panel ? c->n - column : panel;
      multiply_panel(amx, c, w, ut, y, tiles, column, (int)(width + 31) / 32, out);
    }
    tiles_off(amx, &saved);
  }
}

/* out (R, N) float32 += u^T y for u (T, R) and y (T, N). Returns 0, or 1 when there is no memory. */
int rank_products(const RankCall *c, const bf16 *u, const bf16 *y, float *out) {
  const int64_t rounds = (c->n + c->n_threads * PANEL - 1) / (c->n_threads * PANEL); /* panels that each thread gets */
  const int panel = ((c->n + rounds * c->n_threads - 1) / (rounds * c->n_threads) + 31) / 32 * 32;
  const int tiles = (c->n_ranks + 31) / 32 * 2;
  const size_t packed = (size_t)((c->n_rows + 31) / 32) * tiles * TILE * sizeof(bf16);
  const size_t each = (size_t)PIECE * panel / 16 * TILE * sizeof(bf16) + ((size_t)panel / 32 * tiles * 512 + 1024) * sizeof(float);
  char *all = open_workspace(packed + c->n_threads * each), *at = all;
  if (!all) return 1;
  bf16 *ut = take(&at, packed);
  if (c->amx)
    multiply_ranks(1, c, u, y, out, panel, tiles, ut, at, each);
  else
    multiply_ranks(0, c, u, y, out, panel, tiles, ut, at, each);
  close_workspace(all);
  return 0;
}
