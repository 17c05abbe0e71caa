/*
 * What the guest writes to its consoles.
 *
 * Serial port and hvc end here. The last MV_CTL_CONSOLE_MAX bytes are kept in a
 * ring, which bounds what a flooding guest costs. With a live copy, a cursor
 * follows the ring: a reader that keeps up gets every byte; one that stopped
 * loses the oldest and holds nobody up, because writes are done by the loop
 * when the descriptor is ready.
 *
 * Every byte passes a look-out for a kernel's last words: that it panicked, or
 * that it has halted (one without ACPI knows no way to switch the machine off).
 * No beginning of such a text occurs again inside of it, so after a mismatch
 * the search starts over at the mismatching byte.
 */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/epoll.h>

#include "vmm.h"

#define RING MV_CTL_CONSOLE_MAX
static const struct {
  const char *text;
  enum mv_vmm_words means;
} look_out[MV_VMM_LOOK_OUT] = {
    {"Kernel panic - not syncing", MV_VMM_PANICKED},
    {"reboot: Power down", MV_VMM_HALTED},
    {"reboot: Power off not available", MV_VMM_HALTED},
    {"reboot: System halted", MV_VMM_HALTED},
};

void mv_vmm_console_init(struct mv_vmm_console *console, struct mv_vmm *vmm) {
  pthread_mutex_init(&console->lock, NULL);
  console->out.fd = -1;
  console->vmm = vmm;
}

static void watch(struct mv_vmm_console *console, const char *data, size_t len) {
  for (size_t i = 0; i < len && !console->words; i++)
    for (unsigned k = 0; k < MV_VMM_LOOK_OUT; k++) {
      const char *text = look_out[k].text;
      uint8_t *matched = &console->matched[k];
      if (data[i] != text[*matched])
        *matched = 0;
      if (data[i] == text[*matched] && !text[++*matched])
        console->words = look_out[k].means;
    }
}

/* Copies to the live reader what it will take now. Loop's thread. */
static void copy_out(void *ctx) {
  struct mv_vmm_console *console = ctx;
  char chunk[4096];
  for (;;) {
    pthread_mutex_lock(&console->lock);
    console->copying = false;
    if (console->written - console->copied > RING)
      console->copied = console->written - RING;
    size_t at = console->copied % RING, n = console->written - console->copied;
    if (n > RING - at)
      n = RING - at;
    if (n > sizeof chunk)
      n = sizeof chunk;
    memcpy(chunk, console->ring + at, n);
    uint64_t from = console->copied;
    pthread_mutex_unlock(&console->lock);
    if (!n || console->out.fd < 0)
      return;
    ssize_t wrote = mv_fd_writev(&console->out, &(struct iovec){chunk, n}, 1);
    if (wrote == -EAGAIN)
      return;
    if (wrote < 0) { /* the reader is gone: the ring goes on without it */
      mv_fd_close(&console->out);
      return;
    }
    pthread_mutex_lock(&console->lock);
    console->copied = from + (uint64_t)wrote;
    pthread_mutex_unlock(&console->lock);
  }
}

static void copy_out_ready(void *ctx, uint32_t events) {
  (void)events;
  copy_out(ctx);
}

int mv_vmm_console_copy_to(struct mv_vmm_console *console, int fd) {
  int error = mv_fd_open(&console->out, fd, true);
  if (!error)
    error = mv_fd_watch(&console->out, console->vmm->loop, copy_out_ready, console);
  return error;
}

void mv_vmm_console_write(void *ctx, const void *data, size_t len) {
  struct mv_vmm_console *console = ctx;
  const char *from = data;
  pthread_mutex_lock(&console->lock);
  enum mv_vmm_words before = console->words;
  watch(console, from, len);
  bool news = console->words != before;
  while (len) {
    size_t at = console->written % RING, n = len < RING - at ? len : RING - at;
    memcpy(console->ring + at, from, n);
    console->written += n;
    from += n;
    len -= n;
  }
  bool copy = console->out.fd >= 0 && !console->copying;
  if (copy)
    console->copying = true;
  pthread_mutex_unlock(&console->lock);
  if (copy)
    mv_loop_post(console->vmm->loop, copy_out, console);
  if (news)
    mv_loop_post(console->vmm->loop, mv_vmm_last_words, console->vmm);
}

void mv_vmm_console_flush(struct mv_vmm_console *console) {
  for (int tries = 0; tries < 10 && console->out.fd >= 0; tries++) {
    copy_out(console);
    if (console->copied == console->written)
      return;
    poll(&(struct pollfd){.fd = console->out.fd, .events = POLLOUT}, 1, 100);
  }
}

enum mv_vmm_words mv_vmm_console_words(struct mv_vmm_console *console) {
  pthread_mutex_lock(&console->lock);
  enum mv_vmm_words words = console->words;
  pthread_mutex_unlock(&console->lock);
  return words;
}

void mv_vmm_console_send(struct mv_vmm_console *console) {
  enum { CHUNK = 32768 };
  pthread_mutex_lock(&console->lock);
  uint64_t end = console->written, from = end > RING ? end - RING : 0;
  while (from < end) {
    size_t at = from % RING, n = end - from;
    if (n > RING - at)
      n = RING - at;
    if (n > CHUNK)
      n = CHUNK;
    mv_vmm_send(console->vmm, MV_CTL_CONSOLE, console->ring + at, n, NULL, 0);
    from += n;
  }
  pthread_mutex_unlock(&console->lock);
}
