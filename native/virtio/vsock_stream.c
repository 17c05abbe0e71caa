/*
 * One vsock stream: credit, buffers and the two descriptors.
 *
 * Guest to host: the bytes go from guest memory to out_fd in one writev.  What
 * out_fd does not take is copied to a ring of at most buf_alloc bytes, the
 * credit that the guest was given (virtio 1.2 §5.10.6.3), so that a reader
 * who stops costs bounded memory and stops only this stream.  A byte counts
 * as forwarded (fwd_cnt) when out_fd has it.
 *
 * Host to guest: bytes are read from in_fd straight into the guest's receive
 * buffers, never more than the guest's credit; so nothing is ever held.
 *
 * Descriptors are watched for edges: in_ready and out_ready say that the next
 * call is worth trying, and only -EAGAIN clears them.  They are closed by the
 * loop's thread alone; other threads set in_done and out_done.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>

#include "vsock.h"

#define HELD_MIN 16384

/* ---- lists ---------------------------------------------------------------- */

void stream_enqueue(struct stream *s, enum stream_list list) {
  struct stream_queue *q = &s->vs->queue[list];
  struct stream_link *link = &s->link[list];
  if (link->queued)
    return;
  *link = (struct stream_link){.prev = q->last, .queued = true};
  if (q->last)
    q->last->link[list].next = s;
  else
    q->first = s;
  q->last = s;
}

void stream_dequeue(struct stream *s, enum stream_list list) {
  struct stream_queue *q = &s->vs->queue[list];
  struct stream_link *link = &s->link[list];
  if (!link->queued)
    return;
  if (link->prev)
    link->prev->link[list].next = link->next;
  else
    q->first = link->next;
  if (link->next)
    link->next->link[list].prev = link->prev;
  else
    q->last = link->prev;
  *link = (struct stream_link){0};
}

/* ---- life ------------------------------------------------------------------ */

struct stream *stream_new(struct mv_vsock *vs, uint32_t host_port, uint32_t guest_port) {
  struct stream *s = calloc(1, sizeof(*s));
  if (!s)
    return NULL;
  s->vs = vs;
  s->host_port = host_port;
  s->guest_port = guest_port;
  s->in.fd = s->out.fd = -1;
  s->batch = 1;
  return s;
}

void stream_free(struct stream *s) {
  s->in_done = s->out_done = true;
  stream_settle(s);
  if (s->on_close)
    s->on_close(s->ctx, s->error ? s->error : s->out_error);
  free(s->prefix);
  free(s->held);
  free(s);
}

static void in_event(void *ctx, uint32_t events) {
  (void)events;
  struct stream *s = ctx;
  struct mv_vsock *vs = s->vs;
  pthread_mutex_lock(&vs->dev.lock);
  s->in_ready = true;
  vsock_stream_event(s);
  vsock_pump(vs);
  pthread_mutex_unlock(&vs->dev.lock);
}

static void out_event(void *ctx, uint32_t events) {
  struct stream *s = ctx;
  struct mv_vsock *vs = s->vs;
  pthread_mutex_lock(&vs->dev.lock);
  if (s->state != STREAM_DEAD) {
    s->out_ready = true;
    if (events & (EPOLLERR | EPOLLHUP))
      stream_out_broken(s, -EPIPE);
    else
      stream_flush(s);
    vsock_stream_event(s);
    vsock_pump(vs);
  }
  pthread_mutex_unlock(&vs->dev.lock);
}

/* Opens both ends; each descriptor is closed if anything fails. */
static int ends_open(struct stream *s, const struct mv_vsock_ends *ends) {
  int out_fd = ends->out_fd, rc = 0;
  s->shared = out_fd >= 0 && out_fd == ends->in_fd;
  if (s->shared && (out_fd = fcntl(out_fd, F_DUPFD_CLOEXEC, 0)) < 0)
    rc = -errno;
  int in_rc = mv_fd_open(&s->in, ends->in_fd, false);
  int out_rc = mv_fd_open(&s->out, out_fd, true);
  rc = rc ? rc : in_rc ? in_rc : out_rc;
  if (!rc)
    rc = mv_fd_watch(&s->in, s->vs->loop, in_event, s);
  if (!rc)
    rc = mv_fd_watch(&s->out, s->vs->loop, out_event, s);
  if (rc) {
    mv_fd_close(&s->in);
    mv_fd_close(&s->out);
  }
  return rc;
}

int stream_set_ends(struct stream *s, const struct mv_vsock_ends *ends) {
  int rc = ends_open(s, ends);
  if (!rc && ends->prefix_len) {
    s->prefix = ends->prefix_len <= MV_VSOCK_PREFIX_MAX ? malloc(ends->prefix_len) : NULL;
    if (!s->prefix) {
      mv_fd_close(&s->in);
      mv_fd_close(&s->out);
      return ends->prefix_len > MV_VSOCK_PREFIX_MAX ? -EINVAL : -ENOMEM;
    }
    memcpy(s->prefix, ends->prefix, ends->prefix_len);
    s->prefix_len = ends->prefix_len;
  }
  if (rc)
    return rc;
  s->in_ready = s->in.fd >= 0; /* worth a try */
  s->out_ready = true;
  s->on_close = ends->on_close;
  s->ctx = ends->ctx;
  return 0;
}

static void end_close(struct stream *s, struct mv_fd *end, int how) {
  if (end->fd < 0)
    return;
  if (s->shared)
    shutdown(end->fd, how);
  mv_fd_close(end);
}

void stream_settle(struct stream *s) {
  if (s->in_done)
    end_close(s, &s->in, SHUT_RD);
  if (s->out_done)
    end_close(s, &s->out, SHUT_WR);
}

/* ---- host to guest --------------------------------------------------------- */

uint32_t stream_credit(const struct stream *s) {
  uint32_t in_flight = s->tx_cnt - s->peer_fwd_cnt;
  return s->peer_buf_alloc > in_flight ? s->peer_buf_alloc - in_flight : 0;
}

/* Counters wrap. Two senders in the guest may stamp a header and queue it in
 * different order, so an older value is no offence; it is passed over. */
bool stream_credit_update(struct stream *s, uint32_t buf_alloc, uint32_t fwd_cnt) {
  uint32_t in_flight = s->tx_cnt - s->peer_fwd_cnt;
  uint32_t forward = fwd_cnt - s->peer_fwd_cnt;
  s->peer_buf_alloc = buf_alloc;
  if (forward <= in_flight) {
    s->peer_fwd_cnt = fwd_cnt;
    return true;
  }
  return (int32_t)forward < 0;
}

bool stream_has_data(const struct stream *s) {
  if (s->state != STREAM_OPEN || (s->shut_guest & SHUT_F_RCV) || !stream_credit(s))
    return false;
  return s->prefix_at < s->prefix_len || (s->in_ready && !s->in_eof && !s->in_done);
}

ssize_t stream_fetch(struct stream *s, const struct iovec *iov, unsigned n) {
  if (s->prefix_at < s->prefix_len) {
    size_t part = s->prefix_len - s->prefix_at;
    if (part > iov[0].iov_len)
      part = iov[0].iov_len;
    memcpy(iov[0].iov_base, s->prefix + s->prefix_at, part);
    s->prefix_at += part;
    return part;
  }
  ssize_t got = mv_fd_readv(&s->in, iov, n);
  if (got == -EAGAIN) {
    s->in_ready = false;
    return -EAGAIN;
  }
  if (got <= 0) { /* an error (a terminal that is gone) ends the input as EOF does */
    s->in_eof = true;
    return 0;
  }
  return got;
}

/* ---- guest to host --------------------------------------------------------- */

/* Makes room for `len` more bytes, straightening the ring. */
static int held_grow(struct stream *s, uint32_t len) {
  uint32_t need = s->held_len + len, cap = s->held_cap ? s->held_cap : HELD_MIN;
  while (cap < need)
    cap *= 2;
  if (cap == s->held_cap)
    return 0;
  uint8_t *ring = malloc(cap);
  if (!ring)
    return -ENOMEM;
  uint32_t first = s->held_cap - s->held_at;
  if (first > s->held_len)
    first = s->held_len;
  if (s->held_len) {
    memcpy(ring, s->held + s->held_at, first);
    memcpy(ring + first, s->held, s->held_len - first);
  }
  free(s->held);
  s->held = ring;
  s->held_cap = cap;
  s->held_at = 0;
  return 0;
}

static void held_append(struct stream *s, const uint8_t *data, uint32_t len) {
  uint32_t at = (s->held_at + s->held_len) & (s->held_cap - 1);
  uint32_t first = s->held_cap - at < len ? s->held_cap - at : len;
  memcpy(s->held + at, data, first);
  memcpy(s->held, data + first, len - first);
  s->held_len += len;
}

static int held_add(struct stream *s, const struct iovec *iov, unsigned n, uint64_t skip,
                    uint32_t len) {
  int rc = held_grow(s, len);
  if (rc)
    return rc;
  for (unsigned i = 0; i < n && len; i++) {
    uint64_t part = iov[i].iov_len;
    if (skip >= part) {
      skip -= part;
      continue;
    }
    part = part - skip < len ? part - skip : len;
    held_append(s, (const uint8_t *)iov[i].iov_base + skip, part);
    len -= part;
    skip = 0;
  }
  return 0;
}

/* `len` bytes are off our hands. The guest is told in time: when half of its
 * window is used. Newer Linux keeps no more under way than its own receive
 * buffer has room for, whatever credit we give. */
static void forwarded(struct stream *s, uint32_t len) {
  uint32_t window = s->buf_alloc < s->peer_buf_alloc ? s->buf_alloc : s->peer_buf_alloc;
  s->fwd_cnt += len;
  if (s->state != STREAM_OPEN || (s->shut_guest & SHUT_F_SEND))
    return;
  if (s->fwd_cnt - s->fwd_sent >= window / 2)
    vsock_stream_ctl(s, CTL_CREDIT);
}

void stream_out_broken(struct stream *s, int error) {
  if (s->out_done)
    return;
  s->out_done = true;
  s->out_error = error;
  forwarded(s, s->held_len);
  s->held_len = 0;
  s->shut_host |= SHUT_F_RCV;
}

/* Bytes that out_fd took, all of them if nobody wants them. */
static uint32_t out_write(struct stream *s, const struct iovec *iov, unsigned n, uint32_t len) {
  if (s->out_done || s->out.fd < 0)
    return len;
  if (!s->out_ready)
    return 0;
  ssize_t put = mv_fd_writev(&s->out, iov, n);
  if (put >= 0)
    return put;
  if (put == -EAGAIN) {
    s->out_ready = false;
    return 0;
  }
  stream_out_broken(s, put);
  return len;
}

void stream_flush(struct stream *s) {
  while (s->held_len) {
    uint32_t first = s->held_cap - s->held_at;
    if (first > s->held_len)
      first = s->held_len;
    struct iovec iov[2] = {{s->held + s->held_at, first}, {s->held, s->held_len - first}};
    uint32_t put = out_write(s, iov, iov[1].iov_len ? 2 : 1, s->held_len);
    if (!put || !s->held_len) /* nothing taken, or broken and dropped */
      return;
    s->held_at = (s->held_at + put) & (s->held_cap - 1);
    s->held_len -= put;
    forwarded(s, put);
  }
}

int stream_deliver(struct stream *s, const struct iovec *iov, unsigned n, uint32_t len) {
  if (len > s->buf_alloc - (s->rx_cnt - s->fwd_cnt))
    return -EPROTO;
  s->rx_cnt += len;
  uint32_t done = 0;
  while (!s->held_len && done < len) {
    struct iovec part[64];
    unsigned used = n < 64 ? n : 64;
    used = mv_chain_slice(part, iov, used, done, len - done);
    uint32_t put = used ? out_write(s, part, used, len - done) : 0;
    if (!put)
      break;
    forwarded(s, put);
    done += put;
  }
  return done < len ? held_add(s, iov, n, done, len - done) : 0;
}
