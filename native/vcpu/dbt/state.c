/*
 * The vCPU's state in KVM's structs. Both directions lie side by side, so that
 * what one writes the other reads. The XSAVE area is exec.c's.
 *
 * A state that was set and has not run shows exactly what it was set to: time
 * (TSC, APIC timer) stands still until the vCPU runs (mv_system_resume).
 */
#include <errno.h>

#include "apic.h"
#include "system.h"

/* ---- general registers ---------------------------------------------------- */

static void get_regs(const struct mv_dbt *d, struct kvm_regs *r) {
  const uint64_t *g = d->gpr;
  *r = (struct kvm_regs){
      .rax = g[MV_RAX],
      .rbx = g[MV_RBX],
      .rcx = g[MV_RCX],
      .rdx = g[MV_RDX],
      .rsi = g[MV_RSI],
      .rdi = g[MV_RDI],
      .rsp = g[MV_RSP],
      .rbp = g[MV_RBP],
      .r8 = g[8],
      .r9 = g[9],
      .r10 = g[10],
      .r11 = g[11],
      .r12 = g[12],
      .r13 = g[13],
      .r14 = g[14],
      .r15 = g[15],
      .rip = d->rip,
      .rflags = mv_dbt_rflags(d),
  };
}

static void set_regs(struct mv_dbt *d, const struct kvm_regs *r) {
  const uint64_t g[16] = {r->rax, r->rcx, r->rdx, r->rbx, r->rsp, r->rbp, r->rsi, r->rdi,
                          r->r8,  r->r9,  r->r10, r->r11, r->r12, r->r13, r->r14, r->r15};
  __builtin_memcpy(d->gpr, g, sizeof(g));
  d->rip = r->rip;
  mv_dbt_set_rflags(d, r->rflags);
}

/* ---- segments, control registers ------------------------------------------- */

static struct kvm_segment get_segment(const struct mv_seg *s) {
  return (struct kvm_segment){
      .base = s->base,
      .limit = s->limit,
      .selector = s->sel,
      .type = s->attr & 15,
      .s = s->attr >> 4 & 1,
      .dpl = s->attr >> 5 & 3,
      .present = s->attr >> 7 & 1,
      .avl = s->attr >> 12 & 1,
      .l = s->attr >> 13 & 1,
      .db = s->attr >> 14 & 1,
      .g = s->attr >> 15 & 1,
      .unusable = !(s->attr & MV_SEG_P),
  };
}

static struct mv_seg set_segment(const struct kvm_segment *k) {
  unsigned present = k->present && !k->unusable;
  return (struct mv_seg){
      .base = k->base,
      .limit = k->limit,
      .sel = k->selector,
      .attr =
          (uint16_t)((k->type & 15) | (k->s & 1) << 4 | (k->dpl & 3) << 5 | present << 7 |
                     (k->avl & 1) << 12 | (k->l & 1) << 13 | (k->db & 1) << 14 | (k->g & 1) << 15),
  };
}

static void get_sregs(const struct mv_dbt *d, struct kvm_sregs *s) {
  const struct kvm_vcpu_events *in = &d->sys->injected;
  *s = (struct kvm_sregs){
      .cs = get_segment(&d->seg[MV_SEG_CS]),
      .ds = get_segment(&d->seg[MV_SEG_DS]),
      .es = get_segment(&d->seg[MV_SEG_ES]),
      .fs = get_segment(&d->seg[MV_SEG_FS]),
      .gs = get_segment(&d->seg[MV_SEG_GS]),
      .ss = get_segment(&d->seg[MV_SEG_SS]),
      .tr = get_segment(&d->seg[MV_SEG_TR]),
      .ldt = get_segment(&d->seg[MV_SEG_LDTR]),
      .gdt = {.base = d->gdt.base, .limit = d->gdt.limit},
      .idt = {.base = d->idt.base, .limit = d->idt.limit},
      .cr0 = d->cr0,
      .cr2 = d->cr2,
      .cr3 = d->cr3,
      .cr4 = d->cr4,
      .cr8 = mv_lapic_tpr(d->lapic) >> 4,
      .efer = d->efer,
      .apic_base = mv_lapic_base(d->lapic),
  };
  s->ss.dpl = d->cpl; /* as KVM keeps it, whatever SS is                        */
  if (in->interrupt.injected && !in->interrupt.soft)
    s->interrupt_bitmap[in->interrupt.nr / 64] |= 1ULL << (in->interrupt.nr & 63);
}

/* An interrupt that KVM had accepted, for those who save no events. */
static void set_pending_interrupt(struct mv_dbt *d, const struct kvm_sregs *s) {
  struct kvm_vcpu_events *in = &d->sys->injected;
  for (unsigned i = 0; i < 4 && !in->interrupt.injected; i++) {
    if (!s->interrupt_bitmap[i])
      continue;
    in->interrupt.injected = 1;
    in->interrupt.soft = 0;
    in->interrupt.nr = (uint8_t)(i * 64 + (unsigned)__builtin_ctzll(s->interrupt_bitmap[i]));
  }
}

static void set_sregs(struct mv_dbt *d, const struct kvm_sregs *s) {
  d->seg[MV_SEG_CS] = set_segment(&s->cs);
  d->seg[MV_SEG_DS] = set_segment(&s->ds);
  d->seg[MV_SEG_ES] = set_segment(&s->es);
  d->seg[MV_SEG_FS] = set_segment(&s->fs);
  d->seg[MV_SEG_GS] = set_segment(&s->gs);
  d->seg[MV_SEG_SS] = set_segment(&s->ss);
  d->seg[MV_SEG_TR] = set_segment(&s->tr);
  d->seg[MV_SEG_LDTR] = set_segment(&s->ldt);
  d->gdt = (struct mv_dtr){.base = s->gdt.base, .limit = s->gdt.limit};
  d->idt = (struct mv_dtr){.base = s->idt.base, .limit = s->idt.limit};
  d->cr0 = s->cr0;
  d->cr2 = s->cr2;
  d->cr3 = s->cr3;
  d->cr4 = s->cr4;
  d->efer = s->efer;
  d->cpl = mv_is_protected(d) ? s->ss.dpl & 3 : 0;
}

/* ---- debug registers, events ------------------------------------------------- */

static void get_debugregs(const struct mv_dbt *d, struct kvm_debugregs *r) {
  *r = (struct kvm_debugregs){
      .db = {d->dr[0], d->dr[1], d->dr[2], d->dr[3]}, .dr6 = d->dr[6], .dr7 = d->dr[7]};
}

static void set_debugregs(struct mv_dbt *d, const struct kvm_debugregs *r) {
  for (unsigned i = 0; i < 4; i++)
    d->dr[i] = r->db[i];
  d->dr[6] = r->dr6;
  d->dr[7] = r->dr7;
}

static void get_events(const struct mv_dbt *d, struct kvm_vcpu_events *e) {
  *e = d->sys->injected;
  e->interrupt.shadow = d->irq_shadow ? d->sys->shadow_kind : 0;
  e->nmi.pending = mv_lapic_nmi_pending(d->lapic);
  e->nmi.masked = d->sys->nmi_masked;
  e->flags = KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW | KVM_VCPUEVENT_VALID_SMM;
}

/* SMM and SIPI are not taken over: there is no SMM, and a SIPI is taken at once. */
static void set_events(struct mv_dbt *d, const struct kvm_vcpu_events *e) {
  struct kvm_vcpu_events *in = &d->sys->injected;
  *in = (struct kvm_vcpu_events){0};
  in->exception = e->exception;
  in->interrupt = e->interrupt;
  in->interrupt.shadow = 0;
  in->nmi.injected = e->nmi.injected;
  d->sys->nmi_masked = e->nmi.masked;
  d->irq_shadow = (e->flags & KVM_VCPUEVENT_VALID_SHADOW) && e->interrupt.shadow;
  d->sys->shadow_kind = d->irq_shadow ? e->interrupt.shadow : KVM_X86_SHADOW_INT_STI;
  mv_lapic_clear(d->lapic, MV_LAPIC_NMI | MV_LAPIC_INIT | MV_LAPIC_SIPI);
  if ((e->flags & KVM_VCPUEVENT_VALID_NMI_PENDING) && e->nmi.pending)
    mv_lapic_set_nmi(d->lapic);
}

static void set_mp_state(struct mv_dbt *d, uint32_t mp) {
  bool waits = mp == KVM_MP_STATE_UNINITIALIZED || mp == KVM_MP_STATE_INIT_RECEIVED;
  d->sys->mp_wait = waits ? mp : 0;
  d->halted = waits || mp == KVM_MP_STATE_HALTED;
}

static uint32_t get_mp_state(const struct mv_dbt *d) {
  if (d->sys->mp_wait)
    return d->sys->mp_wait;
  return d->halted ? KVM_MP_STATE_HALTED : KVM_MP_STATE_RUNNABLE;
}

/* ---- MSRs --------------------------------------------------------------------- */

static void get_msrs(struct mv_dbt *d, struct mv_vcpu_state *out) {
  struct mv_system *s = d->sys;
  uint64_t v;
  out->nmsrs = 0;
  for (unsigned i = 0; i < mv_msr_saved_count; i++)
    if (mv_msr_read(d, mv_msr_saved[i], true, &v) == 0)
      out->msrs[out->nmsrs++] = (struct kvm_msr_entry){.index = mv_msr_saved[i], .data = v};
  for (unsigned i = 0; i < s->nextra; i++)
    out->msrs[out->nmsrs++] = s->extra[i];
}

static bool is_in_sregs(uint32_t index) {
  enum { APIC_BASE = 0x1b };
  return index == APIC_BASE || index == 0xc0000080u || index == 0xc0000100u || index == 0xc0000101u;
}

/* An MSR that we do not know is kept and given back: the other backend may. */
static int set_msrs(struct mv_dbt *d, const struct mv_vcpu_state *in) {
  struct mv_system *s = d->sys;
  s->nextra = 0;
  for (unsigned i = 0; i < in->nmsrs; i++) {
    const struct kvm_msr_entry *m = &in->msrs[i];
    bool saved = is_in_sregs(m->index);
    for (unsigned j = 0; j < mv_msr_saved_count && !saved; j++)
      saved = mv_msr_saved[j] == m->index;
    if (saved) {
      mv_msr_write(d, m->index, true, m->data);
      continue;
    }
    if (s->nextra == MV_MSR_EXTRA)
      return -ENOSPC;
    s->extra[s->nextra++] = (struct kvm_msr_entry){.index = m->index, .data = m->data};
  }
  return 0;
}

/* The TSC keeps its value, if the state brings none. */
static void stop_time(struct mv_dbt *d) {
  if (!d->sys->tsc_stopped)
    d->sys->tsc_value = mv_system_tsc(d);
  d->sys->tsc_stopped = true;
}

/* ---- whole ---------------------------------------------------------------------- */

int mv_system_get_state(struct mv_dbt *d, struct mv_vcpu_state *out) {
  mv_dbt_fpu_save(d);
  get_regs(d, &out->regs);
  get_sregs(d, &out->sregs);
  get_debugregs(d, &out->debugregs);
  get_events(d, &out->events);
  mv_lapic_get_state(d->lapic, &out->lapic);
  out->mp_state = get_mp_state(d);
  out->xcr0 = d->xcr0;
  get_msrs(d, out);
  return 0;
}

/* -EINVAL: the state is none that this CPU can have. */
int mv_system_set_state(struct mv_dbt *d, const struct mv_vcpu_state *in) {
  if (in->nmsrs > MV_MSRS_MAX || !(in->xcr0 & 1) || (in->xcr0 & ~d->sys->xcr0_allowed))
    return -EINVAL;
  mv_dbt_fpu_save(d);
  stop_time(d);
  set_regs(d, &in->regs);
  set_sregs(d, &in->sregs);
  set_debugregs(d, &in->debugregs);
  set_events(d, &in->events);
  set_pending_interrupt(d, &in->sregs);
  if (mv_lapic_set_base(d->lapic, in->sregs.apic_base, true) < 0)
    return -EINVAL;
  mv_lapic_set_state(d->lapic, &in->lapic);
  mv_lapic_set_tpr(d->lapic, in->sregs.cr8 << 4 | (mv_lapic_tpr(d->lapic) & 15));
  set_mp_state(d, in->mp_state);
  d->xcr0 = in->xcr0;
  int err = set_msrs(d, in);
  mv_mmu_flush_all(d);
  mv_mmu_mode_changed(d);
  return err;
}
