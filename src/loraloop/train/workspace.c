/* Memory that the kernels compute in, kept from call to call: fresh pages would cost a tenth of a large attention's time.

   The last block of memory that was given back is kept, in large pages where the system has them; it grows to the largest call.
   Two calls at one time get a block each. */
#define _GNU_SOURCE
#include "kernels.h"

#include <stdlib.h>
#include <sys/mman.h>

enum { LARGE_PAGE = 1 << 21 };

typedef struct {
  size_t bytes;
  char pad[56];
} Head; /* in front of the memory, so that a block knows its size */

static Head *kept;

void *open_workspace(size_t bytes) {
  Head *block = __atomic_exchange_n(&kept, NULL, __ATOMIC_ACQ_REL);
  if (block && block->bytes >= bytes) return block + 1;
  free(block);
  const size_t whole = (bytes + sizeof(Head) + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
  block = aligned_alloc(LARGE_PAGE, whole);
  if (!block) return NULL;
  madvise(block, whole, MADV_HUGEPAGE); /* a wish: where it is not met, nothing is lost */
  block->bytes = whole - sizeof(Head);
  return block + 1;
}

void close_workspace(void *memory) {
  Head *block = (Head *)memory - 1, *none = NULL;
  if (!__atomic_compare_exchange_n(&kept, &none, block, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) free(block);
}
