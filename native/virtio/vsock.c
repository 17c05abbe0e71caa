/*
 * Socket device (virtio 1.2 §5.10): streams between the guest's ports and
 * descriptors of the host.
 *
 * Queues: 0 receive (to the guest), 1 transmit (from it), 2 event (unused: no
 * migration).  Each packet is a header of 44 bytes and, in RW, a payload.
 *
 * A stream's life, by what happens:
 *
 *   CONNECTING  host calls connect: REQUEST is owed      RESPONSE -> OPEN
 *   ACCEPTING   guest's REQUEST to a port with a         loop asks the listener,
 *               listener                                 RESPONSE owed -> OPEN
 *   OPEN        RW both ways, within credit; SHUTDOWN in either direction
 *   DRAINING    the guest reset it, or itself, and bytes that it sent before
 *               wait for a slow reader
 *   DEAD        both directions ended by the guest and all written (we answer
 *               RST, as Linux expects), or RST, or a broken rule
 *
 * DRAINING is what Linux makes of a reader that takes longer than 8 s: it
 * sends SHUTDOWN, and RST when we have not answered by then.
 *
 * What we owe the guest is never a queue of packets, but a few bits a stream
 * (CTL_*) and a bounded ring of RSTs for packets that belong to no stream;
 * when that ring is half full, transmit buffers stay in the ring until the
 * guest has taken some.  So a flood costs the guest's time, not our memory.
 *
 * Broken rules (each resets the stream, -EPROTO): RW beyond the credit given,
 * after SHUTDOWN, before OPEN, or longer than its descriptors; a RESPONSE or
 * REQUEST for a stream that is not waiting for one; reading what was not sent.
 * A packet that names another CID is dropped.
 *
 * Threads: transmit runs where the guest notifies (vCPU or loop), including
 * the write to out_fd.  Data to the guest is read on the loop's thread.
 * Descriptors are opened and closed, and callbacks called, on the loop's
 * thread, for which the stream is put on LIST_WORK and the loop is woken.
 */
#include <endian.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "mv/layout.h"
#include "vsock.h"

enum { QUEUE_RX, QUEUE_TX, QUEUE_EVENT, QUEUES };

#define F_STREAM       0
#define TX_TURN        256 /* packets before others get the lock */
#define DATA_TURNS     16  /* reads before the loop sees its other descriptors */
#define FIRST_PORT     0x40000000u
#define HDR            sizeof(struct vsock_hdr)
#define CHAIN_SEGMENTS 512 /* iovecs of one read over several buffers */

static void loop_wake(struct mv_vsock *vs) {
  uint64_t one = 1;
  if (vs->woken)
    return;
  vs->woken = write(vs->wake_fd, &one, sizeof(one)) == sizeof(one);
}

static void work_add(struct stream *s) {
  stream_enqueue(s, LIST_WORK);
  loop_wake(s->vs);
}

/* ---- the table of streams -------------------------------------------------- */

static struct stream **bucket(struct mv_vsock *vs, uint32_t host_port, uint32_t guest_port) {
  return &vs->bucket[(host_port ^ guest_port * 0x9e3779b1u) % VSOCK_BUCKETS];
}

/* The stream between these ports, as far as the guest still knows of it. */
static struct stream *stream_find(struct mv_vsock *vs, uint32_t host_port, uint32_t guest_port) {
  struct stream *s = *bucket(vs, host_port, guest_port);
  while (s &&
         (s->host_port != host_port || s->guest_port != guest_port || s->state == STREAM_DRAINING))
    s = s->hash_next;
  return s;
}

static void stream_insert(struct stream *s) {
  struct stream **at = bucket(s->vs, s->host_port, s->guest_port);
  s->hash_next = *at;
  *at = s;
  s->vs->nstreams++;
  s->id = ++s->vs->next_id;
  s->buf_alloc = VSOCK_BUF_SMALL;
  if (s->vs->nlarge < VSOCK_LARGE_MAX) {
    s->buf_alloc = VSOCK_BUF_LARGE;
    s->vs->nlarge++;
  }
}

static void stream_remove(struct stream *s) {
  struct stream **at = bucket(s->vs, s->host_port, s->guest_port);
  while (*at != s)
    at = &(*at)->hash_next;
  *at = s->hash_next;
}

static void rst_owe(struct mv_vsock *vs, uint32_t host_port, uint32_t guest_port, uint16_t type) {
  if (vs->rst_len == VSOCK_RSTS)
    return; /* cannot be: transmit stops at half, streams are fewer than the rest */
  unsigned at = (vs->rst_at + vs->rst_len++) % VSOCK_RSTS;
  vs->rst[at] = (struct vsock_rst){host_port, guest_port, type};
}
_Static_assert(VSOCK_RSTS / 2 >= MV_VSOCK_STREAMS_MAX, "each stream may owe one RST");

/* Transmit waits while too many RSTs are owed. */
static bool tx_allowed(const struct mv_vsock *vs) {
  return vs->rst_len < VSOCK_RSTS / 2;
}

/* Ends a stream; the loop closes and frees it. */
static void stream_kill(struct stream *s, int error, bool send_rst) {
  if (s->state == STREAM_DEAD)
    return;
  if (send_rst)
    rst_owe(s->vs, s->host_port, s->guest_port, VSOCK_TYPE_STREAM);
  s->state = STREAM_DEAD;
  s->error = error;
  for (unsigned list = 0; list < STREAM_LISTS; list++)
    stream_dequeue(s, list);
  stream_remove(s);
  s->hash_next = s->vs->dead;
  s->vs->dead = s;
  loop_wake(s->vs);
}

/* The guest's end is gone; what it sent before is still written. */
static void stream_abandon(struct stream *s, int error) {
  if (!s->held_len) {
    stream_kill(s, error, false);
    return;
  }
  s->state = STREAM_DRAINING;
  s->error = error;
  s->in_done = true;
  for (unsigned list = 0; list < STREAM_LISTS; list++)
    stream_dequeue(s, list);
  work_add(s); /* closes in */
}

static void streams_kill_all(struct mv_vsock *vs, int error) {
  for (unsigned i = 0; i < VSOCK_BUCKETS; i++)
    while (vs->bucket[i])
      stream_kill(vs->bucket[i], error, false);
  vs->rst_len = 0;
}

/* `spare_unsent`: not those of which the guest has not heard yet. */
static void streams_abandon_all(struct mv_vsock *vs, bool spare_unsent) {
  for (unsigned i = 0; i < VSOCK_BUCKETS; i++) {
    struct stream *s = vs->bucket[i], *next;
    for (; s; s = next) {
      next = s->hash_next;
      if (!(spare_unsent && s->state == STREAM_CONNECTING && !s->request_sent))
        stream_abandon(s, -ECONNRESET);
    }
  }
  vs->rst_len = 0;
}

void vsock_stream_ctl(struct stream *s, uint8_t ctl) {
  s->ctl |= ctl;
  stream_enqueue(s, LIST_CTL);
}

/* Draws the conclusions of any change to a stream. */
void vsock_stream_event(struct stream *s) {
  if (s->state == STREAM_DEAD)
    return;
  if (s->state == STREAM_DRAINING) {
    if (!s->held_len)
      stream_kill(s, s->error, false);
    return;
  }
  if (!s->held_len && s->shut_guest == SHUT_F_BOTH) {
    stream_kill(s, 0, true);
    return;
  }
  bool in_done = s->in_eof || (s->shut_guest & SHUT_F_RCV);
  bool out_done = !s->held_len && (s->shut_guest & SHUT_F_SEND);
  s->in_done |= in_done;
  s->out_done |= out_done;
  if ((s->in_done && s->in.fd >= 0) || (s->out_done && s->out.fd >= 0))
    work_add(s);
  if (s->in_eof)
    s->shut_host |= SHUT_F_SEND;
  if (s->state == STREAM_OPEN && s->shut_host != s->shut_sent)
    vsock_stream_ctl(s, CTL_SHUTDOWN);
  if (stream_has_data(s))
    stream_enqueue(s, LIST_DATA);
  else
    stream_dequeue(s, LIST_DATA);
}

/* ---- to the guest ---------------------------------------------------------- */

/* The device is dead: so are its streams. */
static void vsock_broken(struct mv_vsock *vs) {
  mv_virtio_broken(&vs->dev);
  streams_kill_all(vs, -EPROTO);
}

/* A receive buffer with room for a header and `payload` bytes. */
static bool rx_pop(struct mv_vsock *vs, struct mv_vq_chain *chain, unsigned payload) {
  int rc = mv_vq_pop(&vs->dev.vq[QUEUE_RX], chain);
  vs->starved = rc == 0;
  if (rc == 0)
    return false;
  if (rc == 1 && chain->write_len >= HDR + payload)
    return true;
  vsock_broken(vs);
  return false;
}

static void rx_push(struct mv_vsock *vs, const struct mv_vq_chain *chain,
                    const struct vsock_hdr *hdr) {
  mv_chain_write(chain, 0, hdr, HDR);
  mv_vq_push(&vs->dev.vq[QUEUE_RX], chain, HDR + le32toh(hdr->len));
}

/* Every packet of a stream carries its credit (§5.10.6.3). */
static struct vsock_hdr stream_hdr(struct stream *s, enum vsock_op op, uint32_t len) {
  s->fwd_sent = s->fwd_cnt;
  s->ctl &= ~CTL_CREDIT;
  return (struct vsock_hdr){
      .src_cid = htole64(MV_VSOCK_HOST_CID),
      .dst_cid = htole64(s->vs->guest_cid),
      .src_port = htole32(s->host_port),
      .dst_port = htole32(s->guest_port),
      .len = htole32(len),
      .type = htole16(VSOCK_TYPE_STREAM),
      .op = htole16(op),
      .flags = htole32(op == OP_SHUTDOWN ? s->shut_host : 0),
      .buf_alloc = htole32(s->buf_alloc),
      .fwd_cnt = htole32(s->fwd_cnt),
  };
}

/* Takes the first control packet that the stream owes. */
static enum vsock_op ctl_take(struct stream *s) {
  static const struct {
    uint8_t bit;
    enum vsock_op op;
  } order[] = {
      {CTL_REQUEST, OP_REQUEST},
      {CTL_RESPONSE, OP_RESPONSE},
      {CTL_CREDIT, OP_CREDIT_UPDATE},
      {CTL_SHUTDOWN, OP_SHUTDOWN},
  };
  unsigned i = 0;
  while (!(s->ctl & order[i].bit))
    i++;
  s->ctl &= ~order[i].bit;
  return order[i].op;
}

static void ctl_send(struct stream *s, const struct mv_vq_chain *chain) {
  enum vsock_op op = ctl_take(s);
  struct vsock_hdr hdr = stream_hdr(s, op, 0);
  rx_push(s->vs, chain, &hdr);
  if (!s->ctl)
    stream_dequeue(s, LIST_CTL);
  if (op == OP_REQUEST)
    s->request_sent = true;
  if (op == OP_SHUTDOWN)
    s->shut_sent = s->shut_host;
  if (op == OP_RESPONSE) {
    s->state = STREAM_OPEN;
    vsock_stream_event(s);
  }
}

static void rst_send(struct mv_vsock *vs, const struct mv_vq_chain *chain) {
  struct vsock_rst rst = vs->rst[vs->rst_at];
  vs->rst_at = (vs->rst_at + 1) % VSOCK_RSTS;
  vs->rst_len--;
  struct vsock_hdr hdr = {
      .src_cid = htole64(MV_VSOCK_HOST_CID),
      .dst_cid = htole64(vs->guest_cid),
      .src_port = htole32(rst.host_port),
      .dst_port = htole32(rst.guest_port),
      .type = htole16(rst.type),
      .op = htole16(OP_RST),
  };
  rx_push(vs, chain, &hdr);
}

/* Sends all control packets that are owed. False: no receive buffer left (or
 * no driver); the guest notifies when there is. */
static bool ctl_pump(struct mv_vsock *vs) {
  struct mv_vq_chain *chain = &vs->chain[0];
  while (vs->rst_len || vs->queue[LIST_CTL].first) {
    struct stream *s = vs->queue[LIST_CTL].first;
    if (s && !s->ctl) { /* a data packet carried its credit */
      stream_dequeue(s, LIST_CTL);
      continue;
    }
    if (!rx_pop(vs, chain, 0))
      return false;
    if (vs->rst_len)
      rst_send(vs, chain);
    else
      ctl_send(s, chain);
  }
  return true;
}

/* Pops up to `want` receive buffers into vs->chain; fills `iov` with where the
 * payload goes and room[] with how much of it each takes, all within credit
 * and one turn's length. Returns the number of buffers. */
static unsigned data_gather(struct stream *s, unsigned want, struct iovec *iov, unsigned *niov,
                            uint32_t *room) {
  struct mv_vsock *vs = s->vs;
  uint32_t left = stream_credit(s);
  unsigned n = 0;
  if (left > VSOCK_TURN_BYTES)
    left = VSOCK_TURN_BYTES;
  *niov = 0;
  while (n < want && left && rx_pop(vs, &vs->chain[n], 1)) {
    struct mv_vq_chain *chain = &vs->chain[n];
    if (*niov + chain->nwrite > CHAIN_SEGMENTS) {
      mv_vq_unpop(&vs->dev.vq[QUEUE_RX]);
      break;
    }
    uint64_t max = chain->write_len - HDR;
    room[n] = max < left ? max : left;
    if (room[n] > VSOCK_PACKET_MAX)
      room[n] = VSOCK_PACKET_MAX;
    *niov += mv_chain_slice(iov + *niov, chain->iov + chain->nread, chain->nwrite, HDR, room[n]);
    left -= room[n++];
  }
  return s->state == STREAM_OPEN ? n : 0; /* a broken ring has ended it */
}

/* Completes as many of the `n` gathered buffers as `got` bytes fill, puts the
 * others back. */
static void data_push(struct stream *s, unsigned n, const uint32_t *room, uint32_t got) {
  struct mv_vsock *vs = s->vs;
  unsigned i = 0;
  for (; i < n && got; i++) {
    uint32_t len = got < room[i] ? got : room[i];
    struct vsock_hdr hdr = stream_hdr(s, OP_RW, len);
    rx_push(vs, &vs->chain[i], &hdr);
    s->tx_cnt += len;
    got -= len;
  }
  for (unsigned left = n - i; left; left--)
    mv_vq_unpop(&vs->dev.vq[QUEUE_RX]);
}

/* One turn of a stream that has data. The number of buffers grows while the
 * input fills them, so that a keystroke does not cost a batch. False: no
 * receive buffers. */
static bool data_send(struct stream *s) {
  struct iovec iov[CHAIN_SEGMENTS];
  uint32_t room[VSOCK_BATCH], total = 0;
  unsigned niov, n = data_gather(s, s->batch, iov, &niov, room);
  if (!n)
    return false;
  for (unsigned i = 0; i < n; i++)
    total += room[i];
  ssize_t got = stream_fetch(s, iov, niov);
  data_push(s, n, room, got > 0 ? got : 0);
  mv_vq_signal(&s->vs->dev.vq[QUEUE_RX]); /* the guest reads while we go on */
  if (got == (ssize_t)total)
    s->batch = s->batch * 2 < VSOCK_BATCH ? s->batch * 2 : VSOCK_BATCH;
  else if (got > 0)
    s->batch = 1 + n / 2;
  stream_dequeue(s, LIST_DATA); /* and to the end of the line, if it has more */
  vsock_stream_event(s);
  return true;
}

/* Has the loop go on with what can go on now. */
static void wake_for_more(struct mv_vsock *vs) {
  bool data = vs->queue[LIST_DATA].first && !vs->starved;
  if (data || (vs->tx_more && tx_allowed(vs)))
    loop_wake(vs);
}

/* Control packets first, then data in turn. Loop's thread. */
void vsock_pump(struct mv_vsock *vs) {
  unsigned turns = DATA_TURNS;
  bool room = ctl_pump(vs);
  while (room && vs->queue[LIST_DATA].first && turns--)
    room = data_send(vs->queue[LIST_DATA].first) && ctl_pump(vs);
  mv_vq_signal(&vs->dev.vq[QUEUE_RX]);
  wake_for_more(vs);
}

/* ---- from the guest -------------------------------------------------------- */

static const struct vsock_listener *listener_find(struct mv_vsock *vs, uint32_t port) {
  for (unsigned i = 0; i < vs->nlisteners; i++)
    if (vs->listener[i].port == port)
      return &vs->listener[i];
  return NULL;
}

/* The guest connects. The listener is asked on the loop's thread. */
static void request_take(struct mv_vsock *vs, const struct vsock_hdr *hdr) {
  struct stream *s = NULL;
  if (listener_find(vs, hdr->dst_port) && vs->nstreams < MV_VSOCK_STREAMS_MAX)
    s = stream_new(vs, hdr->dst_port, hdr->src_port);
  if (!s) {
    rst_owe(vs, hdr->dst_port, hdr->src_port, hdr->type);
    return;
  }
  s->state = STREAM_ACCEPTING;
  stream_credit_update(s, hdr->buf_alloc, hdr->fwd_cnt);
  stream_insert(s);
  work_add(s);
}

static int rw_take(struct stream *s, const struct vsock_hdr *hdr, const struct mv_vq_chain *chain) {
  struct iovec iov[MV_VQ_SIZE_MAX];
  if (s->state != STREAM_OPEN || (s->shut_guest & SHUT_F_SEND) || hdr->len > chain->read_len - HDR)
    return -EPROTO;
  unsigned n = mv_chain_slice(iov, chain->iov, chain->nread, HDR, hdr->len);
  return stream_deliver(s, iov, n, hdr->len);
}

static void rst_take(struct stream *s) {
  int error = s->state == STREAM_CONNECTING ? -ECONNREFUSED : -ECONNRESET;
  if (s->shut_host == SHUT_F_BOTH)
    error = 0; /* its answer to our having closed both directions */
  stream_abandon(s, error);
}

/* One packet of a known stream. 0, or -errno: the stream is to be reset. */
static int stream_take(struct stream *s, const struct vsock_hdr *hdr,
                       const struct mv_vq_chain *chain) {
  if (hdr->op == OP_RST) { /* its credit fields may be 0 */
    rst_take(s);
    return 0;
  }
  if (!stream_credit_update(s, hdr->buf_alloc, hdr->fwd_cnt))
    return -EPROTO;
  switch (hdr->op) {
  case OP_RESPONSE:
    if (s->state != STREAM_CONNECTING || !s->request_sent)
      return -EPROTO;
    s->state = STREAM_OPEN;
    return 0;
  case OP_SHUTDOWN:
    s->shut_guest |= hdr->flags & SHUT_F_BOTH;
    return 0;
  case OP_RW:
    return rw_take(s, hdr, chain);
  case OP_CREDIT_UPDATE:
    return 0;
  case OP_CREDIT_REQUEST:
    if (s->state == STREAM_OPEN)
      vsock_stream_ctl(s, CTL_CREDIT);
    return 0;
  default: /* REQUEST on a stream that is there, or no such operation */
    return -EPROTO;
  }
}

static void packet_take(struct mv_vsock *vs, const struct mv_vq_chain *chain) {
  struct vsock_hdr raw;
  if (mv_chain_read(chain, 0, &raw, HDR) < HDR)
    return;
  const struct vsock_hdr hdr = {
      .src_port = le32toh(raw.src_port),
      .dst_port = le32toh(raw.dst_port),
      .len = le32toh(raw.len),
      .type = le16toh(raw.type),
      .op = le16toh(raw.op),
      .flags = le32toh(raw.flags),
      .buf_alloc = le32toh(raw.buf_alloc),
      .fwd_cnt = le32toh(raw.fwd_cnt),
  };
  if (le64toh(raw.src_cid) != vs->guest_cid || le64toh(raw.dst_cid) != MV_VSOCK_HOST_CID)
    return;
  struct stream *s = NULL;
  if (hdr.type == VSOCK_TYPE_STREAM)
    s = stream_find(vs, hdr.dst_port, hdr.src_port);
  if (!s) {
    if (hdr.type == VSOCK_TYPE_STREAM && hdr.op == OP_REQUEST)
      request_take(vs, &hdr);
    else if (hdr.op != OP_RST)
      rst_owe(vs, hdr.dst_port, hdr.src_port, hdr.type);
    return;
  }
  int rc = stream_take(s, &hdr, chain);
  if (rc)
    stream_kill(s, rc == -ENOMEM ? -ECONNRESET : rc, true);
  else
    vsock_stream_event(s);
}

/* A turn of transmit; what is left over is the loop's to go on with. */
static void tx_run(struct mv_vsock *vs) {
  struct mv_vq *vq = &vs->dev.vq[QUEUE_TX];
  unsigned turns = TX_TURN;
  int rc = 1;
  while (tx_allowed(vs) && turns-- && (rc = mv_vq_pop(vq, &vs->tx_chain)) == 1) {
    packet_take(vs, &vs->tx_chain);
    mv_vq_push(vq, &vs->tx_chain, 0);
  }
  if (rc < 0)
    vsock_broken(vs);
  vs->tx_more = rc == 1;
  mv_vq_signal(vq);
}

/* What may be done on any thread after a notification: answers. */
static void answers_send(struct mv_vsock *vs) {
  ctl_pump(vs);
  mv_vq_signal(&vs->dev.vq[QUEUE_RX]);
  wake_for_more(vs);
}

static void vsock_notify(struct mv_virtio *dev, unsigned queue) {
  struct mv_vsock *vs = (struct mv_vsock *)dev;
  if (queue == QUEUE_EVENT)
    return;
  if (queue == QUEUE_RX)
    vs->starved = false;
  else
    tx_run(vs);
  answers_send(vs);
}

static void vsock_driver_ok(struct mv_virtio *dev) {
  struct mv_vsock *vs = (struct mv_vsock *)dev;
  vs->starved = false;
  answers_send(vs);
}

static void vsock_reset(struct mv_virtio *dev) {
  struct mv_vsock *vs = (struct mv_vsock *)dev;
  streams_abandon_all(vs, true);
  vs->tx_more = false;
}

/* ---- the loop's side ------------------------------------------------------- */

/* Asks the listener. The stream may die meanwhile, but only this thread
 * frees it. Lock held, dropped for the callback. */
static void stream_accept(struct stream *s) {
  struct mv_vsock *vs = s->vs;
  const struct vsock_listener listener = *listener_find(vs, s->host_port);
  struct mv_vsock_ends ends = {.in_fd = -1, .out_fd = -1};
  s->asked = true;
  pthread_mutex_unlock(&vs->dev.lock);
  int rc = listener.accept(listener.ctx, s->guest_port, &ends);
  pthread_mutex_lock(&vs->dev.lock);
  if (!rc)
    rc = stream_set_ends(s, &ends);
  if (rc)
    stream_kill(s, rc, true);
  else if (s->state == STREAM_ACCEPTING)
    vsock_stream_ctl(s, CTL_RESPONSE);
}

/* Frees the dead. Lock held, dropped meanwhile. */
static void dead_reap(struct mv_vsock *vs) {
  while (vs->dead) {
    struct stream *s = vs->dead;
    vs->dead = s->hash_next;
    pthread_mutex_unlock(&vs->dev.lock);
    bool large = s->buf_alloc == VSOCK_BUF_LARGE;
    stream_free(s);
    pthread_mutex_lock(&vs->dev.lock);
    vs->nstreams--;
    vs->nlarge -= large;
  }
}

static void loop_work(void *ctx, uint32_t events) {
  (void)events;
  struct mv_vsock *vs = ctx;
  uint64_t count;
  pthread_mutex_lock(&vs->dev.lock);
  vs->woken = false;
  if (read(vs->wake_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
    goto out;
  for (struct stream *s; (s = vs->queue[LIST_WORK].first);) {
    stream_dequeue(s, LIST_WORK);
    stream_settle(s);
    if (s->state == STREAM_ACCEPTING && !s->asked)
      stream_accept(s);
  }
  if (vs->tx_more)
    tx_run(vs);
  vsock_pump(vs);
  dead_reap(vs);
out:
  pthread_mutex_unlock(&vs->dev.lock);
}

/* A stream to `guest_port` with a host port of its own, not yet in the table. */
static int stream_prepare(struct mv_vsock *vs, uint32_t guest_port,
                          const struct mv_vsock_ends *ends, struct stream **out) {
  while (vs->next_port < FIRST_PORT || stream_find(vs, vs->next_port, guest_port))
    vs->next_port = vs->next_port < FIRST_PORT ? FIRST_PORT : vs->next_port + 1;
  struct stream *s = NULL;
  int rc = -EMFILE;
  if (vs->nstreams < MV_VSOCK_STREAMS_MAX) {
    s = stream_new(vs, vs->next_port++, guest_port);
    rc = s ? stream_set_ends(s, ends) : -ENOMEM;
  }
  if (!s) {
    if (ends->in_fd >= 0)
      close(ends->in_fd);
    if (ends->out_fd >= 0 && ends->out_fd != ends->in_fd)
      close(ends->out_fd);
  } else if (rc) {
    free(s);
    s = NULL;
  }
  *out = s;
  return rc;
}

int64_t mv_vsock_connect(struct mv_vsock *vs, uint32_t guest_port,
                         const struct mv_vsock_ends *ends) {
  struct stream *s;
  pthread_mutex_lock(&vs->dev.lock);
  int64_t rc = stream_prepare(vs, guest_port, ends, &s);
  if (!rc) {
    stream_insert(s);
    rc = s->id;
    vsock_stream_ctl(s, CTL_REQUEST);
    vsock_pump(vs);
  }
  pthread_mutex_unlock(&vs->dev.lock);
  return rc;
}

static struct stream *stream_by_id(struct mv_vsock *vs, int64_t id) {
  for (unsigned i = 0; i < VSOCK_BUCKETS; i++)
    for (struct stream *s = vs->bucket[i]; s; s = s->hash_next)
      if (s->id == id)
        return s;
  return NULL;
}

void mv_vsock_close(struct mv_vsock *vs, int64_t id) {
  pthread_mutex_lock(&vs->dev.lock);
  struct stream *s = stream_by_id(vs, id);
  if (s) {
    stream_kill(s, -ECANCELED, s->state != STREAM_CONNECTING || s->request_sent);
    vsock_pump(vs);
  }
  pthread_mutex_unlock(&vs->dev.lock);
}

int mv_vsock_listen(struct mv_vsock *vs, uint32_t host_port, mv_vsock_accept_fn accept, void *ctx) {
  int rc = 0;
  pthread_mutex_lock(&vs->dev.lock);
  if (listener_find(vs, host_port))
    rc = -EADDRINUSE;
  else if (vs->nlisteners == VSOCK_LISTENERS)
    rc = -ENOSPC;
  else
    vs->listener[vs->nlisteners++] = (struct vsock_listener){host_port, accept, ctx};
  pthread_mutex_unlock(&vs->dev.lock);
  return rc;
}

void mv_vsock_guest_gone(struct mv_vsock *vs) {
  pthread_mutex_lock(&vs->dev.lock);
  streams_abandon_all(vs, false);
  pthread_mutex_unlock(&vs->dev.lock);
}

struct mv_virtio *mv_vsock_virtio(struct mv_vsock *vs) {
  return &vs->dev;
}

static void vsock_destroy(struct mv_virtio *dev) {
  struct mv_vsock *vs = (struct mv_vsock *)dev;
  pthread_mutex_lock(&dev->lock);
  streams_kill_all(vs, -ECANCELED);
  dead_reap(vs);
  pthread_mutex_unlock(&dev->lock);
  mv_loop_del(vs->loop, vs->wake_fd);
  close(vs->wake_fd);
  mv_virtio_detach(dev);
  free(vs);
}

static const struct mv_virtio_ops vsock_ops = {
    .device_id = MV_VIRTIO_ID_VSOCK,
    .name = "vsock",
    .nqueues = QUEUES,
    .features = 1 << F_STREAM,
    .config_len = sizeof(uint64_t),
    .notify = vsock_notify,
    .driver_ok = vsock_driver_ok,
    .reset = vsock_reset,
    .destroy = vsock_destroy,
};

int mv_vsock_new(struct mv_vsock **out, const struct mv_virtio_place *at, uint32_t guest_cid) {
  struct mv_vsock *vs = calloc(1, sizeof(*vs));
  if (!vs)
    return -ENOMEM;
  vs->dev = (struct mv_virtio){.ops = &vsock_ops, .mem = at->mem, .irq = at->irq};
  vs->dev.config = (uint8_t *)&vs->guest_cid;
  vs->guest_cid = guest_cid;
  vs->loop = at->loop;
  vs->next_port = FIRST_PORT;
  vs->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  int rc = vs->wake_fd < 0 ? -errno : mv_loop_add(at->loop, vs->wake_fd, EPOLLIN, loop_work, vs);
  if (!rc) {
    rc = mv_virtio_attach(&vs->dev, at->mmio, at->gpa);
    if (rc)
      mv_loop_del(at->loop, vs->wake_fd);
  }
  if (rc) {
    if (vs->wake_fd >= 0)
      close(vs->wake_fd);
    free(vs);
    return rc;
  }
  *out = vs;
  return 0;
}
