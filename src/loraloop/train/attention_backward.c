/* Attention over a prefix tree, backward: the gradients of queries, keys and values.

   As in the forward pass, scores are transposed. A task is a block of keys of one key-value head against all the queries that see it:
   it owns the gradients of its keys and values. Additions to a query's gradient wait for their turn, which is by block of keys, so
   that results depend neither on the number of threads nor on their order. */
#include "attention.h"

#include <omp.h>
#include <sched.h>

enum { KEYS = 16, QUERIES = 4 }; /* groups in a block, of keys at most */

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
   `query_of`, since interleaving within 128 bits is one plain shuffle and needs no second rounding to bfloat16. */
INLINE void soften_backward(const Mask *m, const float *score, const float *d_p, const NextPair *next, const float *lse,
                            const float *delta, float scale, int masked, int key, int query, bf16 *p, bf16 *ds, bf16 *dst) {
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
INLINE void soften_pair(const Call *c, const Mask *m, const Packed *x, BackwardScratch w, const NextPair *now, const NextPair *next,
                        int head, int key_group, int query_group, int at) {
  const int q0 = 32 * query_group, q1 = smaller(q0 + 32, c->n_queries);
  const float *lse = x->lse + ((int64_t)head * m->n_query_groups * 32 + q0), *delta = x->delta + (lse - x->lse);
  const int64_t row = (at / QUERIES * 2 * QUERIES + at % QUERIES) * TILE;
  bf16 *p = w.p + row, *ds = w.ds + row, *dst = w.dst + at * 2 * TILE;
  if (sees_all(m->spans[key_group], q0, q1))
    soften_backward(m, now->score, now->d_p, next, lse, delta, c->scale, 0, 32 * key_group, q0, p, ds, dst);
  else
    soften_backward(m, now->score, now->d_p, next, lse, delta, c->scale, 1, 32 * key_group, q0, p, ds, dst);
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
      const int64_t tiles = (i & 1) * 1024;
      next[i & 1] = (NextPair){amx, dk, x->ka + k_at, x->va + k_at, x->qt + q_at, x->ot + q_at, w.score + tiles, w.d_p + tiles};
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
      const int64_t column = kv_head * c->dim + 16 * d;
      float *k_to = d_k + (j0 + j) * c->d_k_row + column, *v_to = d_v + (j0 + j) * c->d_v_row + column;
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
  while (block > 2 && (groups + block - 1) / block * c->n_kv_heads < (block == KEYS ? 6 : 3) * c->n_threads) block /= 2;
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
  char *all = open_workspace(bytes), *at = all;
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
  close_workspace(all);
  return 0;
}
