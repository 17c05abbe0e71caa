/*
 * vCPU state of KVM in and out.
 *
 * The order of set_state() matters (api.rst and arch/x86/kvm/x86.c): the APIC base in sregs before
 * the APIC's registers, those before the TSC deadline MSR, events and mp_state last.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>

#include "kvm.h"

struct msr_block {
  struct kvm_msrs head;
  struct kvm_msr_entry entry[MV_MSRS_MAX];
};

_Static_assert(sizeof(struct kvm_xsave) == MV_XSAVE_MAX, "KVM's XSAVE image is not ours");

static bool msr_can_be_kept(int fd, uint32_t index) {
  struct msr_block one = {.head.nmsrs = 1, .entry[0].index = index};
  return ioctl(fd, KVM_GET_MSRS, &one) == 1 && ioctl(fd, KVM_SET_MSRS, &one) == 1;
}

int mv_kvm_list_msrs(struct mv_vcpu *vcpu) {
  enum { MAX = 1024 };
  struct mv_kvm *kvm = vcpu->vm->impl;
  const struct mv_kvm_vcpu *k = vcpu->impl;
  struct kvm_msr_list *list = calloc(1, sizeof *list + MAX * sizeof(uint32_t));
  if (!list)
    return -ENOMEM;
  list->nmsrs = MAX;
  int err = MV_KVM_IOCTL(vcpu->vm, kvm->dev_fd, KVM_GET_MSR_INDEX_LIST, list);
  for (unsigned i = 0; !err && i < list->nmsrs && kvm->nmsrs < MV_MSRS_MAX; i++)
    if (msr_can_be_kept(k->fd, list->indices[i]))
      kvm->msr[kvm->nmsrs++] = list->indices[i];
  free(list);
  return err;
}

static int get_msrs(struct mv_vcpu *vcpu, struct mv_vcpu_state *s) {
  const struct mv_kvm *kvm = vcpu->vm->impl;
  const struct mv_kvm_vcpu *k = vcpu->impl;
  struct msr_block block = {.head.nmsrs = kvm->nmsrs};
  for (unsigned i = 0; i < kvm->nmsrs; i++)
    block.entry[i].index = kvm->msr[i];
  int n = MV_KVM_IOCTL(vcpu->vm, k->fd, KVM_GET_MSRS, &block);
  if (n < 0)
    return n;
  s->nmsrs = n;
  memcpy(s->msrs, block.entry, n * sizeof *s->msrs);
  return 0;
}

/* MSRs that KVM does not keep are left out. The order is KVM's, which has the TSC before its
 * deadline. */
static int set_msrs(struct mv_vcpu *vcpu, const struct mv_vcpu_state *s) {
  const struct mv_kvm *kvm = vcpu->vm->impl;
  const struct mv_kvm_vcpu *k = vcpu->impl;
  struct msr_block block = {0};
  for (unsigned i = 0; i < kvm->nmsrs; i++)
    for (unsigned j = 0; j < s->nmsrs && j < MV_MSRS_MAX; j++)
      if (s->msrs[j].index == kvm->msr[i])
        block.entry[block.head.nmsrs++] = s->msrs[j];
  int n = MV_KVM_IOCTL(vcpu->vm, k->fd, KVM_SET_MSRS, &block);
  if (n < 0)
    return n;
  if ((unsigned)n == block.head.nmsrs)
    return 0;
  vcpu->vm->failed = "KVM_SET_MSRS: a value is refused";
  return -EINVAL;
}

static int get_xcr0(struct mv_vcpu *vcpu, struct mv_vcpu_state *s) {
  const struct mv_kvm_vcpu *k = vcpu->impl;
  struct kvm_xcrs xcrs;
  int err = MV_KVM_IOCTL(vcpu->vm, k->fd, KVM_GET_XCRS, &xcrs);
  for (unsigned i = 0; !err && i < xcrs.nr_xcrs; i++)
    if (xcrs.xcrs[i].xcr == 0)
      s->xcr0 = xcrs.xcrs[i].value;
  return err;
}

static int set_xcr0(struct mv_vcpu *vcpu, const struct mv_vcpu_state *s) {
  const struct mv_kvm_vcpu *k = vcpu->impl;
  struct kvm_xcrs xcrs = {.nr_xcrs = 1, .xcrs = {{.xcr = 0, .value = s->xcr0}}};
  return MV_KVM_IOCTL(vcpu->vm, k->fd, KVM_SET_XCRS, &xcrs);
}

int mv_kvm_get_state(struct mv_vcpu *vcpu, struct mv_vcpu_state *s) {
  struct mv_vm *vm = vcpu->vm;
  const struct mv_kvm *kvm = vm->impl;
  int fd = ((struct mv_kvm_vcpu *)vcpu->impl)->fd;
  struct kvm_mp_state mp = {0};
  memset(s, 0, sizeof *s);
  int err = kvm->irqchip ? MV_KVM_IOCTL(vm, fd, KVM_GET_MP_STATE, &mp) : 0;
  if (!err)
    err = MV_KVM_IOCTL(vm, fd, KVM_GET_REGS, &s->regs);
  if (!err)
    err = MV_KVM_IOCTL(vm, fd, KVM_GET_SREGS, &s->sregs);
  if (!err)
    err = MV_KVM_IOCTL(vm, fd, KVM_GET_DEBUGREGS, &s->debugregs);
  if (!err)
    err = MV_KVM_IOCTL(vm, fd, KVM_GET_VCPU_EVENTS, &s->events);
  if (!err && kvm->irqchip)
    err = MV_KVM_IOCTL(vm, fd, KVM_GET_LAPIC, &s->lapic);
  if (!err)
    err = get_xcr0(vcpu, s);
  if (!err)
    err = MV_KVM_IOCTL(vm, fd, KVM_GET_XSAVE, s->xsave);
  if (!err)
    err = get_msrs(vcpu, s);
  s->mp_state = mp.mp_state;
  return err;
}

int mv_kvm_set_state(struct mv_vcpu *vcpu, const struct mv_vcpu_state *in) {
  struct mv_vm *vm = vcpu->vm;
  const struct mv_kvm *kvm = vm->impl;
  int fd = ((struct mv_kvm_vcpu *)vcpu->impl)->fd;
  struct mv_vcpu_state s = *in; /* ioctls take no const */
  struct kvm_mp_state mp = {.mp_state = s.mp_state};
  int err = MV_KVM_IOCTL(vm, fd, KVM_SET_SREGS, &s.sregs);
  if (!err)
    err = MV_KVM_IOCTL(vm, fd, KVM_SET_REGS, &s.regs);
  if (!err)
    err = set_xcr0(vcpu, &s);
  if (!err)
    err = MV_KVM_IOCTL(vm, fd, KVM_SET_XSAVE, s.xsave);
  if (!err)
    err = MV_KVM_IOCTL(vm, fd, KVM_SET_DEBUGREGS, &s.debugregs);
  if (!err && kvm->irqchip)
    err = MV_KVM_IOCTL(vm, fd, KVM_SET_LAPIC, &s.lapic);
  if (!err)
    err = set_msrs(vcpu, &s);
  if (!err)
    err = MV_KVM_IOCTL(vm, fd, KVM_SET_VCPU_EVENTS, &s.events);
  if (!err && kvm->irqchip)
    err = MV_KVM_IOCTL(vm, fd, KVM_SET_MP_STATE, &mp);
  return err;
}

uint64_t mv_kvm_translate(struct mv_vcpu *vcpu, uint64_t gva) {
  struct kvm_translation t = {.linear_address = gva};
  const struct mv_kvm_vcpu *k = vcpu->impl;
  if (MV_KVM_IOCTL(vcpu->vm, k->fd, KVM_TRANSLATE, &t) || !t.valid)
    return ~0ULL;
  return t.physical_address;
}
