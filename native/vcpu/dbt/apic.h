/* Local APIC and IOAPIC of the translator, beside what dbt.h declares. */
#ifndef MV_APIC_H
#define MV_APIC_H

#include "dbt.h"

/* What waits at a local APIC (a bit set). */
enum { MV_LAPIC_INTR = 1, MV_LAPIC_NMI = 2, MV_LAPIC_INIT = 4, MV_LAPIC_SIPI = 8 };

/* ---- creation; mv_system_init() makes the APIC and connects it ------------ */
struct mv_lapic *mv_lapic_new(struct mv_dbt *d); /* NULL: out of memory or threads */
void mv_lapic_free(struct mv_lapic *apic);
void mv_lapic_reset(struct mv_lapic *apic, bool init);
/* Creates the IOAPIC at MV_IOAPIC_GPA of the VM's MMIO bus. Once a VM, by
 * vm_init; the vCPUs' local APICs are then connected with mv_ioapic_connect(),
 * which IPIs need, too. */
struct mv_ioapic *mv_ioapic_new(struct mv_vm *vm); /* NULL: out of memory, bus */
void mv_ioapic_free(struct mv_ioapic *io);
void mv_ioapic_connect(struct mv_ioapic *io, struct mv_lapic *apic);
void mv_ioapic_disconnect(struct mv_ioapic *io, struct mv_lapic *apic);

/* ---- the vCPU's side: only on its thread ----------------------------------- */
/* What waits; cheap if nothing does. `look_at_timer`: also if no alarm rang. */
unsigned mv_lapic_attention(struct mv_lapic *apic, bool look_at_timer);
void mv_lapic_set_nmi(struct mv_lapic *apic);
bool mv_lapic_nmi_pending(const struct mv_lapic *apic);
void mv_lapic_clear(struct mv_lapic *apic, unsigned what);
uint8_t mv_lapic_take_sipi(struct mv_lapic *apic);
/* Moves the highest interrupt into service; its vector. */
uint8_t mv_lapic_accept(struct mv_lapic *apic);

/* Registers in the xAPIC page, `off` 0..0xfff; off + len does not leave it.
 * Legal while translated code's vector registers are live. */
uint64_t mv_lapic_mmio_read(struct mv_lapic *apic, unsigned off, unsigned len);
void mv_lapic_mmio_write(struct mv_lapic *apic, unsigned off, uint64_t value, unsigned len);
/* Where that page is, or UINT64_MAX (disabled, x2APIC). */
uint64_t mv_lapic_mmio_base(const struct mv_lapic *apic);

uint64_t mv_lapic_tpr(const struct mv_lapic *apic);
void mv_lapic_set_tpr(struct mv_lapic *apic, uint64_t tpr);
uint64_t mv_lapic_base(const struct mv_lapic *apic);
/* These return 0, or -1 if the guest gets #GP. */
int mv_lapic_set_base(struct mv_lapic *apic, uint64_t value, bool host);
int mv_lapic_msr_read(struct mv_lapic *apic, uint32_t index, uint64_t *value);
int mv_lapic_msr_write(struct mv_lapic *apic, uint32_t index, uint64_t value);
uint64_t mv_lapic_tsc_deadline(const struct mv_lapic *apic);
void mv_lapic_set_tsc_deadline(struct mv_lapic *apic, uint64_t value);

void mv_lapic_get_state(struct mv_lapic *apic, struct kvm_lapic_state *out);
/* The timer runs on from mv_lapic_resume(). */
void mv_lapic_set_state(struct mv_lapic *apic, const struct kvm_lapic_state *in);
void mv_lapic_resume(struct mv_lapic *apic);

/* ---- between the APICs: any thread ------------------------------------------ */
enum {
  MV_APIC_FIXED = 0,
  MV_APIC_LOWEST = 1,
  MV_APIC_SMI = 2,
  MV_APIC_NMI = 4,
  MV_APIC_INIT = 5,
  MV_APIC_SIPI = 6,
  MV_APIC_EXTINT = 7
};
struct mv_apic_message {
  uint32_t dest;
  uint8_t vector, mode;        /* MV_APIC_*                                           */
  bool logical, level, x2apic; /* x2apic: dest has 32 bits                     */
};
/* Delivers to all local APICs that are meant, `except` left out (or NULL). */
void mv_apic_send(struct mv_ioapic *io, const struct mv_apic_message *m,
                  const struct mv_lapic *except);
/* mv_ioapic_connect() tells the local APIC. */
void mv_lapic_set_io(struct mv_lapic *apic, struct mv_ioapic *io);
bool mv_lapic_is_dest(const struct mv_lapic *apic, const struct mv_apic_message *m);
void mv_lapic_accept_message(struct mv_lapic *apic, const struct mv_apic_message *m);
/* The guest ended a level-triggered interrupt. */
void mv_ioapic_eoi(struct mv_ioapic *io, uint8_t vector);

void mv_ioapic_get_state(struct mv_ioapic *io, struct kvm_ioapic_state *out);
void mv_ioapic_set_state(struct mv_ioapic *io, const struct kvm_ioapic_state *in);

#endif
