/*
 * What the two halves of the vsock device share: vsock.c (packets, queues,
 * connection state) and vsock_stream.c (credit, buffers, descriptors).
 * All fields are guarded by the device's lock unless said otherwise.
 */
#ifndef MV_VIRTIO_VSOCK_H
#define MV_VIRTIO_VSOCK_H

#include "mv/devices.h"
#include "mv/fdio.h"
#include "transport.h"

#define VSOCK_BUCKETS    1024
#define VSOCK_LISTENERS  16
#define VSOCK_RSTS       2048
#define VSOCK_BATCH      16             /* receive buffers that one read may fill */
#define VSOCK_TURN_BYTES 65536          /* bytes of one stream before the next's turn */
#define VSOCK_PACKET_MAX 65536          /* payload; Linux refuses more */
#define VSOCK_BUF_LARGE  (1024u * 1024) /* credit that the first streams give */
#define VSOCK_BUF_SMALL  (64u * 1024)   /* and the others, so that the sum is bounded */
#define VSOCK_LARGE_MAX  32             /* streams with a large buffer */

struct vsock_hdr { /* virtio 1.2 §5.10.6, little endian */
  uint64_t src_cid, dst_cid;
  uint32_t src_port, dst_port, len;
  uint16_t type, op;
  uint32_t flags, buf_alloc, fwd_cnt;
} __attribute__((packed));
_Static_assert(sizeof(struct vsock_hdr) == 44, "virtio 1.2 §5.10.6");

enum { VSOCK_TYPE_STREAM = 1 };
enum vsock_op {
  OP_REQUEST = 1,
  OP_RESPONSE,
  OP_RST,
  OP_SHUTDOWN,
  OP_RW,
  OP_CREDIT_UPDATE,
  OP_CREDIT_REQUEST,
};
enum { SHUT_F_RCV = 1, SHUT_F_SEND = 2, SHUT_F_BOTH = 3 };

/* Control packets that a stream owes the guest: one bit each, so that no
 * flood makes them pile up. Sent in this order. */
enum { CTL_REQUEST = 1, CTL_RESPONSE = 2, CTL_CREDIT = 4, CTL_SHUTDOWN = 8 };

enum stream_state {
  STREAM_CONNECTING, /* our REQUEST is owed or sent                          */
  STREAM_ACCEPTING,  /* the guest's REQUEST waits for the loop, or RESPONSE is owed */
  STREAM_OPEN,
  STREAM_DRAINING, /* over for the guest; held bytes wait for out_fd         */
  STREAM_DEAD,     /* waits for the loop to close descriptors and free it        */
};

/* The lists that a stream may stand in, each at most once. */
enum stream_list {
  LIST_CTL,  /* owes control packets                                         */
  LIST_DATA, /* has data for the guest, and credit                           */
  LIST_WORK, /* the loop's thread must look at its descriptors               */
  STREAM_LISTS,
};
struct stream_link {
  struct stream *next, *prev;
  bool queued;
};
struct stream_queue {
  struct stream *first, *last;
};

struct stream {
  struct mv_vsock *vs;
  struct stream *hash_next;
  struct stream_link link[STREAM_LISTS];
  int64_t id;
  uint32_t host_port, guest_port;
  enum stream_state state;
  bool request_sent, asked; /* asked: the listener was                       */
  uint8_t ctl;
  uint8_t shut_host, shut_guest; /* SHUT_F_*: what each side has ended */
  uint8_t shut_sent;             /* of shut_host, what the guest was told */

  /* host to guest */
  struct mv_fd in;
  bool in_ready, in_eof, in_done; /* done: the loop may close it             */
  uint8_t *prefix;
  size_t prefix_at, prefix_len;
  unsigned batch;                                /* buffers to read into at once */
  uint32_t tx_cnt, peer_fwd_cnt, peer_buf_alloc; /* §5.10.6.3                 */

  /* guest to host */
  struct mv_fd out;
  bool out_ready, out_done;
  int out_error;
  uint32_t buf_alloc, rx_cnt, fwd_cnt, fwd_sent;
  uint8_t *held; /* ring of held_cap bytes, grows up to buf_alloc            */
  uint32_t held_at, held_len, held_cap;

  bool shared; /* in and out are one socket                                  */
  int error;   /* for on_close                                               */
  void (*on_close)(void *ctx, int error);
  void *ctx;
};

struct vsock_listener {
  uint32_t port;
  mv_vsock_accept_fn accept;
  void *ctx;
};
struct vsock_rst {
  uint32_t host_port, guest_port;
  uint16_t type;
};

struct mv_vsock {
  struct mv_virtio dev;
  uint64_t guest_cid; /* also the configuration space                        */
  struct mv_loop *loop;
  int wake_fd;
  bool woken;   /* wake_fd is written and not yet read */
  bool tx_more; /* transmit stopped before its ring was empty */
  bool starved; /* no receive buffer; the guest will notify */
  struct stream *bucket[VSOCK_BUCKETS];
  struct stream_queue queue[STREAM_LISTS];
  struct stream *dead; /* by hash_next                                       */
  unsigned nstreams, nlarge;
  int64_t next_id;
  uint32_t next_port;
  unsigned nlisteners;
  struct vsock_listener listener[VSOCK_LISTENERS];
  unsigned rst_at, rst_len;
  struct vsock_rst rst[VSOCK_RSTS];
  struct mv_vq_chain chain[VSOCK_BATCH]; /* [0] also serves transmit         */
  struct mv_vq_chain tx_chain;
};

/* ---- vsock_stream.c: no packets, no queues ------------------------------- */

void stream_enqueue(struct stream *s, enum stream_list list);
void stream_dequeue(struct stream *s, enum stream_list list);

struct stream *stream_new(struct mv_vsock *vs, uint32_t host_port, uint32_t guest_port);
/* Takes over the descriptors, prefix and callback of `ends`. 0 or -errno; on
 * error all is closed. Loop's thread. */
int stream_set_ends(struct stream *s, const struct mv_vsock_ends *ends);
/* Closes what is left, calls on_close, frees. Loop's thread, without lock. */
void stream_free(struct stream *s);

/* Bytes that may be sent to the guest now. */
uint32_t stream_credit(const struct stream *s);
/* False: the guest claims to have read what was never sent. */
bool stream_credit_update(struct stream *s, uint32_t buf_alloc, uint32_t fwd_cnt);
/* True if there is something to send and the guest may be sent it. */
bool stream_has_data(const struct stream *s);
/* Fills iov with bytes for the guest: the prefix first, then in_fd's.
 * Bytes, 0: end of input (in_eof is set), -EAGAIN. */
ssize_t stream_fetch(struct stream *s, const struct iovec *iov, unsigned n);
/* Takes `len` bytes from the guest: to out_fd directly, or held. 0, -EPROTO:
 * beyond the credit that it was given, -ENOMEM. */
int stream_deliver(struct stream *s, const struct iovec *iov, unsigned n, uint32_t len);
/* Writes what was held, as far as out_fd takes it. */
void stream_flush(struct stream *s);
/* out_fd is of no more use: what is held is dropped; vsock_stream_event then
 * tells the guest. */
void stream_out_broken(struct stream *s, int error);
/* Closes descriptors that are done with. Loop's thread. */
void stream_settle(struct stream *s);

/* ---- vsock.c: called by the stream's descriptors ------------------------- */
void vsock_stream_event(struct stream *s);            /* after any change of state     */
void vsock_stream_ctl(struct stream *s, uint8_t ctl); /* owes these          */
void vsock_pump(struct mv_vsock *vs);                 /* sends what is owed and ready  */

#endif
