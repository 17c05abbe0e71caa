/* Is this host's KVM any good? Asked before a guest is started with --accel auto. */
#ifndef MV_PROBE_H
#define MV_PROBE_H

#include <stdint.h>

enum mv_kvm_verdict {
  MV_KVM_GOOD = 1,  /* runs guest code at hardware speed                    */
  MV_KVM_ABSENT,    /* there is no /dev/kvm, or nothing behind it           */
  MV_KVM_FORBIDDEN, /* this user may not open it                            */
  MV_KVM_OLD,       /* a capability that we need is missing: `failed`       */
  MV_KVM_USELESS,   /* it works, but emulates guest code                    */
  MV_KVM_BROKEN,    /* something failed that should not: `failed`, `error`  */
};

/* An instruction of a loop takes 1 ns or less on hardware, some 100 ns in an emulator. */
#define MV_KVM_NS_PER_INSN_MAX 20

struct mv_kvm_probe {
  int32_t verdict;                 /* enum mv_kvm_verdict                                   */
  int32_t error;                   /* -errno, or 0                                          */
  double ns_per_insn, ns_per_exit; /* GOOD and USELESS                      */
  char failed[80];                 /* what failed, or ""                                    */
};

/* Makes a VM of KVM, runs some thousand guest instructions. Takes a few ms. */
void mv_kvm_probe(struct mv_kvm_probe *out);

#endif
