/*
 * Devices write guest RAM from any thread. Where such bytes were translated,
 * the ranges wait here until the vCPU attends to its poke, before it takes the
 * interrupt that tells the guest.
 */
#include "exec.h"

void mv_dma_written(void *ctx, uint64_t gpa, uint64_t len) {
  struct mv_vm *vm = ctx;
  for (unsigned i = 0; i < vm->nvcpus; i++) {
    struct mv_dbt *d = vm->vcpu[i]->impl;
    struct mv_dbt_exec *x = d->exec;
    if (!mv_cache_any_code(d, gpa, len))
      continue;
    pthread_mutex_lock(&x->dma_lock);
    if (x->ndma < sizeof x->dma / sizeof *x->dma)
      x->dma[x->ndma++] = (struct mv_dma_range){gpa, len};
    else
      x->dma_all = true;
    pthread_mutex_unlock(&x->dma_lock);
    mv_dbt_poke(d);
  }
}

void mv_dma_apply(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  if (!__atomic_load_n(&x->ndma, __ATOMIC_ACQUIRE))
    return;
  pthread_mutex_lock(&x->dma_lock);
  if (x->dma_all)
    mv_cache_flush(d);
  else
    for (unsigned i = 0; i < x->ndma; i++)
      mv_cache_written(d, x->dma[i].gpa, x->dma[i].len);
  x->ndma = 0;
  x->dma_all = false;
  pthread_mutex_unlock(&x->dma_lock);
}
