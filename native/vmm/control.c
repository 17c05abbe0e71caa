/*
 * The control socket: packets in by the table of messages, packets out.
 *
 * The front is trusted, and it is one program with this one: a packet that
 * does not fit the table is a mistake in either, and ends the VMM with a
 * reason. End of file means that the front is gone or has no more use for the
 * guest: the process ends there and then.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include "mv/vm.h"
#include "vmm.h"

_Static_assert(MV_CTL_EXIT_KINDS == MV_EXIT_COUNT, "struct mv_ctl_stats follows enum mv_exit");
_Static_assert(sizeof(struct mv_ctl_header) == 8, "struct mv_ctl_header");
_Static_assert(sizeof(struct mv_ctl_options) == 32, "struct mv_ctl_options");
_Static_assert(sizeof(struct mv_ctl_file) == 32, "struct mv_ctl_file");
_Static_assert(sizeof(struct mv_ctl_entry) == 40, "struct mv_ctl_entry");
_Static_assert(sizeof(struct mv_ctl_guest) == 16, "struct mv_ctl_guest");
_Static_assert(sizeof(struct mv_ctl_exit) == 24, "struct mv_ctl_exit");

/* When a message may come. */
enum when { SETUP = 1, RUNNING = 2 };

struct message {
  const char *name;
  int (*run)(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
  size_t body;  /* bytes of its struct                                      */
  size_t tail;  /* inline bytes that may follow, at most                    */
  unsigned fds; /* descriptors, at most                                     */
  enum when when;
};

static const struct message messages[] = {
    [MV_CTL_OPTIONS] = {"OPTIONS", mv_vmm_options, sizeof(struct mv_ctl_options), MV_CTL_PATH_MAX,
                        0, SETUP},
    [MV_CTL_RAM] = {"RAM", mv_vmm_ram, sizeof(struct mv_ctl_ram), 0, 0, SETUP},
    [MV_CTL_DATA] = {"DATA", mv_vmm_data, sizeof(struct mv_ctl_data), MV_CTL_PACKET_MAX, 0, SETUP},
    [MV_CTL_FILE] = {"FILE", mv_vmm_file, sizeof(struct mv_ctl_file), 0, 1, SETUP},
    [MV_CTL_DEVICE] = {"DEVICE", mv_vmm_device, sizeof(struct mv_ctl_device), 0, 1, SETUP},
    [MV_CTL_ENTRY] = {"ENTRY", mv_vmm_entry, sizeof(struct mv_ctl_entry), 0, 0, SETUP},
    [MV_CTL_START] = {"START", mv_vmm_start, 0, 0, 0, SETUP},
    [MV_CTL_CONNECT] = {"CONNECT", mv_vmm_connect, sizeof(struct mv_ctl_connect), MV_CTL_PREFIX_MAX,
                        MV_CTL_FDS_MAX, RUNNING},
    [MV_CTL_STOP] = {"STOP", mv_vmm_stop, 0, 0, 0, SETUP | RUNNING},
    [MV_CTL_QUERY] = {"QUERY", mv_vmm_query, 0, 0, 0, SETUP | RUNNING},
};

static void run_packet(struct mv_vmm *vmm, struct mv_vmm_packet *packet, size_t size) {
  static const struct message unknown = {.name = "unknown"};
  if (vmm->ended)
    return; /* it crossed with EXIT */
  size_t known = packet->type < sizeof messages / sizeof messages[0];
  const struct message *m =
      known && messages[packet->type].run ? &messages[packet->type] : &unknown;
  int error = -EPROTO;
  if (m->run && size >= m->body && size - m->body <= m->tail && packet->nfds <= m->fds &&
      (m->when & (vmm->started ? RUNNING : SETUP))) {
    packet->tail = (const char *)packet->body + m->body;
    packet->tail_len = size - m->body;
    error = m->run(vmm, packet);
  }
  if (!error)
    return;
  vmm->end.message = packet->type;
  mv_vmm_end(vmm, MV_CTL_R_SETUP, error, "message %s: %s", m->name, strerror(-error));
}

/* Collects the descriptors that came beside a packet. */
static void take_fds(struct msghdr *msg, struct mv_vmm_packet *packet) {
  for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c; c = CMSG_NXTHDR(msg, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
      continue;
    packet->nfds = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
    memcpy(packet->fd, CMSG_DATA(c), packet->nfds * sizeof(int));
  }
}

#define FRONT_GONE_SECONDS 3

/* Nobody is left to tell anything. What the translator would keep is written
 * first, but not at any price: the alarm ends a guest that does not stop. */
static _Noreturn void front_gone(struct mv_vmm *vmm) {
  if (vmm->started && vmm->vm.dbt.saved) {
    alarm(FRONT_GONE_SECONDS);
    mv_vm_stop(&vmm->vm);
    mv_vmm_guest_free(vmm);
  }
  _exit(0);
}

/* Receives and runs one packet. False: there is none. */
static bool receive(struct mv_vmm *vmm) {
  static _Alignas(8) char data[MV_CTL_PACKET_MAX];
  union {
    struct cmsghdr align;
    char space[CMSG_SPACE(MV_CTL_FDS_MAX * sizeof(int))];
  } fds;
  struct iovec iov = {data, sizeof data};
  struct msghdr msg = {
      .msg_iov = &iov, .msg_iovlen = 1, .msg_control = &fds, .msg_controllen = sizeof fds};
  ssize_t n = recvmsg(vmm->control_fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0 && (errno == EAGAIN || errno == EINTR))
    return false;
  if (n <= 0)
    front_gone(vmm);
  struct mv_vmm_packet packet = {.body = data + sizeof(struct mv_ctl_header)};
  take_fds(&msg, &packet);
  const struct mv_ctl_header *header = (const void *)data;
  size_t size = (size_t)n < sizeof *header ? 0 : (size_t)n - sizeof *header;
  if ((size_t)n >= sizeof *header && header->size == (size_t)n)
    packet.type = header->type;
  run_packet(vmm, &packet, size);
  for (unsigned i = 0; i < packet.nfds; i++)
    if (packet.fd[i] >= 0)
      close(packet.fd[i]);
  return true;
}

static void control_ready(void *ctx, uint32_t events) {
  (void)events;
  struct mv_vmm *vmm = ctx;
  while (receive(vmm))
    ;
}

int mv_vmm_control_init(struct mv_vmm *vmm) {
  struct timeval patience = {.tv_sec = 2}; /* for a front that does not read */
  if (setsockopt(vmm->control_fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience))
    return -errno;
  return mv_loop_add(vmm->loop, vmm->control_fd, EPOLLIN, control_ready, vmm);
}

void mv_vmm_send(struct mv_vmm *vmm, enum mv_ctl_type type, const void *body, size_t len,
                 const void *tail, size_t tail_len) {
  struct mv_ctl_header header = {type, (uint32_t)(sizeof header + len + tail_len)};
  struct iovec iov[] = {{&header, sizeof header}, {(void *)body, len}, {(void *)tail, tail_len}};
  struct msghdr msg = {.msg_iov = iov, .msg_iovlen = 3};
  while (sendmsg(vmm->control_fd, &msg, MSG_NOSIGNAL) < 0 && errno == EINTR)
    ;
}
