/*
 * Messages before START: how many CPUs on which backend, where RAM is and what
 * is in it, which devices there are, where the first CPU enters.
 *
 * Each is executed as it comes, so that memory is being filled while the
 * front still prepares the next message.
 */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "vmm.h"

int mv_vmm_options(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  const struct mv_ctl_options *o = packet->body;
  if (vmm->have_options || o->version != MV_CTL_VERSION)
    return -EPROTO;
  if (o->ncpus < 1 || o->ncpus > MV_VCPUS_MAX)
    return -EINVAL;
  if (o->accel != MV_CTL_KVM && o->accel != MV_CTL_DBT)
    return -EINVAL;
  vmm->options = *o;
  vmm->have_options = true;
  memcpy(vmm->saved, packet->tail, packet->tail_len);
  struct mv_vm *vm = &vmm->vm;
  vm->ops = o->accel == MV_CTL_KVM ? &mv_kvm_ops : &mv_dbt_ops;
  vm->has_bus = true;
  vm->count = o->flags & MV_CTL_COUNT;
  vm->dbt = (struct mv_dbt_options){
      .no_chain = o->flags & MV_CTL_NO_CHAIN,
      .no_tlb = o->flags & MV_CTL_NO_TLB,
      .no_coalesce = o->flags & MV_CTL_NO_COALESCE,
      .no_flags_live = o->flags & MV_CTL_NO_FLAGS_LIVE,
      .max_insns = o->max_insns,
      .cache_bytes = o->cache_bytes,
      .saved = packet->tail_len ? vmm->saved : NULL,
  };
  return 0;
}

int mv_vmm_ram(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  const struct mv_ctl_ram *ram = packet->body;
  return mv_mem_add(&vmm->vm.mem, ram->gpa, ram->size);
}

int mv_vmm_data(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  const struct mv_ctl_data *data = packet->body;
  return mv_mem_write(&vmm->vm.mem, data->gpa, packet->tail, packet->tail_len);
}

static int read_file(struct mv_vmm *vmm, int fd, const struct mv_ctl_file *f) {
  char *to = mv_mem_ptr(&vmm->vm.mem, f->gpa, f->len);
  if (!to)
    return -EFAULT;
  for (uint64_t done = 0; done < f->len;) {
    ssize_t n = pread(fd, to + done, f->len - done, (off_t)(f->offset + done));
    if (n < 0 && errno != EINTR)
      return -errno;
    if (n == 0)
      return -ENODATA;
    done += n > 0 ? (uint64_t)n : 0;
  }
  return 0;
}

/* A mapping past the end of a file would be a SIGBUS later. */
static bool file_is_long_enough(int fd, const struct mv_ctl_file *f) {
  struct stat st;
  return !fstat(fd, &st) && f->offset <= (uint64_t)st.st_size &&
         f->len <= (uint64_t)st.st_size - f->offset;
}

int mv_vmm_file(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  const struct mv_ctl_file *f = packet->body;
  if (packet->nfds != 1)
    return -EPROTO;
  if (f->how == MV_CTL_READ)
    return read_file(vmm, packet->fd[0], f);
  if (f->how != MV_CTL_MAP)
    return -EINVAL;
  if (!file_is_long_enough(packet->fd[0], f))
    return -ENODATA;
  return mv_mem_map_file(&vmm->vm.mem, f->gpa, packet->fd[0], f->offset, f->len);
}

/* ---- devices ------------------------------------------------------------- */

static int add_serial(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  if (vmm->serial)
    return -EEXIST;
  if (packet->nfds) {
    int error = mv_vmm_console_copy_to(&vmm->console, packet->fd[0]);
    packet->fd[0] = -1;
    if (error)
      return error;
  }
  return mv_serial_new(&vmm->serial, &vmm->vm.pio,
                       &(struct mv_serial_config){
                           .port = MV_PORT_SERIAL,
                           .irq = {&vmm->vm.irqchip, MV_GSI_SERIAL},
                           .sink = mv_vmm_console_write,
                           .sink_ctx = &vmm->console,
                           .in_fd = -1,
                       });
}

static int add_hvc(struct mv_vmm *vmm, const struct mv_virtio_place *at,
                   struct mv_vmm_packet *packet) {
  (void)packet;
  return mv_console_new(
      &vmm->virtio[vmm->nvirtio], at,
      &(struct mv_console_config){
          .in_fd = -1, .out_fd = -1, .sink = mv_vmm_console_write, .sink_ctx = &vmm->console});
}

static int add_rng(struct mv_vmm *vmm, const struct mv_virtio_place *at,
                   struct mv_vmm_packet *packet) {
  (void)packet;
  return mv_rng_new(&vmm->virtio[vmm->nvirtio], at);
}

static int add_blk(struct mv_vmm *vmm, const struct mv_virtio_place *at,
                   struct mv_vmm_packet *packet) {
  const struct mv_ctl_device *d = packet->body;
  if (packet->nfds != 1)
    return -EPROTO;
  struct mv_blk_config config = {
      .fd = packet->fd[0], .read_only = d->flags & MV_CTL_READ_ONLY, .id = "microvm"};
  packet->fd[0] = -1;
  return mv_blk_new(&vmm->virtio[vmm->nvirtio], at, &config);
}

static int add_vsock(struct mv_vmm *vmm, const struct mv_virtio_place *at,
                     struct mv_vmm_packet *packet) {
  (void)packet;
  if (vmm->vsock)
    return -EEXIST;
  int error = mv_vsock_new(&vmm->vsock, at, MV_VSOCK_GUEST_CID);
  if (!error)
    vmm->virtio[vmm->nvirtio] = mv_vsock_virtio(vmm->vsock);
  return error;
}

int mv_vmm_device(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  static int (*const add[])(struct mv_vmm *, const struct mv_virtio_place *,
                            struct mv_vmm_packet *) = {
      [MV_CTL_HVC] = add_hvc,
      [MV_CTL_RNG] = add_rng,
      [MV_CTL_BLK] = add_blk,
      [MV_CTL_VSOCK] = add_vsock,
  };
  const struct mv_ctl_device *d = packet->body;
  if (d->kind == MV_CTL_SERIAL)
    return add_serial(vmm, packet);
  if (d->kind >= sizeof add / sizeof add[0] || !add[d->kind])
    return -EINVAL;
  unsigned i = vmm->nvirtio;
  if (i == MV_VIRTIO_MMIO_MAX)
    return -ENOSPC;
  struct mv_virtio_place at = {
      .mem = &vmm->vm.mem,
      .mmio = &vmm->vm.mmio,
      .gpa = MV_VIRTIO_MMIO_GPA + i * MV_VIRTIO_MMIO_STRIDE,
      .irq = {&vmm->vm.irqchip, MV_GSI_VIRTIO + i},
      .loop = vmm->loop,
  };
  int error = add[d->kind](vmm, &at, packet);
  if (!error)
    vmm->nvirtio++;
  return error;
}

int mv_vmm_entry(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  vmm->entry = *(const struct mv_ctl_entry *)packet->body;
  vmm->have_entry = true;
  return 0;
}
