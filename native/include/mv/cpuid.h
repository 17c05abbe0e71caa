/*
 * What a guest learns from CPUID: one table for both backends (cpuid.c).
 *
 * A table of entries is built once a vCPU, in KVM's own struct. What depends
 * on the vCPU's state at the moment (OSXSAVE, the size of the XSAVE area, APIC
 * enabled) is put in when a leaf is asked for.
 */
#ifndef MV_CPUID_H
#define MV_CPUID_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stdint.h>

#include "mv/features.h"

#define MV_CPUID_ENTRIES_MAX 64

/* Who runs the guest. BOTH: KVM, and the translator may take over: what both offer. */
enum mv_cpuid_backend { MV_CPUID_KVM, MV_CPUID_DBT, MV_CPUID_BOTH };

/* The hypervisor leaves (Documentation/virt/kvm/x86/cpuid.rst). */
#define MV_CPUID_HV_BASE     0x40000000u
#define MV_CPUID_HV_FEATURES 0x40000001u
#define MV_CPUID_HV_TIMING   0x40000010u
#define MV_LAPIC_TIMER_KHZ   1000000u /* the APIC timer counts nanoseconds       */

/* State that some leaves show. */
struct mv_cpuid_dynamic {
  uint64_t cr4, xcr0, apic_base;
};

/* Fills `out` with the entries for vCPU `apic_id` of `ncpus` and returns how
 * many there are, or 0 if `max` is too small. `supported` is what
 * KVM_GET_SUPPORTED_CPUID returned (KVM, BOTH), or NULL: the host's CPUID. */
unsigned mv_cpuid_build(struct kvm_cpuid_entry2 *out, unsigned max, enum mv_cpuid_backend backend,
                        unsigned ncpus, unsigned apic_id, const struct kvm_cpuid2 *supported);

/* What CPUID answers for leaf and subleaf: regs[MV_CPUID_EAX..EDX]. A leaf
 * beyond the highest reads as zero. `dynamic` may be NULL. */
void mv_cpuid_query(const struct kvm_cpuid_entry2 *entries, unsigned n, uint32_t leaf,
                    uint32_t subleaf, const struct mv_cpuid_dynamic *dynamic, uint32_t regs[4]);

/* Does the table offer a feature? MV_FEAT_BASE always is. */
bool mv_cpuid_has(const struct kvm_cpuid_entry2 *entries, unsigned n, enum mv_feature feature);

/* The XCR0 bits that the table offers. */
uint64_t mv_cpuid_xcr0(const struct kvm_cpuid_entry2 *entries, unsigned n);

/* Bytes of a standard-format XSAVE area that holds the components in `xcr0`. */
uint32_t mv_cpuid_xsave_size(const struct kvm_cpuid_entry2 *entries, unsigned n, uint64_t xcr0);

#endif
