/* Attention over a prefix tree, forward, in bfloat16 with float32 scores, softmax and sums.

   Query i (of T) sees key j (of S) exactly when start[j] <= i < end[j]: the keys above the block are seen by all, a row's own key by
   the rows of its subtree. Scores are kept transposed (keys down, queries along the lanes), so that a query's maximum, sum and
   log-sum-exp are one lane and the probabilities are already the next product's operand. Groups of keys that no query of a group
   sees are never touched. Each output is owned by one task, so results do not depend on the number of threads. */
#include "attention.h"

#include <math.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CHUNK = 8 }; /* groups of keys whose scores exist at one time */

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
  /* the difference first: of two equal tops it is 0, where a fused product minus a rounded one is huge for a query that saw nothing yet */
  const __m512 alpha = exp2_ps(_mm512_mul_ps(_mm512_sub_ps(*top, new_top), factor));
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
  char *all = open_workspace(bytes), *at = all;
  if (!all) return 1;
  const Mask m = make_mask(c, end, &at);
  bf16 *ka = take(&at, packed), *vt = take(&at, packed);
  if (c->amx)
    forward(1, c, &m, q, k, v, out, lse, ka, vt, at);
  else
    forward(0, c, &m, q, k, v, out, lse, ka, vt, at);
  close_workspace(all);
  return 0;
}

/* Ask the kernel to let this process use the tile registers (ARCH_REQ_XCOMP_PERM of XTILEDATA); 1 when it does. */
int allow_amx(void) { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }
