/*
 * The vCPU seam.  A backend (KVM, the translator) implements mv_vcpu_ops; all
 * else sees a vCPU as state in, run, exit, state out.  State is KVM's own
 * structs on both backends, so that a guest can be handed from one to the
 * other and a snapshot fits both.
 */
#ifndef MV_VCPU_H
#define MV_VCPU_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>

#include "mv/bus.h"
#include "mv/irq.h"
#include "mv/mem.h"

#define MV_MSRS_MAX  128
#define MV_XSAVE_MAX 4096

/* Whole architectural state of one vCPU, in KVM's structs. */
struct mv_vcpu_state {
  struct kvm_regs regs;
  struct kvm_sregs sregs;
  struct kvm_debugregs debugregs;
  struct kvm_vcpu_events events;
  struct kvm_lapic_state lapic;
  uint32_t mp_state; /* KVM_MP_STATE_*                                     */
  uint32_t nmsrs;
  uint64_t xcr0;
  struct kvm_msr_entry msrs[MV_MSRS_MAX];
  uint8_t xsave[MV_XSAVE_MAX]; /* standard (non-compacted) XSAVE layout     */
};

/* Why mv_vcpu_run() came back. Port and MMIO accesses are served on the VM's
 * buses inside it; they come back only when there is no such bus (tests). */
enum mv_exit {
  MV_EXIT_NONE = 0,
  MV_EXIT_KICKED,    /* mv_vcpu_kick()                                     */
  MV_EXIT_HLT,       /* HLT with nothing to wait for: only if hlt_exits    */
  MV_EXIT_IO,        /* port access, no bus: exit.io                       */
  MV_EXIT_MMIO,      /* access outside RAM, no bus: exit.mmio              */
  MV_EXIT_SHUTDOWN,  /* triple fault                                       */
  MV_EXIT_EXCEPTION, /* only if exceptions_exit: exit.exception            */
  MV_EXIT_EMULATE,   /* KVM cannot emulate the instruction at RIP          */
  MV_EXIT_ERROR,     /* backend failed: exit.error is -errno               */
  MV_EXIT_COUNT,
};

struct mv_exit_info {
  enum mv_exit reason;
  int error;
  struct {
    uint64_t addr; /* port or gpa                                          */
    uint64_t value;
    uint8_t len, is_write;
  } io; /* MV_EXIT_IO, MV_EXIT_MMIO                                         */
  struct {
    uint8_t vector, has_error_code;
    uint32_t error_code;
    uint64_t cr2;
  } exception;
};

/* Counters a vCPU keeps; read at any time, exact when it is stopped. */
struct mv_vcpu_stats {
  uint64_t exits[MV_EXIT_COUNT]; /* by kind, also those served inside       */
  uint64_t instructions;         /* guest instructions, if counting is on   */
  uint64_t irqs;                 /* interrupts delivered                    */
  uint64_t translated_blocks, translated_insns, code_flushes, tlb_misses;
  uint64_t revived_blocks; /* of the translated ones: kept from earlier starts */
};

struct mv_vm;
struct mv_vcpu;

struct mv_vcpu_ops {
  const char *name; /* "kvm", "dbt"                                        */
  int (*vm_init)(struct mv_vm *vm);
  void (*vm_destroy)(struct mv_vm *vm);
  int (*create)(struct mv_vcpu *vcpu);
  void (*destroy)(struct mv_vcpu *vcpu);
  /* Runs until there is something for the caller; fills *out. Only on the
   * thread that owns the vCPU. */
  void (*run)(struct mv_vcpu *vcpu, struct mv_exit_info *out);
  /* Makes run() return MV_EXIT_KICKED soon. Any thread. */
  void (*kick)(struct mv_vcpu *vcpu);
  int (*get_state)(struct mv_vcpu *vcpu, struct mv_vcpu_state *out);
  int (*set_state)(struct mv_vcpu *vcpu, const struct mv_vcpu_state *in);
};

struct mv_vcpu {
  struct mv_vm *vm;
  const struct mv_vcpu_ops *ops; /* may change at a hand-over               */
  unsigned id;                   /* APIC id                                 */
  void *impl;                    /* the backend's                           */
  struct mv_run *run;            /* run.c's                                 */
  struct mv_vcpu_stats stats;
};

/* Switches of the translator, each changes nothing but speed (tests). */
struct mv_dbt_options {
  bool no_chain;        /* leave to the dispatcher after every block        */
  bool no_tlb;          /* every access takes the slow path                 */
  bool no_coalesce;     /* one TLB check an access                          */
  bool no_flags_live;   /* assume that flags are always live                */
  unsigned max_insns;   /* instructions a block; 0: default                 */
  uint64_t cache_bytes; /* code cache; 0: default                           */
  const char *saved;    /* file of translations kept between starts, or NULL */
};

struct mv_vm {
  struct mv_mem mem;
  struct mv_bus pio, mmio;
  bool has_bus;         /* false: accesses are exits (low-level tests)      */
  bool hlt_exits;       /* HLT returns MV_EXIT_HLT instead of sleeping      */
  bool exceptions_exit; /* an exception returns instead of being delivered  */
  bool count;           /* count guest instructions                        */
  uint8_t handover;     /* enum mv_handover                                */
  struct mv_dbt_options dbt;
  struct mv_irqchip irqchip; /* filled by vm_init                           */
  const struct mv_vcpu_ops *ops;
  void *impl;     /* the backend's: KVM's descriptors; the translator's IOAPIC  */
  unsigned ncpus; /* how many there will be (CPUID tells it); 0: one        */
  unsigned nvcpus;
  struct mv_vcpu *vcpu[32];
  struct mv_handover_vm *over; /* handover.c's, on KVM                      */
  const char *failed;          /* what the last error came from; a string constant   */
};

extern const struct mv_vcpu_ops mv_kvm_ops, mv_dbt_ops;

#endif
