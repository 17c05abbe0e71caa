/*
 * The VMM process, inside.
 *
 *   main.c     becomes a confined process, runs the loop
 *   control.c  packets in and out, the table of messages
 *   setup.c    messages before START: memory, devices, entry
 *   guest.c    START and after: vCPU threads, guest events, streams, the end
 *   console.c  what the guest writes to its consoles
 *
 * Threads: the main thread runs the loop and everything here, except what is
 * said to run on a vCPU's thread. Those only record and post to the loop.
 */
#ifndef MV_VMM_H
#define MV_VMM_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "mv/control.h"
#include "mv/devices.h"
#include "mv/fdio.h"
#include "mv/layout.h"
#include "mv/loop.h"
#include "mv/vcpu.h"

struct mv_vmm;

/* ---- console.c --------------------------------------------------------- */

/* What a kernel says before it says nothing more. */
enum mv_vmm_words { MV_VMM_NOTHING = 0, MV_VMM_PANICKED, MV_VMM_HALTED };
#define MV_VMM_LOOK_OUT 4 /* texts that are looked out for                   */

/* The last MV_CTL_CONSOLE_MAX bytes that the guest wrote, a live copy to a
 * descriptor, and a look-out for the kernel's last words. */
struct mv_vmm_console {
  pthread_mutex_t lock;
  uint64_t written;                 /* bytes ever; ring[written % size] is next              */
  uint64_t copied;                  /* of these, bytes that went to out_fd                   */
  uint8_t matched[MV_VMM_LOOK_OUT]; /* bytes of each text seen in a row     */
  enum mv_vmm_words words;
  bool copying;     /* a copy is due on the loop                                 */
  struct mv_fd out; /* fd -1: no live copy                                   */
  struct mv_vmm *vmm;
  char ring[MV_CTL_CONSOLE_MAX];
};

void mv_vmm_console_init(struct mv_vmm_console *console, struct mv_vmm *vmm);
/* mv_sink_fn of all consoles. Any thread; does not block. */
void mv_vmm_console_write(void *console, const void *data, size_t len);
/* Copies all there is to `fd` from now on; owns it. 0 or -errno. */
int mv_vmm_console_copy_to(struct mv_vmm_console *console, int fd);
/* Gives the live copy's reader a last chance of about a second. */
void mv_vmm_console_flush(struct mv_vmm_console *console);
enum mv_vmm_words mv_vmm_console_words(struct mv_vmm_console *console);
/* Sends what the ring holds as CONSOLE packets, oldest first. */
void mv_vmm_console_send(struct mv_vmm_console *console);

/* ---- the VMM ----------------------------------------------------------- */

/* One received message. A handler that keeps a descriptor sets its place to
 * -1; the others are closed. */
struct mv_vmm_packet {
  uint32_t type;
  const void *body; /* as long as the message's struct, aligned              */
  const void *tail; /* inline bytes                                          */
  size_t tail_len;
  int fd[MV_CTL_FDS_MAX];
  unsigned nfds;
};

struct mv_vmm {
  int control_fd;
  struct mv_loop *loop;
  struct mv_vm vm;
  bool have_options, have_entry, created, started;
  struct mv_ctl_options options;
  char saved[MV_CTL_PATH_MAX + 1]; /* path, or ""                              */
  struct mv_ctl_entry entry;
  struct mv_vmm_console console;

  /* devices */
  struct mv_pc_ports ports;
  struct mv_serial *serial;
  struct mv_virtio *virtio[MV_VIRTIO_MMIO_MAX];
  unsigned nvirtio;
  struct mv_vsock *vsock;
  unsigned nstreams; /* that the front opened and that are not over           */

  atomic_uint events_told; /* bit n: guest event n was sent                  */

  /* the end: the first reason given is the one that is told */
  pthread_mutex_t end_lock;
  bool ended, told; /* told: EXIT was sent                                    */
  struct mv_ctl_exit end;
  char end_text[160];
};

/* Puts the ports with a meaning on the bus. 0 or -errno. */
int mv_vmm_guest_init(struct mv_vmm *vmm);
/* Ends devices, vCPUs and backend. No thread of a vCPU runs, nor the loop. */
void mv_vmm_guest_free(struct mv_vmm *vmm);

/* Ends the guest and then the process. Any thread; the first call counts.
 * `format` may be NULL. */
void mv_vmm_end(struct mv_vmm *vmm, enum mv_ctl_reason reason, int value, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* ---- control.c --------------------------------------------------------- */

/* Serves the control socket on the loop. 0 or -errno. */
int mv_vmm_control_init(struct mv_vmm *vmm);
/* Sends one packet: header, `len` bytes of body, `tail_len` bytes. Loop's
 * thread, or a vCPU's for short messages. A front that is gone is no error:
 * the loop sees it. */
void mv_vmm_send(struct mv_vmm *vmm, enum mv_ctl_type type, const void *body, size_t len,
                 const void *tail, size_t tail_len);

/* ---- setup.c, guest.c: message handlers, 0 or -errno -------------------- */

int mv_vmm_options(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
int mv_vmm_ram(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
int mv_vmm_data(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
int mv_vmm_file(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
int mv_vmm_device(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
int mv_vmm_entry(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
int mv_vmm_start(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
int mv_vmm_connect(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
int mv_vmm_stop(struct mv_vmm *vmm, struct mv_vmm_packet *packet);
int mv_vmm_query(struct mv_vmm *vmm, struct mv_vmm_packet *packet);

/* The console's look-out heard a kernel's last words: ends the guest, after a
 * moment if it panicked and may have more to say. Loop's thread. */
void mv_vmm_last_words(void *vmm);

#endif
