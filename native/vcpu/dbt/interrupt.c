/*
 * Delivery of exceptions and interrupts: SDM 3A §6.
 *
 * An event becomes a struct event; deliver() reads the gate, checks it, picks
 * the stack, pushes the frame with one write and only then changes registers,
 * so that a fault on the way (bad gate, page fault on the stack) leaves the
 * vCPU as it was and is an exception of its own. mv_system_deliver() combines
 * such pairs by table 6-5 into a double fault and then a triple fault.
 */
#include "apic.h"
#include "system.h"

struct event {
  uint8_t vector;
  bool software; /* INT n, INT3, INTO: the gate's DPL counts                  */
  bool external; /* EXT bit of error codes                                   */
  bool has_code;
  bool resume; /* a fault: RF is set in the frame                          */
  uint32_t code;
  uint64_t rip; /* where the handler will return to                         */
};

enum { GATE_TASK = 5, GATE_INT16 = 6, GATE_TRAP16 = 7, GATE_INT32 = 14, GATE_TRAP32 = 15 };

/* Error code of a fault that concerns the gate itself. */
static uint32_t gate_code(const struct event *e) {
  return (uint32_t)e->vector << 3 | 2 | e->external;
}

static uint64_t frame_flags(const struct mv_dbt *d, const struct event *e) {
  return mv_dbt_rflags(d) | (e->resume ? MV_FL_RF : 0);
}

static void clear_flags(struct mv_dbt *d, unsigned type) {
  d->eflags &= ~(uint32_t)(MV_FL_TF | MV_FL_VM | MV_FL_RF | MV_FL_NT);
  if (!(type & 1)) /* interrupt gate                                           */
    d->eflags &= ~(uint32_t)MV_FL_IF;
}

/* The code segment that a gate names: SDM 3A §6.12.1, §6.14. */
static int fetch_handler_cs(struct mv_dbt *d, const struct event *e, uint16_t sel, uint64_t *raw) {
  if (sel < 4)
    return mv_dbt_raise_code(d, MV_EXC_GP, e->external);
  if (mv_desc_read(d, sel, MV_EXC_GP, e->external, raw) < 0)
    return -1;
  uint16_t attr = mv_desc_attr(*raw);
  bool code = (attr & (MV_SEG_S | MV_SEG_CODE)) == (MV_SEG_S | MV_SEG_CODE);
  bool mode_fits = !mv_is_long(d) || (attr & (MV_SEG_L | MV_SEG_DB)) == MV_SEG_L;
  if (!code || !mode_fits || (attr >> 5 & 3) > d->cpl)
    return mv_dbt_raise_code(d, MV_EXC_GP, (sel & ~3u) | e->external);
  if (!(attr & MV_SEG_P))
    return mv_dbt_raise_code(d, MV_EXC_NP, (sel & ~3u) | e->external);
  return 0;
}

static int read_tss(struct mv_dbt *d, const struct event *e, unsigned off, void *buf,
                    unsigned len) {
  const struct mv_seg *tr = &d->seg[MV_SEG_TR];
  if (!(tr->attr & MV_SEG_P) || off + len - 1 > tr->limit)
    return mv_dbt_raise_code(d, MV_EXC_TS, (tr->sel & ~3u) | e->external);
  return mv_mmu_read(d, tr->base + off, buf, len, MV_AS_SYSTEM);
}

/* ---- long mode -------------------------------------------------------------- */

struct gate64 {
  uint16_t offset0, sel;
  uint8_t ist, access;
  uint16_t offset1;
  uint32_t offset2, reserved;
};
_Static_assert(sizeof(struct gate64) == 16, "SDM 3A figure 6-8");

static int read_gate64(struct mv_dbt *d, const struct event *e, struct gate64 *g) {
  unsigned off = e->vector * 16u;
  if (off + 15 > d->idt.limit)
    return mv_dbt_raise_code(d, MV_EXC_GP, gate_code(e));
  if (mv_mmu_read(d, d->idt.base + off, g, sizeof(*g), MV_AS_SYSTEM) < 0)
    return -1;
  unsigned type = g->access & 0x1f;
  if ((type | 1) != GATE_TRAP32 || (e->software && (g->access >> 5 & 3) < d->cpl))
    return mv_dbt_raise_code(d, MV_EXC_GP, gate_code(e));
  if (!(g->access & 0x80))
    return mv_dbt_raise_code(d, MV_EXC_NP, gate_code(e));
  return 0;
}

/* Where the frame goes: IST, the TSS's stack for the inner level, or on. */
static int pick_stack64(struct mv_dbt *d, const struct event *e, unsigned ist, unsigned cpl,
                        uint64_t *sp) {
  *sp = d->gpr[MV_RSP];
  if (ist) {
    if (read_tss(d, e, 28 + ist * 8, sp, 8) < 0)
      return -1;
  } else if (cpl < d->cpl) {
    if (read_tss(d, e, 4 + cpl * 8, sp, 8) < 0)
      return -1;
  }
  if (!mv_is_canonical(*sp))
    return mv_dbt_raise_code(d, MV_EXC_SS, e->external);
  *sp &= ~15ULL;
  return 0;
}

static int deliver_long(struct mv_dbt *d, const struct event *e) {
  struct gate64 g;
  uint64_t raw, sp;
  if (read_gate64(d, e, &g) < 0 || fetch_handler_cs(d, e, g.sel, &raw) < 0)
    return -1;
  uint16_t attr = mv_desc_attr(raw);
  unsigned cpl = attr & MV_SEG_CONFORM ? d->cpl : attr >> 5 & 3;
  uint64_t rip = g.offset0 | (uint64_t)g.offset1 << 16 | (uint64_t)g.offset2 << 32;
  if (!mv_is_canonical(rip))
    return mv_dbt_raise_code(d, MV_EXC_GP, e->external);
  if (pick_stack64(d, e, g.ist & 7, cpl, &sp) < 0)
    return -1;
  uint64_t frame[6] = {e->code,           e->rip,         d->seg[MV_SEG_CS].sel,
                       frame_flags(d, e), d->gpr[MV_RSP], d->seg[MV_SEG_SS].sel};
  unsigned size = e->has_code ? 48 : 40;
  enum mv_mmu_as as = cpl == 3 ? MV_AS_CPL : MV_AS_SYSTEM;
  sp -= size;
  if (mv_desc_accessed(d, g.sel, &raw) < 0 ||
      mv_mmu_write(d, sp, frame + (e->has_code ? 0 : 1), size, as) < 0)
    return -1;
  if (cpl != d->cpl)
    d->seg[MV_SEG_SS] = mv_seg_null(cpl, cpl);
  d->seg[MV_SEG_CS] = mv_desc_seg((g.sel & ~3u) | cpl, raw);
  d->cpl = cpl;
  d->gpr[MV_RSP] = sp;
  d->rip = rip;
  clear_flags(d, g.access);
  mv_seg_changed(d);
  return 0;
}

/* ---- protected mode, 16- and 32-bit gates ------------------------------------- */

/* The stack of an inner level from the TSS; checked as §6.12.1 tells. */
static int inner_stack(struct mv_dbt *d, const struct event *e, unsigned cpl, struct mv_seg *ss,
                       uint64_t *sp) {
  bool tss32 = d->seg[MV_SEG_TR].attr & 8;
  unsigned size = tss32 ? 4 : 2;
  uint32_t top = 0;
  uint16_t sel;
  uint64_t raw;
  if (read_tss(d, e, size + cpl * size * 2, &top, size) < 0 ||
      read_tss(d, e, size + cpl * size * 2 + size, &sel, 2) < 0)
    return -1;
  uint32_t code = (sel & ~3u) | e->external;
  if (sel < 4)
    return mv_dbt_raise_code(d, MV_EXC_TS, code);
  if (mv_desc_read(d, sel, MV_EXC_TS, e->external, &raw) < 0)
    return -1;
  uint16_t attr = mv_desc_attr(raw);
  bool data = (attr & (MV_SEG_S | MV_SEG_CODE | MV_SEG_RW)) == (MV_SEG_S | MV_SEG_RW);
  if (!data || (sel & 3u) != cpl || (attr >> 5 & 3u) != cpl)
    return mv_dbt_raise_code(d, MV_EXC_TS, code);
  if (!(attr & MV_SEG_P))
    return mv_dbt_raise_code(d, MV_EXC_SS, code);
  *ss = mv_desc_seg(sel, raw);
  *sp = top;
  return 0;
}

/* Puts the 32-bit values into `buf` with `size` bytes each. */
static unsigned pack(uint8_t *buf, const uint32_t *values, unsigned n, unsigned size) {
  for (unsigned i = 0; i < n; i++)
    __builtin_memcpy(buf + i * size, &values[i], size);
  return n * size;
}

static int deliver_protected(struct mv_dbt *d, const struct event *e) {
  uint64_t gate, raw, sp = d->gpr[MV_RSP];
  unsigned off = e->vector * 8u;
  if (off + 7 > d->idt.limit)
    return mv_dbt_raise_code(d, MV_EXC_GP, gate_code(e));
  if (mv_mmu_read(d, d->idt.base + off, &gate, 8, MV_AS_SYSTEM) < 0)
    return -1;
  unsigned type = gate >> 40 & 0x1f, size = type & 8 ? 4 : 2;
  if ((type & ~9u) != GATE_INT16 || (e->software && (gate >> 45 & 3) < d->cpl))
    return mv_dbt_raise_code(d, MV_EXC_GP, gate_code(e));
  if (!(gate >> 47 & 1))
    return mv_dbt_raise_code(d, MV_EXC_NP, gate_code(e));
  uint16_t sel = gate >> 16;
  if (fetch_handler_cs(d, e, sel, &raw) < 0)
    return -1;
  uint16_t attr = mv_desc_attr(raw);
  unsigned cpl = attr & MV_SEG_CONFORM ? d->cpl : attr >> 5 & 3;
  uint32_t rip = (gate & 0xffff) | (size == 4 ? gate >> 32 & 0xffff0000u : 0);
  if (rip > mv_desc_seg(0, raw).limit)
    return mv_dbt_raise_code(d, MV_EXC_GP, e->external);

  struct mv_seg ss = d->seg[MV_SEG_SS], old_ss = ss;
  bool inner = cpl < d->cpl;
  if (inner && inner_stack(d, e, cpl, &ss, &sp) < 0)
    return -1;
  uint32_t values[6] = {e->code,           e->rip,         d->seg[MV_SEG_CS].sel,
                        frame_flags(d, e), d->gpr[MV_RSP], old_ss.sel};
  uint8_t buf[24];
  unsigned first = e->has_code ? 0 : 1, n = (inner ? 6 : 4) - first;
  unsigned len = pack(buf, values + first, n, size);
  d->seg[MV_SEG_SS] = ss;
  sp -= len;
  if (mv_desc_accessed(d, sel, &raw) < 0 ||
      mv_mmu_write(d, mv_stack_linear(d, sp), buf, len, cpl == 3 ? MV_AS_CPL : MV_AS_SYSTEM) < 0) {
    d->seg[MV_SEG_SS] = old_ss;
    return -1;
  }
  mv_stack_set(d, sp);
  d->seg[MV_SEG_CS] = mv_desc_seg((sel & ~3u) | cpl, raw);
  d->cpl = cpl;
  d->rip = rip;
  clear_flags(d, type);
  mv_seg_changed(d);
  return 0;
}

/* ---- real mode: SDM 3A §20.1.4 -------------------------------------------------- */

static int deliver_real(struct mv_dbt *d, const struct event *e) {
  uint16_t entry[2], frame[3];
  uint64_t sp = d->gpr[MV_RSP] - 6;
  if (e->vector * 4u + 3 > d->idt.limit)
    return mv_dbt_raise(d, MV_EXC_GP);
  if (mv_mmu_read(d, d->idt.base + e->vector * 4u, entry, 4, MV_AS_SYSTEM) < 0)
    return -1;
  frame[0] = e->rip;
  frame[1] = d->seg[MV_SEG_CS].sel;
  frame[2] = mv_dbt_rflags(d);
  if (mv_mmu_write(d, mv_stack_linear(d, sp), frame, 6, MV_AS_SYSTEM) < 0)
    return -1;
  mv_stack_set(d, sp);
  d->seg[MV_SEG_CS] = mv_seg_real(entry[1], d->seg[MV_SEG_CS].attr);
  d->rip = entry[0];
  d->eflags &= ~(uint32_t)(MV_FL_TF | MV_FL_IF | MV_FL_AC | MV_FL_RF);
  mv_seg_changed(d);
  return 0;
}

static int deliver(struct mv_dbt *d, const struct event *e) {
  int r = mv_is_long(d)        ? deliver_long(d, e)
          : mv_is_protected(d) ? deliver_protected(d, e)
                               : deliver_real(d, e);
  if (r == 0) {
    d->halted = false;
    d->irq_shadow = false;
  }
  return r;
}

/* ---- exceptions, double and triple faults ----------------------------------------- */

/* Faults and no aborts or traps: RF goes into the frame (SDM 3A §17.3.1.1). */
static bool is_fault(unsigned vector) {
  const uint32_t others = 1u << MV_EXC_DB | 1u << MV_EXC_NMI | 1u << MV_EXC_BP | 1u << MV_EXC_OF |
                          1u << MV_EXC_DF | 1u << MV_EXC_MC;
  return vector > 31 || !(others >> vector & 1);
}

static bool is_contributory(unsigned vector) {
  const uint32_t set =
      1u << MV_EXC_DE | 1u << MV_EXC_TS | 1u << MV_EXC_NP | 1u << MV_EXC_SS | 1u << MV_EXC_GP;
  return vector < 32 && (set >> vector & 1);
}

/* Table 6-5: does `second`, met while `first` was delivered, make a double fault? */
static bool is_double_fault(unsigned first, unsigned second) {
  if (is_contributory(first))
    return is_contributory(second);
  return first == MV_EXC_PF && (is_contributory(second) || second == MV_EXC_PF);
}

int mv_system_deliver(struct mv_dbt *d) {
  for (;;) {
    unsigned vector = d->exc_vector;
    struct event e = {.vector = vector,
                      .external = true, /* to what fails in its delivery, §6.13  */
                      .has_code = d->exc_has_code && mv_is_protected(d),
                      .code = d->exc_code,
                      .resume = is_fault(vector),
                      .rip = d->rip};
    if (deliver(d, &e) == 0)
      return 0;
    if (vector == MV_EXC_DF)
      return -1;
    if (is_double_fault(vector, d->exc_vector))
      mv_dbt_raise_code(d, MV_EXC_DF, 0);
    else if (!is_contributory(d->exc_vector) && d->exc_vector != MV_EXC_PF)
      return -1; /* delivery raises nothing else                               */
  }
}

/* An event that is no exception: what goes wrong on the way is delivered. */
static int deliver_event(struct mv_dbt *d, const struct event *e) {
  return deliver(d, e) == 0 ? 0 : mv_system_deliver(d);
}

int mv_system_interrupt(struct mv_dbt *d, unsigned vector, bool software) {
  struct event e = {.vector = vector, .software = software, .external = !software, .rip = d->rip};
  return deliver_event(d, &e);
}

/* ---- INT n and its kin ---------------------------------------------------------------- */

static int software_interrupt(struct mv_dbt *d, const struct mv_insn *insn, unsigned vector,
                              bool check_dpl) {
  struct event e = {
      .vector = vector, .software = check_dpl, .external = !check_dpl, .rip = mv_next_rip(d, insn)};
  return deliver(d, &e) < 0 ? -1 : MV_SYS_JUMPED;
}

int mv_sys_int(struct mv_dbt *d, const struct mv_insn *insn) {
  if (mv_is_vm86(d) && mv_iopl(d) < 3)
    return mv_gp0(d);
  return software_interrupt(d, insn, insn->imm & 0xff, true);
}

int mv_sys_int3(struct mv_dbt *d, const struct mv_insn *insn) {
  return software_interrupt(d, insn, MV_EXC_BP, true);
}

/* INT1 (ICEBP) is a #DB trap: the gate's DPL does not count. */
int mv_sys_int1(struct mv_dbt *d, const struct mv_insn *insn) {
  return software_interrupt(d, insn, MV_EXC_DB, false);
}

int mv_sys_into(struct mv_dbt *d, const struct mv_insn *insn) {
  if (!(d->flags & MV_F_OF))
    return MV_SYS_NEXT;
  return software_interrupt(d, insn, MV_EXC_OF, true);
}

/* ---- what waits ------------------------------------------------------------------------- */

/* Events in flight of a restored state, in the order of delivery. */
static bool injected_waits(const struct mv_dbt *d) {
  const struct kvm_vcpu_events *in = &d->sys->injected;
  return in->exception.injected || in->exception.pending || in->nmi.injected ||
         in->interrupt.injected;
}

static int take_injected(struct mv_dbt *d) {
  struct kvm_vcpu_events *in = &d->sys->injected;
  if (in->exception.injected || in->exception.pending) {
    d->exc_vector = in->exception.nr;
    d->exc_has_code = in->exception.has_error_code;
    d->exc_code = in->exception.error_code;
    in->exception.injected = in->exception.pending = 0;
    return mv_system_deliver(d);
  }
  if (in->nmi.injected) {
    in->nmi.injected = 0;
    d->sys->nmi_masked = true;
    return mv_system_interrupt(d, MV_EXC_NMI, false);
  }
  in->interrupt.injected = 0;
  struct event e = {.vector = in->interrupt.nr,
                    .software = in->interrupt.soft,
                    .external = !in->interrupt.soft,
                    .rip = d->rip};
  return deliver_event(d, &e);
}

bool mv_system_irq_ready(struct mv_dbt *d) {
  if (__builtin_expect(d->sys->tsc_stopped, false))
    mv_system_resume(d);
  unsigned waiting = mv_lapic_attention(d->lapic, d->halted);
  if (__builtin_expect(waiting & (MV_LAPIC_INIT | MV_LAPIC_SIPI), 0))
    return true;
  if (__builtin_expect(d->sys->mp_wait != 0, false))
    return false;
  if (__builtin_expect(injected_waits(d), false))
    return true;
  if ((waiting & MV_LAPIC_NMI) && !d->sys->nmi_masked && !d->irq_shadow)
    return true;
  return (waiting & MV_LAPIC_INTR) && (d->eflags & MV_FL_IF) && !d->irq_shadow;
}

/* SIPI: real mode at vector << 12 (SDM 3A §8.4.3). */
static void start_at(struct mv_dbt *d, uint8_t vector) {
  d->seg[MV_SEG_CS] = mv_seg_real((uint16_t)vector << 8, d->seg[MV_SEG_CS].attr);
  d->rip = 0;
  d->halted = false;
  d->sys->mp_wait = 0;
  mv_seg_changed(d);
}

int mv_system_take_irq(struct mv_dbt *d) {
  unsigned waiting = mv_lapic_attention(d->lapic, d->halted);
  if (waiting & MV_LAPIC_INIT) {
    mv_lapic_clear(d->lapic, MV_LAPIC_INIT);
    mv_system_reset(d, true);
    mv_mmu_flush_all(d);
    mv_mmu_mode_changed(d);
    return 0;
  }
  if (waiting & MV_LAPIC_SIPI) {
    uint8_t vector = mv_lapic_take_sipi(d->lapic);
    if (d->sys->mp_wait)
      start_at(d, vector);
    return 0;
  }
  if (injected_waits(d))
    return take_injected(d);
  d->vcpu->stats.irqs++;
  if ((waiting & MV_LAPIC_NMI) && !d->sys->nmi_masked) {
    mv_lapic_clear(d->lapic, MV_LAPIC_NMI);
    d->sys->nmi_masked = true;
    return mv_system_interrupt(d, MV_EXC_NMI, false);
  }
  return mv_system_interrupt(d, mv_lapic_accept(d->lapic), false);
}
