/*
 * START and after: vCPUs, what the guest tells, streams, the end.
 *
 * The end.  Any thread may find that the guest is over (it powered off, the
 * kernel panicked, a CPU shut down, the front pulled the plug). The first
 * reason given is kept and the loop is asked to finish: stop the vCPUs, send
 * console, counters, registers if something is wrong, and EXIT as the last
 * packet. What the guest sent on streams before is still written, for as long
 * as the front has patience; then the process ends, and the host takes
 * everything back.
 */
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

#include "mv/vm.h"
#include "vmm.h"

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- the end --------------------------------------------------------------- */

static void send_stats(struct mv_vmm *vmm) {
  struct mv_ctl_stats sum = {0};
  for (unsigned i = 0; i < vmm->vm.nvcpus; i++) {
    const struct mv_vcpu_stats *s = &vmm->vm.vcpu[i]->stats;
    for (unsigned kind = 0; kind < MV_EXIT_COUNT; kind++)
      sum.exits[kind] += s->exits[kind];
    sum.instructions += s->instructions;
    sum.irqs += s->irqs;
    sum.translated_blocks += s->translated_blocks;
    sum.translated_insns += s->translated_insns;
    sum.code_flushes += s->code_flushes;
    sum.tlb_misses += s->tlb_misses;
    sum.revived_blocks += s->revived_blocks;
  }
  mv_vmm_send(vmm, MV_CTL_STATS, &sum, sizeof sum, NULL, 0);
}

static void send_regs(struct mv_vmm *vmm) {
  static struct mv_vcpu_state state;
  if (!vmm->vm.nvcpus || mv_vcpu_get_state(vmm->vm.vcpu[0], &state))
    return;
  const struct kvm_regs *r = &state.regs;
  const struct kvm_sregs *s = &state.sregs;
  const struct mv_ctl_regs regs = {
      .rax = r->rax,
      .rbx = r->rbx,
      .rcx = r->rcx,
      .rdx = r->rdx,
      .rsi = r->rsi,
      .rdi = r->rdi,
      .rsp = r->rsp,
      .rbp = r->rbp,
      .r8 = r->r8,
      .r9 = r->r9,
      .r10 = r->r10,
      .r11 = r->r11,
      .r12 = r->r12,
      .r13 = r->r13,
      .r14 = r->r14,
      .r15 = r->r15,
      .rip = r->rip,
      .rflags = r->rflags,
      .cr0 = s->cr0,
      .cr2 = s->cr2,
      .cr3 = s->cr3,
      .cr4 = s->cr4,
      .efer = s->efer,
  };
  mv_vmm_send(vmm, MV_CTL_REGS, &regs, sizeof regs, NULL, 0);
}

/* Loop's thread, once. */
static void finish(void *ctx) {
  struct mv_vmm *vmm = ctx;
  if (vmm->started)
    mv_vm_stop(&vmm->vm);
  mv_vmm_console_flush(&vmm->console);
  send_stats(vmm);
  mv_vmm_console_send(&vmm->console);
  if (vmm->started && vmm->end.reason != MV_CTL_R_POWEROFF)
    send_regs(vmm);
  mv_vmm_send(vmm, MV_CTL_EXIT, &vmm->end, sizeof vmm->end, vmm->end_text, strlen(vmm->end_text));
  vmm->told = true;
  if (vmm->vsock)
    mv_vsock_guest_gone(vmm->vsock);
  if (!vmm->nstreams)
    mv_loop_stop(vmm->loop);
}

void mv_vmm_end(struct mv_vmm *vmm, enum mv_ctl_reason reason, int value, const char *format, ...) {
  pthread_mutex_lock(&vmm->end_lock);
  bool first = !vmm->ended;
  if (first) {
    vmm->ended = true;
    vmm->end.time = now_ns();
    vmm->end.reason = reason;
    vmm->end.value = value;
    va_list args;
    va_start(args, format);
    if (format)
      vsnprintf(vmm->end_text, sizeof vmm->end_text, format, args);
    va_end(args);
  }
  pthread_mutex_unlock(&vmm->end_lock);
  if (first && mv_loop_post(vmm->loop, finish, vmm))
    _exit(1); /* out of memory: end of file tells the front */
}

int mv_vmm_stop(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  (void)packet;
  mv_vmm_end(vmm, MV_CTL_R_STOPPED, 0, NULL);
  return 0;
}

int mv_vmm_query(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  (void)packet;
  send_stats(vmm);
  mv_vmm_console_send(&vmm->console);
  mv_vmm_send(vmm, MV_CTL_QUERY_END, NULL, 0, NULL, 0);
  return 0;
}

/* ---- what the guest tells ---------------------------------------------------- */

/* A reset or a triple fault after a panic message is how a kernel ends that was
 * told not to wait (panic=-1). vCPU's thread. */
static void end_unless_panicked(struct mv_vmm *vmm, enum mv_ctl_reason otherwise, int value) {
  bool panicked = mv_vmm_console_words(&vmm->console) == MV_VMM_PANICKED;
  mv_vmm_end(vmm, panicked ? MV_CTL_R_PANIC : otherwise, panicked ? 0 : value, NULL);
}

static void on_debug_exit(void *ctx, int status) {
  mv_vmm_end(ctx, MV_CTL_R_DEBUG_EXIT, status, NULL);
}

static void on_reset(void *ctx) {
  end_unless_panicked(ctx, MV_CTL_R_REBOOT, 0);
}

/* MV_PORT_EVENT. Each code is told once, so that a guest cannot flood the
 * front. vCPU's thread. */
static void on_event(void *ctx, uint32_t value) {
  struct mv_vmm *vmm = ctx;
  struct mv_ctl_guest told = {now_ns(), value & 0xff, value >> 8};
  if (told.code == MV_EVENT_POWEROFF)
    mv_vmm_end(vmm, MV_CTL_R_POWEROFF, (int)told.value, NULL);
  else if (told.code == MV_EVENT_REBOOT)
    mv_vmm_end(vmm, MV_CTL_R_REBOOT, 0, NULL);
  else if (told.code < 32 &&
           !(atomic_fetch_or(&vmm->events_told, 1u << told.code) >> told.code & 1))
    mv_vmm_send(vmm, MV_CTL_GUEST, &told, sizeof told, NULL, 0);
}

static void panic_time_is_over(void *ctx, uint32_t events) {
  (void)events;
  mv_vmm_end(ctx, MV_CTL_R_PANIC, 0, NULL);
}

void mv_vmm_last_words(void *ctx) {
  struct mv_vmm *vmm = ctx;
  if (mv_vmm_console_words(&vmm->console) == MV_VMM_HALTED) {
    mv_vmm_end(vmm, MV_CTL_R_POWEROFF, 0, NULL);
    return;
  }
  const struct itimerspec in_half_a_second = {.it_value.tv_nsec = 500000000};
  int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
  if (timer < 0 || timerfd_settime(timer, 0, &in_half_a_second, NULL) ||
      mv_loop_add(vmm->loop, timer, EPOLLIN, panic_time_is_over, vmm))
    mv_vmm_end(vmm, MV_CTL_R_PANIC, 0, NULL);
}

int mv_vmm_guest_init(struct mv_vmm *vmm) {
  vmm->ports = (struct mv_pc_ports){
      .debug_exit = on_debug_exit, .reset = on_reset, .event = on_event, .ctx = vmm};
  return mv_pc_ports_add(&vmm->ports, &vmm->vm.pio);
}

void mv_vmm_guest_free(struct mv_vmm *vmm) {
  while (vmm->nvirtio) /* first: a device's worker may still raise an interrupt */
    mv_virtio_free(vmm->virtio[--vmm->nvirtio]);
  if (vmm->serial)
    mv_serial_free(vmm->serial);
  if (vmm->created)
    mv_vm_destroy(&vmm->vm);
}

/* ---- vCPUs --------------------------------------------------------------------- */

/* Runs on the vCPU's thread. */
static bool on_vcpu_exit(void *ctx, struct mv_vcpu *vcpu, const struct mv_exit_info *exit) {
  struct mv_vmm *vmm = ctx;
  if (exit->reason == MV_EXIT_SHUTDOWN)
    end_unless_panicked(vmm, MV_CTL_R_SHUTDOWN, 0);
  else if (exit->reason == MV_EXIT_HLT)
    mv_vmm_end(vmm, MV_CTL_R_HALTED, 0, NULL);
  else if (exit->reason == MV_EXIT_ERROR)
    mv_vmm_end(vmm, MV_CTL_R_BACKEND, exit->error, "%s: %s", vcpu->ops->name,
               strerror(-exit->error));
  else
    mv_vmm_end(vmm, MV_CTL_R_BACKEND, -EPROTO, "%s: exit %d that nobody serves", vcpu->ops->name,
               exit->reason);
  return false;
}

static int add_vcpus(struct mv_vmm *vmm) {
  static struct mv_vcpu_state state;
  int error = 0;
  for (unsigned i = 0; !error && i < vmm->options.ncpus; i++)
    error = mv_vm_add_vcpu(&vmm->vm, &(struct mv_vcpu *){NULL});
  struct mv_vcpu *first = vmm->vm.vcpu[0];
  if (!error)
    error = mv_vcpu_get_state(first, &state);
  if (error)
    return error;
  mv_state_long_mode(&state, vmm->entry.rip, vmm->entry.cr3, vmm->entry.gdt);
  state.regs.rsi = vmm->entry.rsi;
  state.regs.rsp = vmm->entry.rsp;
  return mv_vcpu_set_state(first, &state);
}

/* On KVM, notifications of virtio queues leave the guest without an exit. */
static int add_notifications(struct mv_vmm *vmm) {
  if (vmm->options.accel != MV_CTL_KVM)
    return 0;
  int error = 0;
  for (unsigned i = 0; !error && i < vmm->nvirtio; i++) {
    int fd = mv_virtio_notify_fd(vmm->virtio[i], vmm->loop);
    uint64_t gpa = MV_VIRTIO_MMIO_GPA + i * MV_VIRTIO_MMIO_STRIDE + MV_VIRTIO_NOTIFY_OFFSET;
    error = fd < 0 ? fd : mv_vm_ioeventfd(&vmm->vm, gpa, fd);
  }
  return error;
}

int mv_vmm_start(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  (void)packet;
  if (!vmm->have_options || !vmm->have_entry)
    return -EPROTO;
  int error = mv_vm_init(&vmm->vm, vmm->vm.ops);
  vmm->created = !error;
  if (!error)
    error = add_vcpus(vmm);
  if (!error)
    error = add_notifications(vmm);
  if (error) {
    mv_vmm_end(vmm, MV_CTL_R_BACKEND, error, "%s: %s: %s", vmm->vm.ops->name,
               vmm->vm.failed ? vmm->vm.failed : "start", strerror(-error));
    return 0;
  }
  struct mv_ctl_started started = {now_ns()};
  vmm->started = true;
  mv_vmm_send(vmm, MV_CTL_STARTED, &started, sizeof started, NULL, 0);
  error = mv_vm_start(&vmm->vm, on_vcpu_exit, vmm);
  if (error) {
    vmm->started = false;
    mv_vmm_end(vmm, MV_CTL_R_BACKEND, error, "vCPU threads: %s", strerror(-error));
  }
  return 0;
}

/* ---- streams ---------------------------------------------------------------------- */

struct stream {
  struct mv_vmm *vmm;
  int done_fd;
};

/* The stream is over and all that the guest sent was written. */
static void stream_closed(void *ctx, int error) {
  (void)error;
  struct stream *stream = ctx;
  if (stream->done_fd >= 0)
    close(stream->done_fd);
  if (!--stream->vmm->nstreams && stream->vmm->told)
    mv_loop_stop(stream->vmm->loop);
  free(stream);
}

static int take_fd(struct mv_vmm_packet *packet, unsigned *next) {
  int fd = packet->fd[*next];
  packet->fd[(*next)++] = -1;
  return fd;
}

int mv_vmm_connect(struct mv_vmm *vmm, struct mv_vmm_packet *packet) {
  const struct mv_ctl_connect *c = packet->body;
  bool both = c->fds & MV_CTL_FD_BOTH;
  if (c->fds >= MV_CTL_FD_DONE << 1 || (unsigned)__builtin_popcount(c->fds) != packet->nfds ||
      (both && c->fds & (MV_CTL_FD_IN | MV_CTL_FD_OUT)))
    return -EPROTO;
  struct stream *stream = malloc(sizeof *stream);
  if (!vmm->vsock || !stream) {
    free(stream);
    return 0; /* the descriptors are closed: the front sees the stream end */
  }
  unsigned next = 0;
  struct mv_vsock_ends ends = {.in_fd = -1,
                               .out_fd = -1,
                               .prefix = packet->tail,
                               .prefix_len = packet->tail_len,
                               .on_close = stream_closed,
                               .ctx = stream};
  if (c->fds & (MV_CTL_FD_IN | MV_CTL_FD_BOTH))
    ends.in_fd = take_fd(packet, &next);
  if (c->fds & MV_CTL_FD_OUT)
    ends.out_fd = take_fd(packet, &next);
  if (both)
    ends.out_fd = ends.in_fd;
  stream->vmm = vmm;
  stream->done_fd = c->fds & MV_CTL_FD_DONE ? take_fd(packet, &next) : -1;
  vmm->nstreams++;
  if (mv_vsock_connect(vmm->vsock, c->port, &ends) < 0)
    stream_closed(stream, 0);
  return 0;
}
