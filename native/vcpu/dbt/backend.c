/*
 * The translator as a vCPU backend (mv_vcpu_ops): make, end, state in and out.
 */
#define _GNU_SOURCE
#include <cpuid.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "apic.h"
#include "exec.h"
#include "saved.h"
#include "system.h"

#define MODE_LOCAL (MV_MODE_NOFPU | MV_MODE_NOSSE | MV_MODE_NOAVX | MV_MODE_NOT64)

/* ======================= exceptions ===================================== */

int mv_dbt_raise(struct mv_dbt *d, unsigned vector) {
  d->exc_vector = (uint8_t)vector;
  d->exc_has_code = false;
  d->exc_code = 0;
  return -1;
}
int mv_dbt_raise_code(struct mv_dbt *d, unsigned vector, uint32_t code) {
  d->exc_vector = (uint8_t)vector;
  d->exc_has_code = true;
  d->exc_code = code;
  return -1;
}
int mv_dbt_raise_pf(struct mv_dbt *d, uint64_t gva, uint32_t code) {
  d->cr2 = gva;
  return mv_dbt_raise_code(d, MV_EXC_PF, code);
}

/* ======================= mode =========================================== */

void mv_mmu_mode_changed(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  uint32_t mode = d->cpl == 3 ? MV_MODE_USER : 0;
  if (d->cr0 & (MV_CR0_EM | MV_CR0_TS))
    mode |= MV_MODE_NOFPU;
  if (!(d->cr4 & MV_CR4_OSFXSR))
    mode |= MV_MODE_NOSSE;
  if (!(d->cr4 & MV_CR4_OSXSAVE) || (d->xcr0 & 6) != 6)
    mode |= MV_MODE_NOAVX;
  if (!mv_is_code64(d))
    mode |= MV_MODE_NOT64;
  bool tsd = d->cr4 & MV_CR4_TSD;
  if (tsd != x->tsd) {
    x->tsd = tsd;
    mv_cache_flush(d);
  } else if ((mode ^ x->mode) & MODE_LOCAL) {
    mv_cache_forget_jumps(d);
  }
  if (mode != x->mode)
    x->epoch++;
  x->mode = mode;
}

/* ======================= life =========================================== */

static uint64_t dbt_bytes(void) {
  return (sizeof(struct mv_dbt) + 0x1fffff) & ~0x1fffffull;
}

/* struct mv_dbt is touched all over when it is made: one huge page if it can
 * be had. */
static struct mv_dbt *dbt_alloc(void) {
  uint64_t size = dbt_bytes(), huge = 2ull << 20;
  uint8_t *p = mmap(NULL, size + huge, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED)
    return NULL;
  uint64_t skip = -(uint64_t)(uintptr_t)p & (huge - 1);
  if (skip)
    munmap(p, skip);
  munmap(p + skip + size, huge - skip);
  madvise(p + skip, size, MADV_HUGEPAGE);
  return (struct mv_dbt *)(p + skip);
}

static int fpu_init(struct mv_dbt_exec *x) {
  unsigned a, b, c, dx;
  __cpuid_count(0xd, 0, a, b, c, dx);
  x->fpu_mask = a & 7; /* x87, SSE, AVX                                       */
  x->fpu_size = x->fpu_mask & 4 ? 832 : 576;
  x->fpu = aligned_alloc(64, 4096);
  if (!x->fpu)
    return -ENOMEM;
  __builtin_memset(x->fpu, 0, 4096);
  *(uint16_t *)x->fpu = 0x37f;         /* FCW after FNINIT                    */
  *(uint32_t *)(x->fpu + 24) = 0x1f80; /* MXCSR                               */
  x->fpu[512] = (uint8_t)x->fpu_mask;  /* XSTATE_BV                           */
  return 0;
}

static void destroy(struct mv_vcpu *vcpu) {
  struct mv_dbt *d = vcpu->impl;
  if (!d)
    return;
  mv_system_destroy(d);
  if (d->exec) {
    mv_saved_close(d->exec->saved);
    mv_cache_destroy(d);
    pthread_mutex_destroy(&d->exec->dma_lock);
    free(d->exec->fpu);
    mv_signal_stack_free(d->exec->alt_stack);
    free(d->exec);
  }
  if (d->mmu)
    mv_mmu_destroy(d);
  munmap(d, dbt_bytes());
  vcpu->impl = NULL;
}

static void set_tramps(struct mv_dbt *d) {
  const char *tramp[MV_TRAMP_COUNT] = {
      [MV_TRAMP_MEM] = mv_tramp_mem,
      [MV_TRAMP_LINK] = mv_tramp_link,
      [MV_TRAMP_INDIRECT] = mv_tramp_indirect,
      [MV_TRAMP_GUARD] = mv_tramp_guard,
      [MV_TRAMP_INSN] = mv_tramp_insn,
      [MV_TRAMP_RAISE] = mv_tramp_raise,
      [MV_TRAMP_BOUNCE_IN] = mv_tramp_bounce_in,
      [MV_TRAMP_BOUNCE_OUT] = mv_tramp_bounce_out,
  };
  for (unsigned i = 0; i < MV_TRAMP_COUNT; i++)
    d->tramp[i] = (uint64_t)(uintptr_t)tramp[i];
}

/* Translations made with a switch or a counter are not like others. */
static bool keeps_translations(const struct mv_dbt *d) {
  const struct mv_dbt_options *o = &d->vm->dbt;
  return o->saved && !d->vm->count && !o->no_chain && !o->no_tlb && !o->no_coalesce &&
         !o->no_flags_live && !o->max_insns && d->vcpu->id == 0;
}

static int create(struct mv_vcpu *vcpu) {
  int r = mv_signal_init();
  if (r)
    return r;
  struct mv_dbt *d = dbt_alloc();
  if (!d)
    return -ENOMEM;
  vcpu->impl = d;
  d->vcpu = vcpu;
  d->vm = vcpu->vm;
  d->self = d;
  d->poll = (uint64_t)(uintptr_t)&d->self;
  set_tramps(d);
  d->exec = calloc(1, sizeof *d->exec);
  if (!d->exec || pthread_mutex_init(&d->exec->dma_lock, NULL)) {
    r = -ENOMEM;
    goto fail;
  }
  if ((r = mv_signal_stack_new(&d->exec->alt_stack)) || (r = fpu_init(d->exec)) ||
      (r = mv_mmu_init(d)) || (r = mv_cache_init(d)) || (r = mv_system_init(d)))
    goto fail;
  mv_ioapic_connect(vcpu->vm->impl, d->lapic);
  if (keeps_translations(d) && (r = mv_saved_open(&d->exec->saved, d, d->vm->dbt.saved)))
    goto fail;
  mv_mmu_mode_changed(d);
  return 0;
fail:
  destroy(vcpu);
  return r;
}

static void kick(struct mv_vcpu *vcpu) {
  struct mv_dbt *d = vcpu->impl;
  atomic_store(&d->exec->kicked, true);
  mv_dbt_poke(d);
}

static int get_state(struct mv_vcpu *vcpu, struct mv_vcpu_state *out) {
  struct mv_dbt *d = vcpu->impl;
  __builtin_memset(out, 0, sizeof *out);
  mv_dbt_fpu_save(d);
  __builtin_memcpy(out->xsave, d->exec->fpu, d->exec->fpu_size);
  return mv_system_get_state(d, out);
}

/* Takes an XSAVE image in; what XRSTOR would fault on is cleared (SDM 1 §13.8.1). */
static void set_fpu(struct mv_dbt_exec *x, const uint8_t *image) {
  __builtin_memcpy(x->fpu, image, x->fpu_size);
  *(uint32_t *)(x->fpu + 24) &= 0xffff;       /* MXCSR               */
  *(uint64_t *)(x->fpu + 512) &= x->fpu_mask; /* XSTATE_BV           */
  __builtin_memset(x->fpu + 520, 0, 56);      /* the header's rest: standard format */
}

static int set_state(struct mv_vcpu *vcpu, const struct mv_vcpu_state *in) {
  struct mv_dbt *d = vcpu->impl;
  mv_dbt_fpu_save(d);
  int r = mv_system_set_state(d, in);
  if (r)
    return r;
  set_fpu(d->exec, in->xsave);
  mv_mmu_flush_all(d);
  mv_mmu_mode_changed(d);
  mv_dbt_poke(d);
  return 0;
}

static int vm_init(struct mv_vm *vm) {
  struct mv_ioapic *io = mv_ioapic_new(vm);
  if (!io)
    return -ENOMEM;
  vm->impl = io;
  vm->irqchip.set_level = (void (*)(void *, unsigned, int))mv_ioapic_set_level;
  vm->irqchip.ctx = io;
  vm->mem.written = mv_dma_written;
  vm->mem.written_ctx = vm;
  return 0;
}

static void vm_destroy(struct mv_vm *vm) {
  mv_ioapic_free(vm->impl);
  vm->impl = NULL;
}

const struct mv_vcpu_ops mv_dbt_ops = {
    .name = "dbt",
    .vm_init = vm_init,
    .vm_destroy = vm_destroy,
    .create = create,
    .destroy = destroy,
    .run = mv_dbt_run,
    .kick = kick,
    .get_state = get_state,
    .set_state = set_state,
};
