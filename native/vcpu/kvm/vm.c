/*
 * A VM on KVM: capabilities, memory slots, in-kernel irqchip (without PIT), notifications.
 *
 * Everything that the backend relies on is asked for by capability first: an old or partial KVM
 * gives -ENOTSUP and the capability's name, not a failure in the middle of a boot.
 */
#include <cpuid.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "kvm.h"
#include "mv/layout.h"

/* Pages that KVM takes for itself on Intel hosts without "unrestricted guest":
 * in the hole below 4 GiB, above all our devices. */
#define IDENTITY_MAP_GPA 0xfffbc000ULL
#define TSS_GPA          0xfffbd000ULL
#define VMX_BIT          (1u << 5) /* ECX of leaf 1                                  */
#define SVM_BIT          (1u << 2) /* ECX of leaf 8000_0001                          */
#define CPUID_MAX        256

int mv_kvm_ioctl(struct mv_vm *vm, int fd, unsigned long request, void *arg, const char *what) {
  int r = ioctl(fd, request, arg);
  if (r >= 0)
    return r;
  vm->failed = what;
  return -errno;
}

static int check_capabilities(struct mv_vm *vm, int dev_fd) {
  static const struct {
    long cap;
    int least;
    const char *name;
  } needed[] = {
#define CAP(name, least) {KVM_CAP_##name, least, "KVM_CAP_" #name}
      CAP(USER_MEMORY, 1),    CAP(NR_MEMSLOTS, MV_MEM_SLOTS_MAX),
      CAP(EXT_CPUID, 1),      CAP(IRQCHIP, 1),
      CAP(SET_TSS_ADDR, 1),   CAP(SET_IDENTITY_MAP_ADDR, 1),
      CAP(IMMEDIATE_EXIT, 1), CAP(IOEVENTFD, 1),
      CAP(MP_STATE, 1),       CAP(VCPU_EVENTS, 1),
      CAP(DEBUGREGS, 1),      CAP(XSAVE, 1),
      CAP(XCRS, 1),
#undef CAP
  };
  for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
    if (ioctl(dev_fd, KVM_CHECK_EXTENSION, needed[i].cap) < needed[i].least) {
      vm->failed = needed[i].name;
      return -ENOTSUP;
    }
  return 0;
}

static int open_device(struct mv_vm *vm) {
  int fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
  if (fd < 0) {
    vm->failed = "/dev/kvm";
    return -errno;
  }
  int version = MV_KVM_IOCTL(vm, fd, KVM_GET_API_VERSION, NULL);
  int err = version < 0 ? version : version != KVM_API_VERSION ? -ENOTSUP : 0;
  if (err)
    vm->failed = "KVM_GET_API_VERSION";
  else
    err = check_capabilities(vm, fd);
  if (err) {
    close(fd);
    return err;
  }
  return fd;
}

/* KVM_CREATE_VM is interrupted by signals on some kernels, without harm. */
static int create_vm(struct mv_vm *vm, int dev_fd) {
  int fd;
  do
    fd = MV_KVM_IOCTL(vm, dev_fd, KVM_CREATE_VM, 0);
  while (fd == -EINTR);
  return fd;
}

static int add_memory(struct mv_vm *vm, int vm_fd) {
  for (unsigned i = 0; i < vm->mem.nslots; i++) {
    const struct mv_memslot *slot = &vm->mem.slot[i];
    struct kvm_userspace_memory_region region = {
        .slot = i,
        .guest_phys_addr = slot->gpa,
        .memory_size = slot->size,
        .userspace_addr = (uintptr_t)slot->hva,
    };
    int err = MV_KVM_IOCTL(vm, vm_fd, KVM_SET_USER_MEMORY_REGION, &region);
    if (err)
      return err;
  }
  return 0;
}

static int create_irqchip(struct mv_vm *vm, int vm_fd) {
  int err = mv_kvm_ioctl(vm, vm_fd, KVM_SET_TSS_ADDR, (void *)TSS_GPA, "KVM_SET_TSS_ADDR");
  uint64_t identity_map = IDENTITY_MAP_GPA;
  if (!err)
    err = MV_KVM_IOCTL(vm, vm_fd, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
  if (!err && !vm->hlt_exits)
    err = MV_KVM_IOCTL(vm, vm_fd, KVM_CREATE_IRQCHIP, NULL);
  return err;
}

/* On a failed emulation tell us, rather than raising #UD in the guest's user mode. */
static void ask_for_emulation_exits(int vm_fd) {
  struct kvm_enable_cap cap = {.cap = KVM_CAP_EXIT_ON_EMULATION_FAILURE, .args = {1}};
  if (ioctl(vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_EXIT_ON_EMULATION_FAILURE) > 0)
    ioctl(vm_fd, KVM_ENABLE_CAP, &cap);
}

static int read_cpuid(struct mv_vm *vm, struct mv_kvm *kvm) {
  kvm->supported = calloc(1, sizeof *kvm->supported + CPUID_MAX * sizeof(struct kvm_cpuid_entry2));
  if (!kvm->supported)
    return -ENOMEM;
  kvm->supported->nent = CPUID_MAX;
  return MV_KVM_IOCTL(vm, kvm->dev_fd, KVM_GET_SUPPORTED_CPUID, kvm->supported);
}

/* KVM with hardware under it has a processor that says VMX (CPUID 1) or SVM (CPUID 8000_0001). */
static bool has_hardware(void) {
  unsigned a, b, vmx = 0, svm = 0, d;
  __get_cpuid(1, &a, &b, &vmx, &d);
  __get_cpuid(0x80000001, &a, &b, &svm, &d);
  return vmx & VMX_BIT || svm & SVM_BIT;
}

static void set_level(void *ctx, unsigned gsi, int level) {
  const struct mv_kvm *kvm = ctx;
  struct kvm_irq_level line = {.irq = gsi, .level = level};
  ioctl(kvm->vm_fd, KVM_IRQ_LINE, &line);
}

static void drop_level(void *ctx, unsigned gsi, int level) {
  (void)ctx, (void)gsi, (void)level;
}

static void on_kick(int signal) {
  (void)signal;
}

int mv_kvm_vm_init(struct mv_vm *vm) {
  struct mv_kvm *kvm = calloc(1, sizeof *kvm);
  if (!kvm)
    return -ENOMEM;
  kvm->vm_fd = -1;
  vm->impl = kvm;
  int err = kvm->dev_fd = open_device(vm);
  if (err < 0)
    goto out;
  err = kvm->vm_fd = create_vm(vm, kvm->dev_fd);
  if (err < 0)
    goto out;
  err = MV_KVM_IOCTL(vm, kvm->dev_fd, KVM_GET_VCPU_MMAP_SIZE, NULL);
  if (err < 0)
    goto out;
  kvm->run_size = err;
  err = create_irqchip(vm, kvm->vm_fd);
  if (!err)
    err = add_memory(vm, kvm->vm_fd);
  if (!err)
    err = read_cpuid(vm, kvm);
  if (err)
    goto out;
  ask_for_emulation_exits(kvm->vm_fd);
  kvm->irqchip = !vm->hlt_exits;
  kvm->emulated = !has_hardware();
  vm->irqchip = (struct mv_irqchip){kvm->irqchip ? set_level : drop_level, kvm};
  /* The handler does nothing: it is there to interrupt KVM_RUN. */
  struct sigaction kick = {.sa_handler = on_kick, .sa_flags = SA_ONSTACK};
  sigaction(MV_KVM_KICK_SIGNAL, &kick, NULL);
  return 0;
out:
  mv_kvm_vm_destroy(vm);
  return err;
}

void mv_kvm_vm_destroy(struct mv_vm *vm) {
  struct mv_kvm *kvm = vm->impl;
  if (kvm->vm_fd >= 0)
    close(kvm->vm_fd);
  if (kvm->dev_fd >= 0)
    close(kvm->dev_fd);
  free(kvm->supported);
  free(kvm);
  vm->impl = NULL;
}

int mv_kvm_ioeventfd(struct mv_vm *vm, uint64_t gpa, int fd) {
  const struct mv_kvm *kvm = vm->impl;
  struct kvm_ioeventfd event = {.addr = gpa, .len = 4, .fd = fd};
  return MV_KVM_IOCTL(vm, kvm->vm_fd, KVM_IOEVENTFD, &event);
}

int mv_kvm_get_ioapic(struct mv_vm *vm, struct kvm_ioapic_state *out) {
  const struct mv_kvm *kvm = vm->impl;
  struct kvm_irqchip chip = {.chip_id = KVM_IRQCHIP_IOAPIC};
  int err = MV_KVM_IOCTL(vm, kvm->vm_fd, KVM_GET_IRQCHIP, &chip);
  *out = chip.chip.ioapic;
  return err;
}
