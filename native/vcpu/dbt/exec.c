/*
 * Running translated code: the way in and out, what translated code asks of C
 * (mv_slow_*), signals.
 *
 * The vCPU's thread alone runs all this. Others reach it through mv_dbt_poke():
 * it sets `poked` and lets mv_dbt.poll point at a page that cannot be read, so
 * that the next poll in translated code faults; mv_slow_signal() then looks at
 * what there is to do. Helpers look at `poked` on their way back.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "cache.h"
#include "apic.h"
#include "enter_offsets.h"
#include "exec.h"
#include "mv/layout.h"
#include "system.h"

_Static_assert(offsetof(struct mv_dbt, self) == MV_OFF_SELF, "enter_offsets.h");
_Static_assert(offsetof(struct mv_dbt, host_rsp) == MV_OFF_HOST_RSP, "enter_offsets.h");
_Static_assert(offsetof(struct mv_dbt, resume) == MV_OFF_RESUME, "enter_offsets.h");
_Static_assert(offsetof(struct mv_dbt, t0) == MV_OFF_T0, "enter_offsets.h");
_Static_assert(offsetof(struct mv_dbt, jc) == MV_OFF_JC && MV_JC_SIZE == 65536, "enter_offsets.h");
_Static_assert(offsetof(struct mv_dbt, gpr) == 0 && offsetof(struct mv_dbt, rip) == 128 &&
                   offsetof(struct mv_dbt, flags) == 136,
               "enter.S");

#define COALESCE_FAILURES_MAX 16

/* ======================= going on ======================================= */

static const void *code_at(struct mv_dbt *d, uint32_t off) {
  return d->exec->rx + off;
}

/* Back into translated code: the guest's vector state must be live. */
static const void *into(struct mv_dbt *d, uint32_t off) {
  mv_dbt_fpu_load(d);
  return code_at(d, off);
}
static const void *leave(struct mv_dbt *d) {
  (void)d;
  return mv_dbt_leave;
}

/* To d->rip by the jump cache; if it is not there, by mv_slow_indirect(). */
static const void *jump(struct mv_dbt *d) {
  mv_dbt_fpu_load(d);
  return d->cpl == 3 ? mv_jump_user : mv_jump_kernel;
}

/* Is there a reason to leave translated code that is no interrupt? */
static bool must_leave(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  return x->exit->reason != MV_EXIT_NONE || d->halted ||
         atomic_load_explicit(&x->kicked, memory_order_relaxed);
}

static const void *shutdown(struct mv_dbt *d) {
  d->exec->exit->reason = MV_EXIT_SHUTDOWN;
  return leave(d);
}

/* Looks at what a poke was for. 0, or -1: triple fault. */
static int attend(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  if (!atomic_load_explicit(&x->poked, memory_order_relaxed))
    return 0;
  /* Whoever pokes has said before what for: the looks below find it.         */
  __atomic_store_n(&d->poll, (uint64_t)(uintptr_t)&d->self, __ATOMIC_SEQ_CST);
  atomic_store(&x->poked, 0);
  mv_dma_apply(d);
  bool ready = mv_system_irq_ready(d);
  int r = ready ? mv_system_take_irq(d) : 0;
  /* More may wait behind the one that was taken, or for IF.                  */
  x->irq_waits = ready || !(d->eflags & MV_FL_IF);
  return r;
}

/* Interrupts may have waited for IF, and IF is set now. */
static bool irq_let_in(struct mv_dbt *d) {
  return d->exec->irq_waits && d->eflags & MV_FL_IF;
}

/* The code for d->rip as things are now: interrupts, single steps, faults. */
static const void *dispatch(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  x->stepping = false;
  for (;;) {
    if (must_leave(d) || x->once == MV_ONCE_DONE)
      return leave(d);
    if (irq_let_in(d))
      atomic_store(&x->poked, 1);
    if (!d->irq_shadow && attend(d))
      return shutdown(d);
    if (must_leave(d)) /* a kick may have come with what was attended to        */
      return leave(d);
    if (x->mode & MV_MODE_NOT64) {
      x->exit->reason = MV_EXIT_ERROR;
      x->exit->error = -ENOTSUP; /* 16- and 32-bit code                        */
      return leave(d);
    }
    bool step = d->eflags & MV_FL_TF || d->irq_shadow || x->once;
    if (!step && !d->vm->dbt.no_chain)
      return jump(d);
    uint32_t b = mv_cache_get(d, d->rip, step ? MV_VAR_STEP | MV_VAR_SINGLE : MV_VAR_NORMAL);
    if (b) {
      x->stepping = step;
      d->irq_shadow = false; /* it protects this one instruction             */
      x->step_trap = d->eflags & MV_FL_TF;
      return into(d, x->blocks[b].code);
    }
    if (mv_dbt_fault(d))
      return leave(d);
  }
}

/* Delivers the recorded exception, or makes it an exit. Nonzero: leave. */
int mv_dbt_fault(struct mv_dbt *d) {
  struct mv_exit_info *out = d->exec->exit;
  if (d->vm->exceptions_exit) {
    out->reason = MV_EXIT_EXCEPTION;
    out->exception.vector = d->exc_vector;
    out->exception.has_error_code = d->exc_has_code;
    out->exception.error_code = d->exc_has_code ? d->exc_code : 0;
    out->exception.cr2 = d->cr2;
    return -1;
  }
  if (d->exec->once)
    d->exec->once = MV_ONCE_DONE;
  if (!mv_system_deliver(d))
    return 0;
  out->reason = MV_EXIT_SHUTDOWN;
  return -1;
}

static const void *fault(struct mv_dbt *d) {
  d->exec->stepping = false;
  return mv_dbt_fault(d) ? leave(d) : dispatch(d);
}

/* An instruction that was run alone is done; d->rip is the next. */
static const void *step_done(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  x->stepping = false;
  if (x->once)
    x->once = MV_ONCE_DONE;
  if (x->step_trap) {
    x->step_trap = false;
    d->dr[6] |= 1u << 14; /* BS, SDM 3B §18.2.3                                */
    mv_dbt_raise(d, MV_EXC_DB);
    return fault(d);
  }
  return dispatch(d);
}

/* Another translation of the instruction at d->rip. */
static const void *variant(struct mv_dbt *d, unsigned v) {
  struct mv_dbt_exec *x = d->exec;
  uint32_t b = mv_cache_get(d, d->rip, v | MV_VAR_SINGLE | (x->stepping ? MV_VAR_STEP : 0));
  return b ? into(d, x->blocks[b].code) : fault(d);
}

/* ======================= what translated code asks ====================== */

/* d->rip = the instruction of a site; instructions after it were counted when
 * the block began, but have not run. */
static void site_rip(struct mv_dbt *d, const struct mv_site *s) {
  const struct mv_block *b = &d->exec->blocks[s->block];
  d->rip = b->rip + s->guest;
}
static void uncount(struct mv_dbt *d, const struct mv_site *s) {
  if (d->vm->count)
    d->icount -= (uint64_t)(d->exec->blocks[s->block].ninsns - s->insn);
}

/* A shared check failed: go on with exact single instructions, and if it often
 * does, translate the block anew without sharing. */
static const void *uncoalesce(struct mv_dbt *d, const struct mv_site *s) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_block *b = &x->blocks[s->block];
  if (++b->failures == COALESCE_FAILURES_MAX && !b->dead && !b->variant) {
    uint64_t rip = b->rip, at = d->rip;
    mv_cache_invalidate(d, s->block);
    x->next_single = true;
    mv_cache_get(d, rip, MV_VAR_NORMAL);
    x->next_single = false;
    d->rip = at;
  }
  return variant(d, MV_VAR_SINGLE);
}

/* What a site's access raised: a non-canonical address on the stack is #SS. */
static const void *site_fault(struct mv_dbt *d, const struct mv_site *s) {
  uncount(d, s);
  bool misaligned = s->align && d->t0 & (s->align - 1u);
  if (s->flags & MV_SITE_STACK && d->exc_vector == MV_EXC_GP && !misaligned &&
      !mv_is_canonical(d->t0))
    mv_dbt_raise_code(d, MV_EXC_SS, 0);
  return fault(d);
}

const void *mv_slow_mem(struct mv_dbt *d, uint32_t site) {
  struct mv_dbt_exec *x = d->exec;
  const struct mv_site *s = &x->sites[site];
  uint64_t gva = d->t0;
  bool user = d->cpl == 3, shared = s->flags & MV_SITE_COALESCED;
  struct mv_walk w;
  site_rip(d, s);
  if ((gva & 0xfff) + s->size > 0x1000 || (s->align && gva & (s->align - 1u)) || d->vm->dbt.no_tlb)
    goto exact;
  if (mv_mmu_walk(d, gva, s->access, user, &w)) {
    if (shared)
      goto exact;
    return site_fault(d, s);
  }
  if (!w.hva || (s->access & MV_ACC_W && mv_cache_is_code(d, w.gpa)))
    goto exact;
  mv_mmu_tlb_fill(d, gva, user, &w);
  return into(d, s->restart);
exact:
  uncount(d, s);
  return shared ? uncoalesce(d, s) : variant(d, MV_VAR_BOUNCE);
}

const void *mv_slow_link(struct mv_dbt *d, uint32_t link) {
  struct mv_dbt_exec *x = d->exec;
  uint32_t from = link >> 1;
  unsigned slot = link & 1;
  d->rip = x->blocks[from].out[slot].rip;
  if (x->stepping)
    return step_done(d);
  if (atomic_load_explicit(&x->poked, memory_order_relaxed))
    return dispatch(d);
  uint64_t flushes = d->vcpu->stats.code_flushes;
  uint32_t to = mv_cache_get(d, d->rip, MV_VAR_NORMAL);
  if (!to)
    return fault(d);
  if (flushes == d->vcpu->stats.code_flushes && !d->vm->dbt.no_chain)
    mv_cache_link(d, from, slot, to);
  return into(d, x->blocks[to].code);
}

const void *mv_slow_indirect(struct mv_dbt *d, uint32_t arg) {
  struct mv_dbt_exec *x = d->exec;
  (void)arg;
  d->rip = d->t0;
  if (x->stepping)
    return step_done(d);
  if (atomic_load_explicit(&x->poked, memory_order_relaxed))
    return dispatch(d);
  uint32_t to = mv_cache_get(d, d->rip, MV_VAR_NORMAL);
  if (!to)
    return fault(d);
  uint32_t entry = mv_cache_indirect_entry(d, to);
  if (entry && !d->vm->dbt.no_chain) {
    unsigned priv = d->cpl == 3 ? MV_PRIV_USER : MV_PRIV_KERNEL;
    d->jc[priv][d->rip & (MV_JC_SIZE - 1)] = (uint64_t)(uintptr_t)code_at(d, entry);
  }
  return into(d, x->blocks[to].code);
}

const void *mv_slow_guard(struct mv_dbt *d, uint32_t block) {
  struct mv_dbt_exec *x = d->exec;
  d->rip = x->blocks[block].rip;
  if (x->stepping)
    return variant(d, MV_VAR_NORMAL);
  uint32_t b = mv_cache_get(d, d->rip, x->blocks[block].variant);
  return b ? into(d, x->blocks[b].code) : fault(d);
}

static int exec_one(struct mv_dbt *d, const struct mv_insn *insn) {
  switch (insn->cls) {
  case MV_CLASS_STRING:
    return mv_string_exec(d, insn);
  case MV_CLASS_SYSTEM:
  case MV_CLASS_BRANCH:
    return mv_system_exec(d, insn);
  case MV_CLASS_STACK:
    return insn->op == MV_OP_ENTER || insn->op == MV_OP_LEAVE ? mv_insn_exec(d, insn)
                                                              : mv_system_exec(d, insn);
  default:
    return mv_insn_exec(d, insn);
  }
}

const void *mv_slow_insn(struct mv_dbt *d, uint32_t site) {
  struct mv_dbt_exec *x = d->exec;
  const struct mv_site *s = &x->sites[site];
  uint32_t restart = s->restart;
  uint64_t epoch = x->epoch;
  site_rip(d, s);
  const struct mv_insn *insn = &x->helpers[s->helper];
  uint64_t next = d->rip + insn->len;
  if (exec_one(d, insn)) {
    uncount(d, s);
    return fault(d);
  }
  if (insn->cls == MV_CLASS_VSIB || insn->cls == MV_CLASS_MASKED)
    return into(d, restart); /* it still has to load its result               */
  if (insn->op == MV_OP_WRMSR || insn->op == MV_OP_MOV_CR_WRITE) /* TPR, EOI  */
    mv_dbt_recheck(d);
  if (x->stepping)
    return step_done(d);
  /* With nothing to hold back a shadow needs no care: whoever pokes from here on
   * finds it set, and steps over one instruction before it looks.            */
  if (d->rip == next && epoch == x->epoch && !must_leave(d) && !(d->eflags & MV_FL_TF) &&
      !irq_let_in(d) && !atomic_load_explicit(&x->poked, memory_order_relaxed))
    return into(d, restart);
  return dispatch(d);
}

const void *mv_slow_raise(struct mv_dbt *d, uint32_t site) {
  const struct mv_site *s = &d->exec->sites[site];
  site_rip(d, s);
  uncount(d, s);
  if (d->t0 == MV_EXC_GP)
    mv_dbt_raise_code(d, MV_EXC_GP, 0);
  else
    mv_dbt_raise(d, (unsigned)d->t0);
  return fault(d);
}

/* ---- bounce: an operand that is not in one piece of plain RAM ------------- */

/* May [gva, gva+len) be written at this privilege? */
static int writable(struct mv_dbt *d, uint64_t gva, unsigned len) {
  uint64_t gpa;
  if (mv_mmu_translate(d, gva, MV_ACC_W, MV_AS_CPL, &gpa))
    return -1;
  if ((gva & 0xfff) + len > 0x1000)
    return mv_mmu_translate(d, (gva | 0xfff) + 1, MV_ACC_W, MV_AS_CPL, &gpa);
  return 0;
}

/* What lies where an instruction is about to store: x87 stores with an unmasked exception write
 * nothing, and then these bytes go back. [gva, gva+len) was found writable. */
static void read_before_store(struct mv_dbt *d, uint64_t gva, unsigned len) {
  for (unsigned done = 0, n; done < len; done += n) {
    uint64_t at = gva + done, gpa = 0;
    n = 0x1000 - (at & 0xfff) < len - done ? (unsigned)(0x1000 - (at & 0xfff)) : len - done;
    mv_mmu_translate(d, at, MV_ACC_W, MV_AS_CPL, &gpa);
    const uint8_t *ram = mv_mmu_ram(d, gpa, NULL);
    if (ram)
      __builtin_memcpy(d->bounce + done, ram, n);
    else
      __builtin_memset(d->bounce + done, 0, n);
  }
}

const void *mv_slow_bounce_in(struct mv_dbt *d, uint32_t site) {
  struct mv_dbt_exec *x = d->exec;
  const struct mv_site *s = &x->sites[site];
  uint64_t gva = d->t0;
  site_rip(d, s);
  int r = 0;
  if (s->align && gva & (s->align - 1u))
    r = mv_dbt_raise_code(d, MV_EXC_GP, 0);
  if (!r && s->access & MV_ACC_W)
    r = writable(d, gva, s->size);
  if (!r && s->access == MV_ACC_W)
    read_before_store(d, gva, s->size);
  if (!r && s->access & MV_ACC_R)
    r = mv_mmu_read(d, gva, d->bounce, s->size, MV_AS_CPL);
  if (r)
    return site_fault(d, s);
  x->bounce_gva = gva;
  return into(d, s->restart);
}

const void *mv_slow_bounce_out(struct mv_dbt *d, uint32_t site) {
  struct mv_dbt_exec *x = d->exec;
  const struct mv_site *s = &x->sites[site];
  uint32_t restart = s->restart;
  mv_mmu_write(d, x->bounce_gva, d->bounce, s->size, MV_AS_CPL);
  return into(d, restart);
}

/* ======================= devices ======================================== */

static bool in_lapic(struct mv_dbt *d, uint64_t gpa) {
  return (gpa & ~0xfffull) == mv_lapic_mmio_base(d->lapic);
}

int mv_dbt_mmio(struct mv_dbt *d, uint64_t gpa, void *buf, unsigned len, bool write) {
  uint64_t v = 0;
  if (in_lapic(d, gpa)) {
    unsigned n = len < 8 ? len : 8;
    if (write) {
      __builtin_memcpy(&v, buf, n);
      mv_lapic_mmio_write(d->lapic, gpa & 0xfff, v, n);
      mv_dbt_recheck(d);
    } else {
      v = mv_lapic_mmio_read(d->lapic, gpa & 0xfff, n);
      __builtin_memset(buf, 0, len);
      __builtin_memcpy(buf, &v, n);
    }
    return 0;
  }
  mv_dbt_fpu_save(d);
  for (unsigned done = 0; done < len;) {
    unsigned n = len - done >= 8 ? 8 : len - done >= 4 ? 4 : len - done >= 2 ? 2 : 1;
    if (write)
      __builtin_memcpy(&v, (uint8_t *)buf + done, n);
    if (!d->vm->has_bus) {
      struct mv_exit_info *out = d->exec->exit;
      out->reason = MV_EXIT_MMIO;
      out->io.addr = gpa + done;
      out->io.value = v;
      out->io.len = (uint8_t)n;
      out->io.is_write = write;
      v = ~0ull;
    } else if (write) {
      mv_bus_write(&d->vm->mmio, gpa + done, v, n);
    } else {
      v = mv_bus_read(&d->vm->mmio, gpa + done, n);
    }
    if (!write)
      __builtin_memcpy((uint8_t *)buf + done, &v, n);
    done += n;
  }
  d->vcpu->stats.exits[MV_EXIT_MMIO]++;
  return 0;
}

int mv_dbt_port_io(struct mv_dbt *d, uint16_t port, uint64_t *value, unsigned len, bool write) {
  d->vcpu->stats.exits[MV_EXIT_IO]++;
  mv_dbt_fpu_save(d);
  if (d->vm->has_bus) {
    if (write)
      mv_bus_write(&d->vm->pio, port, *value, len);
    else
      *value = mv_bus_read(&d->vm->pio, port, len);
    return 0;
  }
  struct mv_exit_info *out = d->exec->exit;
  out->reason = MV_EXIT_IO;
  out->io.addr = port;
  out->io.value = write ? *value : 0;
  out->io.len = (uint8_t)len;
  out->io.is_write = write;
  if (!write)
    *value = ~0ull;
  return 0;
}

/* ======================= vector state =================================== */

void mv_dbt_fpu_save(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  static const uint32_t mxcsr = 0x1f80;
  if (!d->fpu_live)
    return;
  __asm__ volatile("xsave64 (%0)\n\tfninit\n\tldmxcsr %1"
                   :
                   : "r"(x->fpu), "m"(mxcsr), "a"((uint32_t)x->fpu_mask),
                     "d"((uint32_t)(x->fpu_mask >> 32))
                   : "memory");
  d->fpu_live = false;
}

void mv_dbt_fpu_load(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  if (d->fpu_live)
    return;
  __asm__ volatile("xrstor64 (%0)"
                   :
                   : "r"(x->fpu), "a"((uint32_t)x->fpu_mask), "d"((uint32_t)(x->fpu_mask >> 32))
                   : "memory");
  d->fpu_live = true;
}

uint8_t *mv_dbt_fpu_image(struct mv_dbt *d, unsigned *size) {
  *size = d->exec->fpu_size;
  return d->exec->fpu;
}

/* ======================= pokes ========================================== */

static void futex(_Atomic uint32_t *at, int op, uint32_t val, const struct timespec *until) {
  syscall(SYS_futex, at, op | FUTEX_PRIVATE_FLAG, val, until, NULL, FUTEX_BITSET_MATCH_ANY);
}

void mv_dbt_poke(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  __atomic_store_n(&d->poll, (uint64_t)(uintptr_t)mv_signal_guard(), __ATOMIC_SEQ_CST);
  if (atomic_exchange(&x->poked, 1) == 0)
    futex(&x->poked, FUTEX_WAKE, 1, NULL);
}

void mv_dbt_recheck(struct mv_dbt *d) {
  if (mv_system_irq_ready(d))
    atomic_store(&d->exec->poked, 1);
  else if (!(d->eflags & MV_FL_IF))
    d->exec->irq_waits = true;
}

/* HLT: sleeps until a poke. */
static void sleep_halted(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  mv_dbt_fpu_save(d);
  d->vcpu->stats.exits[MV_EXIT_HLT]++;
  while (!atomic_load(&x->poked) && !atomic_load(&x->kicked))
    futex(&x->poked, FUTEX_WAIT_BITSET, 0, NULL);
}

/* ======================= the run loop =================================== */

void mv_dbt_run(struct mv_vcpu *vcpu, struct mv_exit_info *out) {
  struct mv_dbt *d = vcpu->impl;
  struct mv_dbt_exec *x = d->exec;
  *out = (struct mv_exit_info){0};
  x->exit = out;
  int r = mv_signal_bind(d);
  if (r) {
    out->reason = MV_EXIT_ERROR;
    out->error = r;
    return;
  }
  while (out->reason == MV_EXIT_NONE) {
    if (atomic_exchange(&x->kicked, false) || x->once == MV_ONCE_DONE) {
      out->reason = MV_EXIT_KICKED;
      break;
    }
    if (d->halted) {
      mv_dma_apply(d);
      if (mv_system_irq_ready(d)) {
        d->halted = false;
      } else if (d->vm->hlt_exits) {
        out->reason = MV_EXIT_HLT;
        d->halted = false;
        break;
      } else {
        atomic_store(&x->poked, 0);
        if (!mv_system_irq_ready(d))
          sleep_halted(d);
        continue;
      }
      atomic_store(&x->poked, 1);
    }
    const void *code = dispatch(d);
    if (code != mv_dbt_leave)
      mv_dbt_enter(d, code);
  }
  mv_dbt_fpu_save(d);
  vcpu->stats.instructions = d->icount;
  mv_signal_unbind(d);
}

void mv_dbt_step(struct mv_vcpu *vcpu, struct mv_exit_info *out) {
  struct mv_dbt_exec *x = ((struct mv_dbt *)vcpu->impl)->exec;
  x->once = MV_ONCE_ARMED;
  mv_dbt_run(vcpu, out);
  x->once = MV_ONCE_OFF;
}

/* A host signal in translated code: a poll, or a fault of a guest instruction
 * that the host's CPU found. */
const void *mv_slow_signal(struct mv_dbt *d, uint32_t arg) {
  struct mv_dbt_exec *x = d->exec;
  uint32_t off = (uint32_t)(x->sig.code - (uint64_t)(uintptr_t)x->rx);
  (void)arg;
  uint32_t lo = 1, hi = x->nblocks; /* blocks lie in the order of their code   */
  while (hi - lo > 1) {
    uint32_t mid = lo + (hi - lo) / 2;
    if (x->blocks[mid].code <= off)
      lo = mid;
    else
      hi = mid;
  }
  const struct mv_block *b = &x->blocks[lo];
  unsigned i = 0;
  while (i + 1 < b->ninsns && x->map[b->map + i + 1].code <= off)
    i++;
  d->rip = b->rip + x->map[b->map + i].guest;
  if (d->vm->count)
    d->icount -= (uint64_t)(b->ninsns - i);
  if (x->sig.trap == MV_EXC_PF && x->sig.addr == (uint64_t)(uintptr_t)mv_signal_guard()) {
    atomic_store(&x->poked, 1); /* also if it was attended to meanwhile        */
    return dispatch(d);
  }
  switch (x->sig.trap) {
  case MV_EXC_DE:
  case MV_EXC_UD:
  case MV_EXC_MF:
  case MV_EXC_XM:
    mv_dbt_raise(d, (unsigned)x->sig.trap);
    return fault(d);
  case MV_EXC_GP: /* an address, an operand? Run exactly, the instruction tells */
    if (!(b->variant & MV_VAR_BOUNCE))
      return variant(d, MV_VAR_BOUNCE);
    /* fall through */
  case MV_EXC_AC:
    mv_dbt_raise_code(d, (unsigned)x->sig.trap, 0);
    return fault(d);
  default: /* memory that was there is gone (SIGBUS)                           */
    x->exit->reason = MV_EXIT_ERROR;
    x->exit->error = -EFAULT;
    return leave(d);
  }
}
