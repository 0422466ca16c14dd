/* Attention over a prefix tree, forward and backward, in bfloat16 with float32 scores, softmax and sums.

   Query i (of T) sees key j (of S) exactly when start[j] <= i < end[j]: the keys above the block are seen by all, a row's own key by
   the rows of its subtree. All work is done in groups of 32 tokens. Scores are kept transposed (keys down, queries along the lanes),
   so that a query's maximum, sum and log-sum-exp are one lane and the probabilities are already the next product's operand.

   Operands are packed once into tiles of 1 KiB: "A" tiles hold 16 rows of 32 values along the inner dimension, "B" tiles hold 16
   pairs along the inner dimension of 16 columns. Both instruction sets, AMX and AVX512-BF16, read the same tiles.

   Results do not depend on the number of threads or on their order: each output is owned by one task, and the additions to a query's
   gradient wait for their turn. */
#include "kernels.h"

#include <math.h>
#include <omp.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { TILE = 512, GROUP = 32, CHUNK = 8, KEYS = 8, QUERIES = 4, MAX_DIM = 256 };

typedef struct {
  int64_t n_queries, n_keys, n_heads, n_kv_heads, dim;        /* T, S, Hq, Hkv, D */
  int64_t q_row, k_row, v_row, out_row, d_out_row, d_q_row;   /* values from one token to the next */
  int64_t d_k_row, d_v_row;
  int64_t n_threads, amx;
  double scale;
} Call;

/* Which queries a group of 32 keys is seen by: all of [lo_max, hi_min), none outside [lo_min, hi_max). */
typedef struct {
  int32_t lo_min, lo_max, hi_min, hi_max;
} Span;

typedef struct {
  int32_t *start, *end; /* one a key, padded to whole groups with keys that nobody sees */
  Span *spans;          /* one a group of keys */
  int n_key_groups, n_query_groups;
} Mask;

static const int IDENTITY[MAX_DIM / 32] = {0, 1, 2, 3, 4, 5, 6, 7};

INLINE void *take(char **at, size_t bytes) {
  void *p = *at;
  *at += (bytes + 63) & ~(size_t)63;
  return p;
}

INLINE int smaller(int a, int b) { return a < b ? a : b; }
INLINE int larger(int a, int b) { return a > b ? a : b; }

/* ---- tiles ---------------------------------------------------------------------------------------------------------------- */

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

/* ---- the product ------------------------------------------------------------------------------------------------------------ */

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

/* ---- the mask ---------------------------------------------------------------------------------------------------------------- */

static size_t mask_bytes(const Call *c) {
  const size_t groups = (c->n_keys + 31) / 32;
  return 2 * (groups * 32 * sizeof(int32_t) + 64) + groups * sizeof(Span) + 64;
}

static Mask make_mask(const Call *c, const int32_t *end, char **at) {
  Mask m;
  const int n_keys = c->n_keys, n_path = c->n_keys - c->n_queries;
  m.n_key_groups = (n_keys + 31) / 32;
  m.n_query_groups = (c->n_queries + 31) / 32;
  m.start = take(at, m.n_key_groups * 32 * sizeof(int32_t));
  m.end = take(at, m.n_key_groups * 32 * sizeof(int32_t));
  m.spans = take(at, m.n_key_groups * sizeof(Span));
  for (int j = 0; j < m.n_key_groups * 32; j++) {
    m.start[j] = j < n_path ? 0 : j - n_path;
    m.end[j] = j < n_path ? (int)c->n_queries : j < n_keys ? end[j - n_path] : 0;
  }
  for (int g = 0; g < m.n_key_groups; g++) {
    Span s = {INT32_MAX, 0, INT32_MAX, 0};
    for (int j = 32 * g; j < 32 * g + 32; j++) {
      s.lo_min = smaller(s.lo_min, m.start[j]);
      s.lo_max = larger(s.lo_max, m.start[j]);
      s.hi_min = smaller(s.hi_min, m.end[j]);
      s.hi_max = larger(s.hi_max, m.end[j]);
    }
    m.spans[g] = s;
  }
  return m;
}

INLINE int sees_any(Span s, int from, int to) { return to > s.lo_min && from < s.hi_max; }
INLINE int sees_all(Span s, int from, int to) { return from >= s.lo_max && to <= s.hi_min; }

/* The lanes (queries from q0 on) that see key j. */
INLINE __mmask16 seen_by(const Mask *m, int j, __m512i queries) {
  const __mmask16 after = _mm512_cmpge_epi32_mask(queries, _mm512_set1_epi32(m->start[j]));
  return _mm512_mask_cmplt_epi32_mask(after, queries, _mm512_set1_epi32(m->end[j]));
}

INLINE __m512i lanes_from(int q0) {
  return _mm512_add_epi32(_mm512_set1_epi32(q0), _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}

/* Two rows of 16 to bfloat16, interleaved: a row of a B tile. */
INLINE __m512i interleaved(__m512i rows) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                         18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, rows);
}

INLINE __m512i two_rows(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

/* ---- forward ------------------------------------------------------------------------------------------------------------------ */

typedef struct {
  bf16 *q;      /* q^T as B, one group */
  float *score; /* two chunks, [CHUNK][2 key tiles][2 query tiles] */
  bf16 *p;      /* the probabilities as B, [CHUNK][2 query tiles] */
  float *out;   /* out^T, [dim / 16][2 query tiles] */
  int *seen;    /* the groups of keys that this group of queries sees */
} ForwardScratch;

/* The chunk of scores that comes next: its products run in the tile unit while the vector units do the exponentials of this one. */
typedef struct {
  int amx, n, dk;
  float *score;
  const bf16 *k, *q;
  const int *seen;
} Next;

/* Half of one group's scores: 16 keys, 32 queries. */
INLINE void score_half(const Next *x, int group, int half) {
  multiply_row(x->amx, x->score + (4 * group + 2 * half) * 256, 256,
               OPERAND(x->k + (2 * x->seen[group] + half) * x->dk * TILE, 0, TILE, IDENTITY),
               OPERAND(x->q, x->dk * TILE, TILE, IDENTITY), x->dk);
}

/* Scores of one tile of 16 queries against a chunk of n groups of keys, to probabilities; returns the factor for what was summed before. */
INLINE __m512 soften(const float *score, bf16 *p, int n, float scale, __m512 *top, __m512 *sum, const Next *next, int half) {
  __m512 m[4] = {*top, *top, *top, *top};
  for (int g = 0; g < n; g++)
    for (int t = 0; t < 2; t++) {
      const float *tile = score + (4 * g + 2 * t) * 256;
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) m[r & 3] = _mm512_max_ps(m[r & 3], _mm512_load_ps(tile + 16 * r));
    }
  const __m512 factor = _mm512_set1_ps(scale * 1.44269504088896341f);
  const __m512 new_top = _mm512_max_ps(_mm512_max_ps(m[0], m[1]), _mm512_max_ps(m[2], m[3]));
  const __m512 shift = _mm512_mul_ps(new_top, factor);
  const __m512 alpha = exp2_ps(_mm512_fmsub_ps(*top, factor, shift));
  __m512 s[2] = {_mm512_mul_ps(*sum, alpha), _mm512_setzero_ps()};
  for (int g = 0; g < n; g++) {
    if (g < next->n) score_half(next, g, half);
    for (int t = 0; t < 2; t++) {
      const float *tile = score + (4 * g + 2 * t) * 256;
      bf16 *to = p + 2 * g * TILE + 256 * t;
#pragma GCC unroll 8
      for (int r = 0; r < 16; r += 2) {
        const __m512 first = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(tile + 16 * r), factor, shift));
        const __m512 second = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(tile + 16 * r + 16), factor, shift));
        s[0] = _mm512_add_ps(s[0], first);
        s[1] = _mm512_add_ps(s[1], second);
        _mm512_store_si512((void *)(to + 16 * r), interleaved(two_rows(first, second)));
      }
    }
  }
  *top = new_top;
  *sum = _mm512_add_ps(s[0], s[1]);
  return alpha;
}

/* Scores that must not be seen become minus infinity. */
static void hide(const Mask *m, float *score, int group, int q0) {
  for (int j = 0; j < 2; j++) {
    const __m512i queries = lanes_from(q0 + 16 * j);
    for (int r = 0; r < 32; r++) {
      float *row = score + (2 * (r / 16) + j) * 256 + 16 * (r % 16);
      _mm512_mask_store_ps(row, _mm512_knot(seen_by(m, 32 * group + r, queries)), _mm512_set1_ps(-INFINITY));
    }
  }
}

/* One head's output and log-sum-exp of 32 queries; k as A and v^T as A are one key-value head's packed groups. */
INLINE void forward_group(int amx, const Call *c, const Mask *m, ForwardScratch w, const bf16 *q, const bf16 *k, const bf16 *vt, int group,
                          bf16 *out, float *lse) {
  const int dim = c->dim, dk = (dim + 31) / 32, q0 = 32 * group, q1 = smaller(q0 + 32, c->n_queries);
  pack(q + q0 * c->q_row, c->q_row, q1 - q0, dim, NULL, w.q, NULL, NULL);
  int n_seen = 0;
  for (int g = 0; g < m->n_key_groups; g++)
    if (sees_any(m->spans[g], q0, q1)) w.seen[n_seen++] = g;
  __m512 top[2] = {_mm512_set1_ps(-1e30f), _mm512_set1_ps(-1e30f)}, sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  Next next = {amx, smaller(CHUNK, n_seen), dk, w.score, k, w.q, w.seen};
  for (int g = 0; g < 2 * next.n; g++) score_half(&next, g / 2, g % 2);
  for (int from = 0; from < n_seen; from += CHUNK) {
    const int n = next.n, *seen = next.seen;
    float *score = next.score;
    for (int g = 0; g < n; g++)
      if (!sees_all(m->spans[seen[g]], q0, q1)) hide(m, score + 4 * g * 256, seen[g], q0);
    next.n = larger(0, smaller(CHUNK, n_seen - from - CHUNK));
    next.seen = seen + CHUNK;
    next.score = w.score + (score == w.score ? CHUNK * 4 * 256 : 0);
    for (int j = 0; j < 2; j++) {
      const __m512 alpha = soften(score + 256 * j, w.p + TILE * j, n, c->scale, &top[j], &sum[j], &next, j);
      if (from && _mm512_cmp_ps_mask(alpha, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ))
        for (int d = 0; d < 2 * dk; d++)
          for (int r = 0; r < 16; r++) {
            float *row = w.out + (2 * d + j) * 256 + 16 * r;
            _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), alpha));
          }
    }
    for (int d = 0; d < 2 * dk; d += 2)
      multiply(amx, w.out + 2 * d * 256, 512, 256, OPERAND(vt + d * TILE, TILE, 2 * dk * TILE, seen),
               OPERAND(w.p, TILE, 2 * TILE, IDENTITY), n, from > 0);
  }
  for (int j = 0; j < 2; j++) {
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[j]);
    for (int d = 0; d < dim / 16; d++)
      unpack(w.out + (2 * d + j) * 256, inverse, out + (q0 + 16 * j) * c->out_row + 16 * d, c->out_row, q1 - q0 - 16 * j);
    float tops[16], sums[16];
    _mm512_storeu_ps(tops, top[j]);
    _mm512_storeu_ps(sums, sum[j]);
    for (int i = 0; i < 16 && q0 + 16 * j + i < q1; i++) lse[q0 + 16 * j + i] = tops[i] * (float)c->scale + logf(sums[i]);
  }
}

static size_t forward_bytes(const Call *c) {
  const size_t dt = 2 * ((c->dim + 31) / 32);
  const size_t bytes = dt * TILE * sizeof(bf16) + CHUNK * (8 * 256 * sizeof(float) + 2 * TILE * sizeof(bf16)) +
                       dt * 2 * 256 * sizeof(float) + (c->n_keys / 32 + 1) * sizeof(int);
  return (bytes + 1024) & ~(size_t)63;
}

INLINE void forward(int amx, const Call *c, const Mask *m, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, float *lse, bf16 *ka,
                    bf16 *vt, char *scratch) {
  const int dk = (c->dim + 31) / 32, n_kv = c->n_kv_heads, grouped = c->n_heads / n_kv;
  const int64_t one = (int64_t)2 * dk * TILE, head = m->n_key_groups * one;
  const size_t each = forward_bytes(c);
#pragma omp parallel num_threads((int)c->n_threads)
  {
#pragma omp for schedule(static) collapse(2)
    for (int h = 0; h < n_kv; h++)
      for (int g = 0; g < m->n_key_groups; g++) {
        const int n = smaller(32, c->n_keys - 32 * g);
        pack(k + 32 * g * c->k_row + h * c->dim, c->k_row, n, c->dim, ka + h * head + g * one, NULL, NULL, NULL);
        pack(v + 32 * g * c->v_row + h * c->dim, c->v_row, n, c->dim, NULL, NULL, NULL, vt + h * head + g * one);
      }
    TileState saved;
    tiles_on(amx, &saved);
    char *at = scratch + omp_get_thread_num() * each;
    ForwardScratch w;
    w.q = take(&at, one * sizeof(bf16));
    w.score = take(&at, CHUNK * 8 * 256 * sizeof(float));
    w.p = take(&at, CHUNK * 2 * TILE * sizeof(bf16));
    w.out = take(&at, 2 * dk * 2 * 256 * sizeof(float));
    w.seen = take(&at, m->n_key_groups * sizeof(int));
#pragma omp for schedule(dynamic, 1) nowait
    for (int task = 0; task < n_kv * m->n_query_groups * grouped; task++) {
      const int h = task / (m->n_query_groups * grouped), rest = task % (m->n_query_groups * grouped);
      const int head_q = h * grouped + rest % grouped, group = m->n_query_groups - 1 - rest / grouped; /* the longest first */
      forward_group(amx, c, m, w, q + head_q * c->dim, ka + h * head, vt + h * head, group, out + head_q * c->dim,
                    lse + head_q * c->n_queries);
    }
    tiles_off(amx, &saved);
  }
}

/* Returns 0, or 1 when there is no memory. `end`: the end of the subtree of each of the T rows. */
int attention_forward(const Call *c, const bf16 *q, const bf16 *k, const bf16 *v, const int32_t *end, bf16 *out, float *lse) {
  const size_t packed = (size_t)c->n_kv_heads * ((c->n_keys + 31) / 32) * 2 * ((c->dim + 31) / 32) * TILE * sizeof(bf16);
  const size_t bytes = mask_bytes(c) + 2 * packed + c->n_threads * forward_bytes(c) + 1024;
  char *all = aligned_alloc(64, (bytes + 63) & ~(size_t)63), *at = all;
  if (!all) return 1;
  const Mask m = make_mask(c, end, &at);
  bf16 *ka = take(&at, packed), *vt = take(&at, packed);
  if (c->amx)
    forward(1, c, &m, q, k, v, out, lse, ka, vt, at);
  else
    forward(0, c, &m, q, k, v, out, lse, ka, vt, at);
  free(all);
  return 0;
}

/* ---- backward ----------------------------------------------------------------------------------------------------------------- */

typedef struct {
  bf16 *ka, *kt, *va;            /* a key-value head and group of 32 keys: k as A, k^T as A, v as A */
  bf16 *qt, *qb, *ot, *ob;       /* a query head and group of 32 queries: q and d_out, transposed and not, as B */
  float *lse, *delta;            /* (heads, padded queries): log-sum-exp in powers of two; sum of d_out * out, scaled */
  float *dq;                     /* d_q^T: [head][query group][dim / 16][2 query tiles] */
  int32_t *turn;                 /* [head][query block]: how many blocks of keys have added to d_q */
  int block;                     /* groups in a block of keys, at most KEYS */
  const int32_t *rank;           /* [key block][query block]: whose turn a block of keys waits for; -1 where nothing is seen */
} Packed;

typedef struct {
  float *score, *d_p;            /* 2 x 2 tiles, twice: what is worked on, and what the tile unit makes meanwhile */
  bf16 *p, *ds, *dst;            /* p^T and dS^T as A: [2 KEYS key tiles][QUERIES query groups]; dS^T as B: [KEYS][QUERIES][2] */
  float *dk, *dv;                /* [2 KEYS key tiles][dim / 16] */
} BackwardScratch;

/* The scores and d_p of the pair of groups that comes next; NULL tiles where none does. */
typedef struct {
  int amx, dk;
  const bf16 *k, *v, *q, *d_out;
  float *score, *d_p;
} NextPair;

/* A quarter of the pair's products: 16 keys, 32 queries, of scores or of d_p. */
INLINE void score_quarter(const NextPair *x, int quarter) {
  const int half = quarter & 1;
  multiply_row(x->amx, (quarter < 2 ? x->score : x->d_p) + 512 * half, 256,
               OPERAND((quarter < 2 ? x->k : x->v) + half * x->dk * TILE, 0, TILE, IDENTITY),
               OPERAND(quarter < 2 ? x->q : x->d_out, x->dk * TILE, TILE, IDENTITY), x->dk);
}

/* One group of keys against one of queries: from scores and d_p to p and dS. The columns of dS^T as B come in the order of
   `query_of`: interleaving whole rows within 128 bits costs a third of putting them in order. */
INLINE void soften_backward(const Mask *m, const float *score, const float *d_p, const NextPair *next, const float *lse, const float *delta, float scale, int masked, int key,
                            int query, bf16 *p, bf16 *ds, bf16 *dst) {
  const __m512 factor = _mm512_set1_ps(scale * 1.44269504088896341f), by = _mm512_set1_ps(scale);
  const __m512 lse0 = _mm512_load_ps(lse), lse1 = _mm512_load_ps(lse + 16);
  const __m512 delta0 = _mm512_load_ps(delta), delta1 = _mm512_load_ps(delta + 16);
  const __m512i queries0 = lanes_from(query), queries1 = lanes_from(query + 16);
  for (int t = 0; t < 2; t++)
    for (int r = 0; r < 16; r += 2) {
      if (r % 8 == 0 && next) score_quarter(next, 2 * t + r / 8);
      __m512i rows[2];
#pragma GCC unroll 2
      for (int o = 0; o < 2; o++) {
        const int at = 512 * t + 16 * (r + o);
        __m512 p0 = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(score + at), factor, lse0));
        __m512 p1 = exp2_ps(_mm512_fmsub_ps(_mm512_load_ps(score + at + 256), factor, lse1));
        if (masked) {
          p0 = _mm512_maskz_mov_ps(seen_by(m, key + 16 * t + r + o, queries0), p0);
          p1 = _mm512_maskz_mov_ps(seen_by(m, key + 16 * t + r + o, queries1), p1);
        }
        const __m512 ds0 = _mm512_mul_ps(p0, _mm512_fmsub_ps(_mm512_load_ps(d_p + at), by, delta0));
        const __m512 ds1 = _mm512_mul_ps(p1, _mm512_fmsub_ps(_mm512_load_ps(d_p + at + 256), by, delta1));
        _mm512_store_si512((void *)(p + t * QUERIES * TILE + 32 * (r + o)), two_rows(p0, p1));
        rows[o] = two_rows(ds0, ds1);
        _mm512_store_si512((void *)(ds + t * QUERIES * TILE + 32 * (r + o)), rows[o]);
      }
      _mm512_store_si512((void *)(dst + 256 * t + 16 * r), _mm512_unpacklo_epi16(rows[0], rows[1]));
      _mm512_store_si512((void *)(dst + TILE + 256 * t + 16 * r), _mm512_unpackhi_epi16(rows[0], rows[1]));
    }
}

/* The query, of 32, that column i of tile j of dS^T stands for. */
INLINE int query_of(int j, int i) { return 8 * (i / 4) + 4 * j + i % 4; }

static void wait_turn(int32_t *turn, int32_t rank) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != rank; spins++)
    if (spins < 1000)
      _mm_pause();
    else
      sched_yield();
}

/* soften_backward of the pair `at` (key group of the block * QUERIES + query group) of a head, with or without a mask. */
INLINE void soften_pair(const Call *c, const Mask *m, const Packed *x, BackwardScratch w, const NextPair *now, const NextPair *next, int head,
                        int key_group, int query_group, int at) {
  const int q0 = 32 * query_group, q1 = smaller(q0 + 32, c->n_queries);
  const float *lse = x->lse + ((int64_t)head * m->n_query_groups * 32 + q0), *delta = x->delta + (lse - x->lse);
  const int64_t row = (at / QUERIES * 2 * QUERIES + at % QUERIES) * TILE;
  if (sees_all(m->spans[key_group], q0, q1))
    soften_backward(m, now->score, now->d_p, next, lse, delta, c->scale, 0, 32 * key_group, q0, w.p + row, w.ds + row, w.dst + at * 2 * TILE);
  else
    soften_backward(m, now->score, now->d_p, next, lse, delta, c->scale, 1, 32 * key_group, q0, w.p + row, w.ds + row, w.dst + at * 2 * TILE);
}

/* What one block of keys of one key-value head gives and gets from one block of queries of one head. */
INLINE void backward_pair(int amx, const Call *c, const Mask *m, const Packed *x, BackwardScratch w, int kv_head, int head, int key_block,
                          int query_block) {
  const int dk = (c->dim + 31) / 32, dt = 2 * dk;
  const int kg0 = key_block * x->block, kgs = smaller(x->block, m->n_key_groups - kg0);
  const int qg0 = query_block * QUERIES, qgs = smaller(QUERIES, m->n_query_groups - qg0);
  const int64_t one = (int64_t)dt * TILE, key_at = (int64_t)(kv_head * m->n_key_groups + kg0) * one;
  const int64_t query_at = ((int64_t)head * m->n_query_groups + qg0) * one;
  int by_key[KEYS][QUERIES], n_by_key[KEYS] = {0}, by_query[QUERIES][KEYS], n_by_query[QUERIES] = {0};
  int pairs[KEYS * QUERIES], n_pairs = 0;
  for (int qg = 0; qg < qgs; qg++)
    for (int kg = 0; kg < kgs; kg++) {
      const int q0 = 32 * (qg0 + qg), q1 = smaller(q0 + 32, c->n_queries);
      const Span span = m->spans[kg0 + kg];
      if (!sees_any(span, q0, q1)) continue;
      by_key[kg][n_by_key[kg]++] = qg;
      by_query[qg][n_by_query[qg]++] = kg;
      pairs[n_pairs++] = kg * QUERIES + qg;
    }
  NextPair next[2];
  for (int i = 0; i <= n_pairs; i++) {
    if (i < n_pairs) {
      const int64_t k_at = key_at + pairs[i] / QUERIES * one, q_at = query_at + pairs[i] % QUERIES * one;
      next[i & 1] = (NextPair){amx, dk, x->ka + k_at, x->va + k_at, x->qt + q_at, x->ot + q_at, w.score + (i & 1) * 1024, w.d_p + (i & 1) * 1024};
    }
    if (i == 0)
      for (int quarter = 0; quarter < 4 && n_pairs; quarter++) score_quarter(&next[0], quarter);
    else
      soften_pair(c, m, x, w, &next[(i - 1) & 1], i < n_pairs ? &next[i & 1] : NULL, head, kg0 + pairs[i - 1] / QUERIES,
                  qg0 + pairs[i - 1] % QUERIES, pairs[i - 1]);
  }
  for (int kg = 0; kg < kgs; kg++)
    for (int d = 0; d < dt && n_by_key[kg]; d += 2) {
      float *dv = w.dv + (2 * kg * dt + d) * 256, *d_k = w.dk + (dv - w.dv);
      multiply(amx, dv, dt * 256, 256, OPERAND(w.p + 2 * kg * QUERIES * TILE, QUERIES * TILE, TILE, by_key[kg]),
               OPERAND(x->ob + query_at + d * TILE, TILE, one, by_key[kg]), n_by_key[kg], 1);
      multiply(amx, d_k, dt * 256, 256, OPERAND(w.ds + 2 * kg * QUERIES * TILE, QUERIES * TILE, TILE, by_key[kg]),
               OPERAND(x->qb + query_at + d * TILE, TILE, one, by_key[kg]), n_by_key[kg], 1);
    }
  const int n_query_blocks = (m->n_query_groups + QUERIES - 1) / QUERIES;
  int32_t *turn = x->turn + head * n_query_blocks + query_block;
  const int32_t rank = x->rank[key_block * n_query_blocks + query_block];
  wait_turn(turn, rank);
  for (int qg = 0; qg < qgs; qg++)
    for (int d = 0; d < dt && n_by_query[qg]; d += 2)
      multiply(amx, x->dq + (query_at + qg * one) + 2 * d * 256, 512, 256, OPERAND(x->kt + key_at + d * TILE, TILE, one, by_query[qg]),
               OPERAND(w.dst + 2 * qg * TILE, TILE, 2 * QUERIES * TILE, by_query[qg]), n_by_query[qg], 1);
  __atomic_store_n(turn, rank + 1, __ATOMIC_RELEASE);
}

static size_t backward_bytes(const Call *c) {
  const size_t dt = 2 * ((c->dim + 31) / 32);
  const size_t bytes = 2 * 8 * 256 * sizeof(float) + 3 * 2 * KEYS * QUERIES * TILE * sizeof(bf16) + 2 * 2 * KEYS * dt * 256 * sizeof(float);
  return (bytes + 1024) & ~(size_t)63;
}

/* Pack the queries of one head and group, and take the sums of d_out * out. */
static void prepare_queries(const Call *c, const Packed *x, int n_groups, int head, int group, const bf16 *q, const bf16 *d_out,
                            const bf16 *out, const float *lse) {
  const int dim = c->dim, q0 = 32 * group, n = smaller(32, c->n_queries - q0);
  const int64_t one = (int64_t)2 * ((dim + 31) / 32) * TILE, at = ((int64_t)head * n_groups + group) * one;
  const bf16 *d_row = d_out + q0 * c->d_out_row + head * dim, *row = out + q0 * c->out_row + head * dim;
  pack(q + q0 * c->q_row + head * dim, c->q_row, n, dim, NULL, x->qt + at, x->qb + at, NULL);
  pack(d_row, c->d_out_row, n, dim, NULL, x->ot + at, x->ob + at, NULL);
  memset(x->dq + at, 0, one * sizeof(float));
  for (int i = 0; i < 32; i++) {
    __m512 sum = _mm512_setzero_ps();
    for (int d = 0; d < dim && i < n; d += 16)
      sum = _mm512_fmadd_ps(load_bf16(d_row + i * c->d_out_row + d), load_bf16(row + i * c->out_row + d), sum);
    const int64_t to = ((int64_t)head * n_groups + group) * 32 + i;
    x->delta[to] = (float)c->scale * _mm512_reduce_add_ps(sum);
    x->lse[to] = i < n ? lse[head * c->n_queries + q0 + i] * 1.44269504088896341f : 1e30f; /* nobody's query: probability 0 */
  }
}

/* One block of keys of one key-value head against all that see it; adds to d_k and d_v. */
INLINE void backward_block(int amx, const Call *c, const Mask *m, const Packed *x, BackwardScratch w, int kv_head, int block, float *d_k,
                           float *d_v) {
  const int dt = 2 * ((c->dim + 31) / 32), grouped = c->n_heads / c->n_kv_heads;
  const int n_query_blocks = (m->n_query_groups + QUERIES - 1) / QUERIES;
  memset(w.dk, 0, 2 * x->block * dt * 256 * sizeof(float));
  memset(w.dv, 0, 2 * x->block * dt * 256 * sizeof(float));
  for (int head = kv_head * grouped; head < (kv_head + 1) * grouped; head++)
    for (int query_block = 0; query_block < n_query_blocks; query_block++)
      if (x->rank[block * n_query_blocks + query_block] >= 0) backward_pair(amx, c, m, x, w, kv_head, head, block, query_block);
  const int j0 = 32 * x->block * block, n = smaller(32 * x->block, c->n_keys - j0);
  for (int j = 0; j < n; j++)
    for (int d = 0; d < c->dim / 16; d++) {
      const int64_t tile = (j / 16 * dt + d) * 256 + 16 * (j % 16);
      float *k_to = d_k + (j0 + j) * c->d_k_row + kv_head * c->dim + 16 * d, *v_to = d_v + (j0 + j) * c->d_v_row + kv_head * c->dim + 16 * d;
      _mm512_storeu_ps(k_to, _mm512_add_ps(_mm512_loadu_ps(k_to), _mm512_load_ps(w.dk + tile)));
      _mm512_storeu_ps(v_to, _mm512_add_ps(_mm512_loadu_ps(v_to), _mm512_load_ps(w.dv + tile)));
    }
}

/* One head's gradient of 32 queries, from its transposed float32 form with permuted columns. */
static void finish_queries(const Call *c, const Packed *x, int n_groups, int head, int group, bf16 *d_q) {
  const int64_t one = (int64_t)2 * ((c->dim + 31) / 32) * TILE;
  const float *from = x->dq + ((int64_t)head * n_groups + group) * one;
  for (int j = 0; j < 2; j++)
    for (int d = 0; d < c->dim / 16; d++) {
      __m512i r[16];
      for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512((const void *)(from + (2 * d + j) * 256 + 16 * i));
      transpose(r);
      for (int i = 0; i < 16; i++) {
        const int64_t query = 32 * group + query_of(j, i);
        if (query < c->n_queries) store_bf16(d_q + query * c->d_q_row + head * c->dim + 16 * d, _mm512_castsi512_ps(r[i]));
      }
    }
}

typedef struct {
  const bf16 *d_out, *q, *k, *v, *out;
  const float *lse;
  float *d_k, *d_v;
  bf16 *d_q;
} BackwardTensors;

INLINE void backward(int amx, const Call *c, const Mask *m, const Packed *x, const BackwardTensors *t, char *scratch) {
  const int n_kv = c->n_kv_heads, n_heads = c->n_heads, dt = 2 * ((c->dim + 31) / 32);
  const int n_blocks = (m->n_key_groups + x->block - 1) / x->block;
  const size_t each = backward_bytes(c);
#pragma omp parallel num_threads((int)c->n_threads)
  {
#pragma omp for schedule(static) collapse(2) nowait
    for (int h = 0; h < n_heads; h++)
      for (int g = 0; g < m->n_query_groups; g++) prepare_queries(c, x, m->n_query_groups, h, g, t->q, t->d_out, t->out, t->lse);
#pragma omp for schedule(static) collapse(2)
    for (int h = 0; h < n_kv; h++)
      for (int g = 0; g < m->n_key_groups; g++) {
        const int n = smaller(32, c->n_keys - 32 * g);
        const int64_t at = ((int64_t)h * m->n_key_groups + g) * dt * TILE;
        pack(t->k + 32 * g * c->k_row + h * c->dim, c->k_row, n, c->dim, x->ka + at, NULL, NULL, x->kt + at);
        pack(t->v + 32 * g * c->v_row + h * c->dim, c->v_row, n, c->dim, x->va + at, NULL, NULL, NULL);
      }
    TileState saved;
    tiles_on(amx, &saved);
    char *at = scratch + omp_get_thread_num() * each;
    BackwardScratch w;
    w.score = take(&at, 8 * 256 * sizeof(float));
    w.d_p = take(&at, 8 * 256 * sizeof(float));
    w.p = take(&at, 2 * KEYS * QUERIES * TILE * sizeof(bf16));
    w.ds = take(&at, 2 * KEYS * QUERIES * TILE * sizeof(bf16));
    w.dst = take(&at, 2 * KEYS * QUERIES * TILE * sizeof(bf16));
    w.dk = take(&at, 2 * KEYS * dt * 256 * sizeof(float));
    w.dv = take(&at, 2 * KEYS * dt * 256 * sizeof(float));
    /* Tasks start in this order, so that whoever waits for its turn waits for one that has started. */
#pragma omp for schedule(monotonic : dynamic, 1)
    for (int task = 0; task < n_blocks * n_kv; task++) backward_block(amx, c, m, x, w, task % n_kv, task / n_kv, t->d_k, t->d_v);
    tiles_off(amx, &saved);
#pragma omp for schedule(static) collapse(2)
    for (int h = 0; h < n_heads; h++)
      for (int g = 0; g < m->n_query_groups; g++) finish_queries(c, x, m->n_query_groups, h, g, t->d_q);
  }
}

/* Which blocks of keys meet which blocks of queries, and the order in which they add to the queries' gradient. */
static void rank_blocks(const Call *c, const Mask *m, int block, int32_t *rank) {
  const int n_keys = (m->n_key_groups + block - 1) / block, n_queries = (m->n_query_groups + QUERIES - 1) / QUERIES;
  for (int qb = 0; qb < n_queries; qb++) {
    int next = 0;
    const int q0 = 32 * QUERIES * qb, q1 = smaller(q0 + 32 * QUERIES, c->n_queries);
    for (int kb = 0; kb < n_keys; kb++) {
      int any = 0;
      for (int g = kb * block; g < smaller((kb + 1) * block, m->n_key_groups); g++) any |= sees_any(m->spans[g], q0, q1);
      rank[kb * n_queries + qb] = any ? next++ : -1;
    }
  }
}

/* How many groups of keys make a task: large ones read the queries less often, small ones give every thread something to do. The
   choice changes no result, because sums over keys and over queries run in the same order. */
static int key_block(const Call *c) {
  const int64_t groups = (c->n_keys + 31) / 32;
  int block = KEYS;
  while (block > 2 && (groups + block - 1) / block * c->n_kv_heads < 3 * c->n_threads) block /= 2;
  return block;
}

/* d_q is written; d_k and d_v (float32) are added to. Returns 0, or 1 when there is no memory. */
int attention_backward(const Call *c, const bf16 *d_out, const bf16 *q, const bf16 *k, const bf16 *v, const bf16 *out, const float *lse,
                       const int32_t *end, bf16 *d_q, float *d_k, float *d_v) {
  const size_t key_groups = (c->n_keys + 31) / 32, query_groups = (c->n_queries + 31) / 32, one = 2 * ((c->dim + 31) / 32) * TILE;
  const size_t block = key_block(c);
  const size_t key_blocks = (key_groups + block - 1) / block, query_blocks = (query_groups + QUERIES - 1) / QUERIES;
  const size_t keys = c->n_kv_heads * key_groups * one * sizeof(bf16), queries = c->n_heads * query_groups * one * sizeof(bf16);
  const size_t rows = c->n_heads * query_groups * 32 * sizeof(float), turns = c->n_heads * query_blocks * sizeof(int32_t);
  const size_t ranks = key_blocks * query_blocks * sizeof(int32_t);
  const size_t bytes = mask_bytes(c) + 3 * keys + 6 * queries + 2 * rows + turns + ranks + c->n_threads * backward_bytes(c) + 2048;
  char *all = aligned_alloc(64, (bytes + 63) & ~(size_t)63), *at = all;
  if (!all) return 1;
  const Mask m = make_mask(c, end, &at);
  int32_t *rank = take(&at, ranks);
  Packed x;
  x.ka = take(&at, keys), x.kt = take(&at, keys), x.va = take(&at, keys);
  x.qt = take(&at, queries), x.qb = take(&at, queries), x.ot = take(&at, queries), x.ob = take(&at, queries);
  x.dq = take(&at, 2 * queries);
  x.lse = take(&at, rows), x.delta = take(&at, rows);
  x.turn = take(&at, turns);
  x.rank = rank;
  x.block = block;
  memset(x.turn, 0, turns);
  rank_blocks(c, &m, block, rank);
  const BackwardTensors t = {d_out, q, k, v, out, lse, d_k, d_v, d_q};
  if (c->amx)
    backward(1, c, &m, &x, &t, at);
  else
    backward(0, c, &m, &x, &t, at);
  free(all);
  return 0;
}

/* Ask the kernel to let this process use the tile registers (ARCH_REQ_XCOMP_PERM of XTILEDATA); 1 when it does. */
int allow_amx(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
