/* What the forward and the backward pass of the attention share: the call's arguments and the mask. */
#ifndef LORALOOP_ATTENTION_H
#define LORALOOP_ATTENTION_H

#include "tiles.h"

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

#endif
