/*
 * Console device with one port (virtio 1.2 §5.3): hvc0 in Linux.
 *
 * Queue 0 receives (host to guest), queue 1 transmits.  Neither direction
 * ever waits for the other side:
 *
 *   input   the descriptor is read straight into the guest's buffers; when
 *           there is none, bytes stay in the descriptor
 *   output  written to the descriptor, and what it does not take goes into
 *           HELD_MAX bytes of ours; when these are full, transmit buffers stay
 *           in the ring until the loop finds the descriptor writable again
 *
 * An output that fails for good (its reader is gone) is dropped from then on,
 * so that a guest's kernel can still write its messages.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>

#include "mv/devices.h"
#include "mv/fdio.h"
#include "transport.h"

#define HELD_MAX 65536
#define F_SIZE   0 /* feature: cols and rows are valid */
#define IOVS     64

enum { QUEUE_RX, QUEUE_TX, QUEUES };

struct console_config {
  uint16_t cols, rows;
  uint32_t max_nr_ports, emerg_wr;
};
_Static_assert(sizeof(struct console_config) == 12, "virtio 1.2 §5.3.4");

struct console {
  struct mv_virtio dev;
  struct console_config config;
  struct mv_fd in, out;
  bool in_ready, out_ready, out_failed;
  mv_sink_fn sink;
  void *sink_ctx;
  struct mv_vq_chain chain;
  unsigned held_at, held_end; /* held[held_at..held_end) waits for `out` */
  uint8_t held[HELD_MAX];
};

static bool can_hold(const struct console *con, uint64_t len) {
  return HELD_MAX - (con->held_end - con->held_at) >= len;
}

/* Writes what the descriptor takes; returns the number of bytes dealt with. */
static size_t out_write(struct console *con, const struct iovec *iov, unsigned n) {
  if (con->out_failed || con->out.fd < 0) {
    size_t all = 0;
    for (unsigned i = 0; i < n; i++)
      all += iov[i].iov_len;
    return all;
  }
  if (!con->out_ready)
    return 0;
  ssize_t put = mv_fd_writev(&con->out, iov, n);
  if (put == -EAGAIN) {
    con->out_ready = false;
    return 0;
  }
  if (put < 0) {
    con->out_failed = true;
    return out_write(con, iov, n);
  }
  return put;
}

static void held_flush(struct console *con) {
  while (con->held_at < con->held_end) {
    struct iovec iov = {con->held + con->held_at, con->held_end - con->held_at};
    size_t put = out_write(con, &iov, 1);
    if (!put)
      return;
    con->held_at += put;
  }
  con->held_at = con->held_end = 0;
}

static void held_append(struct console *con, uint64_t from) {
  unsigned used = con->held_end - con->held_at;
  memmove(con->held, con->held + con->held_at, used);
  con->held_at = 0;
  con->held_end =
      used + mv_chain_read(&con->chain, from, con->held + used, sizeof(con->held) - used);
}

/* Takes one chain. False: no room, it must stay in the ring. A chain longer
 * than the buffer is taken when that is empty, and its end is cut off. */
static bool tx_take(struct console *con) {
  const struct mv_vq_chain *chain = &con->chain;
  if (con->sink) {
    for (unsigned i = 0; i < chain->nread; i++)
      con->sink(con->sink_ctx, chain->iov[i].iov_base, chain->iov[i].iov_len);
    return true;
  }
  held_flush(con);
  if (con->held_end && !can_hold(con, chain->read_len))
    return false;
  uint64_t done = 0;
  while (!con->held_end && done < chain->read_len) {
    struct iovec iov[IOVS];
    unsigned n = chain->nread < IOVS ? chain->nread : IOVS;
    n = mv_chain_slice(iov, chain->iov, n, done, chain->read_len);
    if (!n)
      break;
    size_t put = out_write(con, iov, n);
    if (!put)
      break;
    done += put;
  }
  if (done < chain->read_len)
    held_append(con, done);
  return true;
}

static void tx_run(struct console *con) {
  struct mv_vq *vq = &con->dev.vq[QUEUE_TX];
  while (mv_vq_pop(vq, &con->chain) == 1) {
    if (!tx_take(con)) {
      mv_vq_unpop(vq);
      break;
    }
    mv_vq_push(vq, &con->chain, 0);
  }
  mv_vq_signal(vq);
}

static void rx_run(struct console *con) {
  struct mv_vq *vq = &con->dev.vq[QUEUE_RX];
  while (con->in_ready && mv_vq_pop(vq, &con->chain) == 1) {
    ssize_t got = 0;
    if (con->chain.write_len)
      got = mv_fd_readv(&con->in, con->chain.iov + con->chain.nread, con->chain.nwrite);
    if (got < 0 || (got == 0 && con->chain.write_len)) {
      /* EAGAIN: the loop will call. EOF, error: there is no more input. */
      con->in_ready = false;
      mv_vq_unpop(vq);
      break;
    }
    mv_vq_push(vq, &con->chain, got);
  }
  mv_vq_signal(vq);
}

static void console_notify(struct mv_virtio *dev, unsigned queue) {
  struct console *con = (struct console *)dev;
  if (queue == QUEUE_TX)
    tx_run(con);
  else
    rx_run(con);
}

static void console_driver_ok(struct mv_virtio *dev) {
  rx_run((struct console *)dev);
}

static void in_event(void *ctx, uint32_t events) {
  (void)events;
  struct console *con = ctx;
  pthread_mutex_lock(&con->dev.lock);
  con->in_ready = true;
  rx_run(con);
  pthread_mutex_unlock(&con->dev.lock);
}

static void out_event(void *ctx, uint32_t events) {
  (void)events;
  struct console *con = ctx;
  pthread_mutex_lock(&con->dev.lock);
  con->out_ready = true;
  held_flush(con);
  tx_run(con);
  pthread_mutex_unlock(&con->dev.lock);
}

void mv_console_resize(struct mv_virtio *dev, uint16_t cols, uint16_t rows) {
  struct console *con = (struct console *)dev;
  pthread_mutex_lock(&dev->lock);
  con->config.cols = cols;
  con->config.rows = rows;
  mv_virtio_config_changed(dev);
  pthread_mutex_unlock(&dev->lock);
}

static void console_destroy(struct mv_virtio *dev) {
  struct console *con = (struct console *)dev;
  mv_fd_close(&con->in);
  mv_fd_close(&con->out);
  mv_virtio_detach(dev);
  free(con);
}

static const struct mv_virtio_ops console_ops = {
    .device_id = MV_VIRTIO_ID_CONSOLE,
    .name = "console",
    .nqueues = QUEUES,
    .features = 1 << F_SIZE,
    .config_len = sizeof(struct console_config),
    .notify = console_notify,
    .driver_ok = console_driver_ok,
    .destroy = console_destroy,
};

static int descriptors_open(struct console *con, const struct mv_virtio_place *at,
                            const struct mv_console_config *config) {
  int out_fd = config->out_fd;
  if (out_fd >= 0 && out_fd == config->in_fd)
    out_fd = fcntl(out_fd, F_DUPFD_CLOEXEC, 0);
  int dup_rc = config->out_fd >= 0 && out_fd < 0 ? -errno : 0;
  int in_rc = mv_fd_open(&con->in, config->in_fd, false);
  int rc = mv_fd_open(&con->out, out_fd, true);
  if (dup_rc || in_rc || rc)
    return dup_rc ? dup_rc : in_rc ? in_rc : rc;
  rc = mv_fd_watch(&con->in, at->loop, in_event, con);
  if (!rc)
    rc = mv_fd_watch(&con->out, at->loop, out_event, con);
  con->in_ready = con->in.kind == MV_FD_FILE;
  con->out_ready = true;
  return rc;
}

int mv_console_new(struct mv_virtio **out, const struct mv_virtio_place *at,
                   const struct mv_console_config *config) {
  struct console *con = calloc(1, sizeof(*con));
  if (!con)
    return -ENOMEM;
  con->dev = (struct mv_virtio){.ops = &console_ops, .mem = at->mem, .irq = at->irq};
  con->dev.config = (uint8_t *)&con->config;
  con->config = (struct console_config){config->cols, config->rows, 1, 0};
  con->sink = config->sink;
  con->sink_ctx = config->sink_ctx;
  int rc = descriptors_open(con, at, config);
  if (!rc)
    rc = mv_virtio_attach(&con->dev, at->mmio, at->gpa);
  if (rc) {
    mv_fd_close(&con->in);
    mv_fd_close(&con->out);
    free(con);
    return rc;
  }
  *out = &con->dev;
  return 0;
}
