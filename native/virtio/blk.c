/*
 * Block device on a raw image (virtio 1.2 §5.2).
 *
 * A request is a header of 16 bytes, data, and a status byte, which is the
 * last writable byte; how these lie in descriptors is the driver's choice
 * (§2.7.4.3).  Bytes move between the image and guest memory directly.
 *
 * Where a request runs: a read whose pages are in the host's cache is served
 * at once, on the thread that notifies (preadv2 with RWF_NOWAIT), because a
 * change of threads costs more than the copy.  All else (cold reads, writes,
 * flush, discard) goes to the device's worker thread, one at a time, so that
 * no vCPU waits for a disk.  Requests may complete out of order, as §5.2.6
 * allows; FLUSH covers the writes that were completed before it.
 *
 * A reset waits for the request that the worker has in hand: when the driver
 * reads status 0, nothing writes to its memory any more.
 */
#define _GNU_SOURCE
#include <endian.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "mv/devices.h"
#include "transport.h"

#define SECTOR        512
#define SEG_MAX       126
#define RANGES_MAX    16          /* segments of one DISCARD or WRITE_ZEROES */
#define RANGE_SECTORS (1u << 21)  /* 1 GiB in each */
#define ZEROES        (64 * 1024) /* written at once where holes cannot be made */

enum { F_SEG_MAX = 2, F_RO = 5, F_BLK_SIZE = 6, F_FLUSH = 9, F_DISCARD = 13, F_WRITE_ZEROES = 14 };
enum { T_IN = 0, T_OUT = 1, T_FLUSH = 4, T_GET_ID = 8, T_DISCARD = 11, T_WRITE_ZEROES = 13 };
enum { S_OK = 0, S_IOERR = 1, S_UNSUPP = 2 };
enum { RANGE_UNMAP = 1 };

struct blk_hdr {
  uint32_t type, reserved;
  uint64_t sector;
};
_Static_assert(sizeof(struct blk_hdr) == 16, "virtio 1.2 §5.2.6");

struct blk_range {
  uint64_t sector;
  uint32_t num_sectors, flags;
};
_Static_assert(sizeof(struct blk_range) == 16, "virtio 1.2 §5.2.6");

struct blk_config {
  uint64_t capacity; /* sectors of 512 bytes */
  uint32_t size_max, seg_max;
  uint8_t geometry[4];
  uint32_t blk_size;
  uint8_t topology[8];
  uint8_t writeback, unused0;
  uint16_t num_queues;
  uint32_t max_discard_sectors, max_discard_seg, discard_sector_alignment;
  uint32_t max_write_zeroes_sectors, max_write_zeroes_seg;
  uint8_t write_zeroes_may_unmap, unused1[3];
} __attribute__((packed));
_Static_assert(sizeof(struct blk_config) == 60, "virtio 1.2 §5.2.4");

struct blk {
  struct mv_virtio dev;
  struct blk_config config;
  int fd;
  bool read_only;
  char id[20];
  struct mv_vq_chain inline_chain; /* of the thread that notifies */
  /* the worker, all under dev.lock */
  pthread_t worker;
  pthread_cond_t work, idle;
  bool started, stop, busy, resetting;
  struct mv_vq_chain chain;
};

/* One request after its header was read and checked. */
struct request {
  uint32_t type;
  uint64_t offset, len; /* IN, OUT: bytes in the image */
  uint8_t status;       /* S_OK: go on */
};

/* ---- checks ----------------------------------------------------------------- */

/* Bytes [offset, offset + len) of the image, from a sector number. */
static bool in_image(const struct blk *blk, uint64_t sector, uint64_t len) {
  uint64_t capacity = le64toh(blk->config.capacity);
  return len % SECTOR == 0 && sector <= capacity && len / SECTOR <= capacity - sector;
}

static struct request request_parse(const struct blk *blk, const struct mv_vq_chain *chain) {
  struct blk_hdr hdr;
  struct request req = {.status = S_IOERR};
  if (mv_chain_read(chain, 0, &hdr, sizeof(hdr)) < sizeof(hdr))
    return req;
  uint64_t sector = le64toh(hdr.sector);
  req.type = le32toh(hdr.type);
  bool writes = req.type == T_OUT || req.type == T_DISCARD || req.type == T_WRITE_ZEROES;
  if (writes && blk->read_only)
    return req;
  if (req.type == T_IN || req.type == T_OUT) {
    req.len = req.type == T_IN ? chain->write_len - 1 : chain->read_len - sizeof(hdr);
    if (!in_image(blk, sector, req.len))
      return req;
    req.offset = sector * SECTOR;
  }
  req.status = S_OK;
  return req;
}

/* ---- the image --------------------------------------------------------------- */

/* Moves all of [offset, offset + len); 0 or -errno. -EAGAIN only with
 * RWF_NOWAIT, and then nothing counts. */
static int image_transfer(const struct blk *blk, const struct iovec *iov, unsigned n, uint64_t skip,
                          uint64_t offset, uint64_t len, bool write, int flags) {
  struct iovec part[MV_VQ_SIZE_MAX];
  uint64_t done = 0;
  while (done < len) {
    unsigned used = mv_chain_slice(part, iov, n, skip + done, len - done);
    ssize_t moved = write ? pwritev2(blk->fd, part, used, offset + done, flags)
                          : preadv2(blk->fd, part, used, offset + done, flags);
    if (moved < 0 && errno == EINTR)
      continue;
    if (moved < 0)
      return -errno;
    if (moved == 0) /* someone has cut the file short */
      return -EIO;
    if ((uint64_t)moved < len - done && (flags & RWF_NOWAIT))
      return -EAGAIN;
    done += moved;
  }
  return 0;
}

static int image_zero(const struct blk *blk, uint64_t offset, uint64_t len) {
  static const uint8_t zeroes[ZEROES];
  while (len) {
    ssize_t put = pwrite(blk->fd, zeroes, len < ZEROES ? len : ZEROES, offset);
    if (put < 0 && errno == EINTR)
      continue;
    if (put <= 0)
      return put ? -errno : -EIO;
    offset += put;
    len -= put;
  }
  return 0;
}

static uint8_t range_run(const struct blk *blk, uint32_t type, const struct blk_range *range) {
  uint64_t offset = range->sector * SECTOR, len = (uint64_t)range->num_sectors * SECTOR;
  if (!len)
    return S_OK;
  bool punch = type == T_DISCARD || (range->flags & RANGE_UNMAP);
  int mode = punch ? FALLOC_FL_PUNCH_HOLE : FALLOC_FL_ZERO_RANGE;
  if (fallocate(blk->fd, mode | FALLOC_FL_KEEP_SIZE, offset, len) == 0)
    return S_OK;
  if (errno != EOPNOTSUPP && errno != ENOSYS)
    return S_IOERR;
  if (type == T_DISCARD) /* a hint: nothing need happen */
    return S_OK;
  return image_zero(blk, offset, len) ? S_IOERR : S_OK;
}

/* DISCARD and WRITE_ZEROES: all ranges are checked before the first is done. */
static uint8_t ranges_run(const struct blk *blk, uint32_t type, const struct mv_vq_chain *chain) {
  struct blk_range range[RANGES_MAX];
  uint64_t len = chain->read_len - sizeof(struct blk_hdr);
  unsigned n = len / sizeof(range[0]);
  if (!n || len % sizeof(range[0]) || n > RANGES_MAX)
    return S_IOERR;
  mv_chain_read(chain, sizeof(struct blk_hdr), range, len);
  for (unsigned i = 0; i < n; i++) {
    range[i].sector = le64toh(range[i].sector);
    range[i].num_sectors = le32toh(range[i].num_sectors);
    range[i].flags = le32toh(range[i].flags);
    if (range[i].flags & ~(type == T_WRITE_ZEROES ? RANGE_UNMAP : 0))
      return S_UNSUPP;
    if (range[i].num_sectors > RANGE_SECTORS ||
        !in_image(blk, range[i].sector, (uint64_t)range[i].num_sectors * SECTOR))
      return S_IOERR;
  }
  uint8_t status = S_OK;
  for (unsigned i = 0; i < n && status == S_OK; i++)
    status = range_run(blk, type, &range[i]);
  return status;
}

/* Runs a request to its end, however long that takes. */
static uint8_t request_run(const struct blk *blk, const struct request *req,
                           const struct mv_vq_chain *chain) {
  const struct iovec *data = chain->iov + chain->nread;
  if (req->status != S_OK)
    return req->status;
  switch (req->type) {
  case T_IN:
    return image_transfer(blk, data, chain->nwrite, 0, req->offset, req->len, false, 0) ? S_IOERR
                                                                                        : S_OK;
  case T_OUT:
    return image_transfer(blk, chain->iov, chain->nread, sizeof(struct blk_hdr), req->offset,
                          req->len, true, 0)
               ? S_IOERR
               : S_OK;
  case T_FLUSH:
    return fdatasync(blk->fd) ? S_IOERR : S_OK;
  case T_GET_ID:
    mv_chain_write(chain, 0, blk->id,
                   chain->write_len - 1 < sizeof(blk->id) ? chain->write_len - 1 : sizeof(blk->id));
    return S_OK;
  case T_DISCARD:
  case T_WRITE_ZEROES:
    return ranges_run(blk, req->type, chain);
  default:
    return S_UNSUPP;
  }
}

/* True: the request is done without having waited; *status is its result. */
static bool request_run_inline(const struct blk *blk, const struct request *req,
                               const struct mv_vq_chain *chain, uint8_t *status) {
  if (req->status != S_OK || req->type == T_GET_ID) {
    *status = request_run(blk, req, chain);
    return true;
  }
  if (req->type != T_IN)
    return false;
  *status = S_OK;
  return image_transfer(blk, chain->iov + chain->nread, chain->nwrite, 0, req->offset, req->len,
                        false, RWF_NOWAIT) == 0;
}

/* ---- the queue ---------------------------------------------------------------- */

/* Writes the status and completes. used.len counts whole answers only; after
 * an error all of the data may have been touched, and is reported so. */
static void request_complete(struct blk *blk, const struct mv_vq_chain *chain,
                             const struct request *req, uint8_t status) {
  uint32_t written = status == S_OK && (req->type == T_IN || req->type == T_GET_ID);
  mv_chain_write(chain, chain->write_len - 1, &status, 1);
  for (unsigned i = chain->nread; i < chain->nread + chain->nwrite && !written; i++)
    mv_mem_written(blk->dev.mem, chain->gpa[i], chain->iov[i].iov_len);
  mv_vq_push(&blk->dev.vq[0], chain, written ? chain->write_len : 0);
}

static void blk_notify(struct mv_virtio *dev, unsigned queue) {
  struct blk *blk = (struct blk *)dev;
  struct mv_vq *vq = &dev->vq[queue];
  struct mv_vq_chain *chain = &blk->inline_chain;
  while (!blk->resetting && mv_vq_pop(vq, chain) == 1) {
    if (!chain->write_len) { /* nowhere to put a status */
      mv_vq_push(vq, chain, 0);
      continue;
    }
    struct request req = request_parse(blk, chain);
    uint8_t status;
    if (!request_run_inline(blk, &req, chain, &status)) {
      mv_vq_unpop(vq);
      pthread_cond_signal(&blk->work);
      break;
    }
    request_complete(blk, chain, &req, status);
  }
  mv_vq_signal(vq);
}

/* One request of the worker; the lock is dropped while it runs. */
static void worker_serve(struct blk *blk) {
  struct mv_vq *vq = &blk->dev.vq[0];
  struct request req = {.status = S_IOERR};
  uint8_t status = S_IOERR;
  if (blk->chain.write_len) {
    blk->busy = true;
    pthread_mutex_unlock(&blk->dev.lock);
    req = request_parse(blk, &blk->chain);
    status = request_run(blk, &req, &blk->chain);
    pthread_mutex_lock(&blk->dev.lock);
    blk->busy = false;
    pthread_cond_broadcast(&blk->idle);
    if (!blk->resetting)
      request_complete(blk, &blk->chain, &req, status);
  } else {
    mv_vq_push(vq, &blk->chain, 0);
  }
  mv_vq_signal(vq);
}

static void *worker_main(void *arg) {
  struct blk *blk = arg;
  pthread_mutex_lock(&blk->dev.lock);
  while (!blk->stop) {
    if (!blk->resetting && mv_vq_pop(&blk->dev.vq[0], &blk->chain) == 1)
      worker_serve(blk);
    else
      pthread_cond_wait(&blk->work, &blk->dev.lock);
  }
  pthread_mutex_unlock(&blk->dev.lock);
  return NULL;
}

/* The process's signals are for other threads. */
static int worker_start(struct blk *blk) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  int rc = pthread_create(&blk->worker, NULL, worker_main, blk);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  blk->started = rc == 0;
  return -rc;
}

static void blk_reset(struct mv_virtio *dev) {
  struct blk *blk = (struct blk *)dev;
  blk->resetting = true;
  while (blk->busy)
    pthread_cond_wait(&blk->idle, &dev->lock);
  blk->resetting = false;
}

static void blk_destroy(struct mv_virtio *dev) {
  struct blk *blk = (struct blk *)dev;
  if (blk->started) {
    pthread_mutex_lock(&dev->lock);
    blk->stop = true;
    pthread_cond_signal(&blk->work);
    pthread_mutex_unlock(&dev->lock);
    pthread_join(blk->worker, NULL);
  }
  mv_virtio_detach(dev);
  pthread_cond_destroy(&blk->work);
  pthread_cond_destroy(&blk->idle);
  close(blk->fd);
  free(blk);
}

#define BLK_OPS(extra)                                                                             \
  {                                                                                                \
    .device_id = MV_VIRTIO_ID_BLK, .name = "blk", .nqueues = 1,                                    \
    .features = 1ULL << F_SEG_MAX | 1ULL << F_BLK_SIZE | 1ULL << F_FLUSH | (extra),                \
    .config_len = sizeof(struct blk_config), .notify = blk_notify, .reset = blk_reset,             \
    .destroy = blk_destroy,                                                                        \
  }
static const struct mv_virtio_ops blk_rw_ops = BLK_OPS(1ULL << F_DISCARD | 1ULL << F_WRITE_ZEROES);
static const struct mv_virtio_ops blk_ro_ops = BLK_OPS(1ULL << F_RO);

static struct blk_config config_for(uint64_t bytes) {
  return (struct blk_config){
      .capacity = htole64(bytes / SECTOR),
      .seg_max = htole32(SEG_MAX),
      .blk_size = htole32(SECTOR),
      .num_queues = htole16(1),
      .max_discard_sectors = htole32(RANGE_SECTORS),
      .max_discard_seg = htole32(RANGES_MAX),
      .discard_sector_alignment = htole32(8),
      .max_write_zeroes_sectors = htole32(RANGE_SECTORS),
      .max_write_zeroes_seg = htole32(RANGES_MAX),
      .write_zeroes_may_unmap = 1,
  };
}

int mv_blk_new(struct mv_virtio **out, const struct mv_virtio_place *at,
               const struct mv_blk_config *config) {
  off_t bytes = lseek(config->fd, 0, SEEK_END);
  int rc = bytes < 0 ? -errno : bytes % SECTOR ? -EINVAL : 0;
  struct blk *blk = rc ? NULL : calloc(1, sizeof(*blk));
  if (!blk) {
    close(config->fd);
    return rc ? rc : -ENOMEM;
  }
  blk->fd = config->fd;
  blk->read_only = config->read_only;
  blk->config = config_for(bytes);
  memcpy(blk->id, config->id, sizeof(blk->id));
  pthread_cond_init(&blk->work, NULL);
  pthread_cond_init(&blk->idle, NULL);
  blk->dev = (struct mv_virtio){.ops = blk->read_only ? &blk_ro_ops : &blk_rw_ops,
                                .mem = at->mem,
                                .irq = at->irq,
                                .config = (uint8_t *)&blk->config};
  rc = mv_virtio_attach(&blk->dev, at->mmio, at->gpa);
  if (rc) {
    close(blk->fd);
    free(blk);
    return rc;
  }
  rc = worker_start(blk);
  if (rc) {
    blk_destroy(&blk->dev);
    return rc;
  }
  *out = &blk->dev;
  return 0;
}
