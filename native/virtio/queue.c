/*
 * Split virtqueues, device side (virtio 1.2 §2.7).
 *
 * Everything in a ring is the guest's, and the guest may be rewriting it on
 * another CPU while we look.  So: every value is loaded from guest memory
 * exactly once, into a local; the local is checked; the local is used.  What
 * a device gets (struct mv_vq_chain) holds host pointers that were checked
 * against the RAM slots, and nothing in it is read from the guest again.
 *
 * A ring that breaks the rules is dead until the driver resets the device:
 * pop returns -EPROTO and sets DEVICE_NEEDS_RESET (§2.1.2).  The rules:
 *   - the driver may be at most a queue's length ahead (§2.7.6)
 *   - indices lie in the table they index (§2.7.5)
 *   - a chain is no longer than the queue, which also ends loops (§2.7.5.3.1)
 *   - buffers lie in RAM, each in one slot; ending at its end is legal
 *   - readable descriptors come before writable ones (§2.7.4.2)
 *   - indirect tables: only if negotiated, a whole number of descriptors,
 *     alone in their descriptor, not nested (§2.7.5.3.1)
 *
 * Order (x86 hosts, but said in C11 terms): an acquire load of avail.idx
 * before the entries that it covers; a release store of used.idx after the
 * entries; a full fence between our store of an index and our load of the
 * other side's, on both sides of the event suppression (§2.7.7.2, §2.7.10).
 */
#include <endian.h>
#include <errno.h>
#include <limits.h>
#include <string.h>

#include "transport.h"

enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };
enum { AVAIL_NO_INTERRUPT = 1 };
enum { RING_FLAGS = 0, RING_IDX = 2, RING_ENTRIES = 4 }; /* byte offsets, both rings */

struct vring_desc {
  uint64_t addr;
  uint32_t len;
  uint16_t flags, next;
};
_Static_assert(sizeof(struct vring_desc) == MV_VRING_DESC_SIZE, "virtio 1.2 §2.7.5");

struct used_elem {
  uint32_t id, len;
};
_Static_assert(sizeof(struct used_elem) == MV_VRING_USED_SIZE, "virtio 1.2 §2.7.8");

static uint16_t load16(const uint8_t *p, int order) {
  return le16toh(order == __ATOMIC_ACQUIRE
                     ? __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE)
                     : __atomic_load_n((const uint16_t *)p, __ATOMIC_RELAXED));
}

static void store16(uint8_t *p, uint16_t v) {
  __atomic_store_n((uint16_t *)p, htole16(v), __ATOMIC_RELEASE);
}

/* One descriptor, each half of it loaded once. An indirect table may lie at
 * any address, hence the packed type. */
static struct vring_desc desc_load(const uint8_t *table, unsigned i) {
  struct __attribute__((packed)) halves {
    uint64_t lo, hi;
  };
  const volatile struct halves *src =
      (const volatile struct halves *)(table + i * MV_VRING_DESC_SIZE);
  uint64_t half[2] = {src->lo, src->hi};
  struct vring_desc d;
  memcpy(&d, half, sizeof(d));
  return (struct vring_desc){le64toh(d.addr), le32toh(d.len), le16toh(d.flags), le16toh(d.next)};
}

static bool has_feature(const struct mv_vq *vq, unsigned bit) {
  return vq->dev->driver_features >> bit & 1;
}

static uint8_t *avail_event(struct mv_vq *vq) {
  return vq->used_hva + RING_ENTRIES + vq->size * sizeof(struct used_elem);
}

/* What the driver made available and we have not popped. */
static uint16_t avail_count(struct mv_vq *vq) {
  return load16(vq->avail_hva + RING_IDX, __ATOMIC_ACQUIRE) - vq->last_avail;
}

/* Asks for a notification at the next buffer, then looks whether one came in
 * between. Without EVENT_IDX used.flags stays 0: always notify. */
static uint16_t avail_arm(struct mv_vq *vq) {
  if (has_feature(vq, MV_VIRTIO_F_EVENT_IDX)) {
    uint8_t *event = avail_event(vq);
    store16(event, vq->last_avail);
    mv_mem_written(vq->dev->mem, vq->used + (event - vq->used_hva), sizeof(uint16_t));
  }
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  return avail_count(vq);
}

/* Appends one buffer. Empty ones are legal and hold nothing. */
static int chain_add(struct mv_vq *vq, struct mv_vq_chain *c, const struct vring_desc *d) {
  bool writable = d->flags & DESC_WRITE;
  unsigned n = c->nread + c->nwrite;
  if (!writable && c->nwrite)
    return -EPROTO;
  if (!d->len)
    return 0;
  void *hva = mv_mem_ptr(vq->dev->mem, d->addr, d->len);
  if (!hva)
    return -EPROTO;
  c->iov[n] = (struct iovec){.iov_base = hva, .iov_len = d->len};
  c->gpa[n] = d->addr;
  if (writable) {
    c->nwrite++;
    c->write_len += d->len;
  } else {
    c->nread++;
    c->read_len += d->len;
  }
  return c->read_len > UINT32_MAX || c->write_len > UINT32_MAX ? -EPROTO : 0;
}

/* The table that an INDIRECT descriptor names, and its number of entries. */
static int indirect_table(struct mv_vq *vq, const struct vring_desc *d, const uint8_t **table,
                          unsigned *entries) {
  if (!has_feature(vq, MV_VIRTIO_F_INDIRECT_DESC) || (d->flags & DESC_NEXT))
    return -EPROTO;
  *entries = d->len / sizeof(struct vring_desc);
  if (!*entries || *entries > MV_VQ_SIZE_MAX || d->len % sizeof(struct vring_desc))
    return -EPROTO;
  *table = mv_mem_ptr(vq->dev->mem, d->addr, d->len);
  return *table ? 0 : -EPROTO;
}

static int chain_walk(struct mv_vq *vq, struct mv_vq_chain *c) {
  const uint8_t *table = vq->desc_hva;
  unsigned entries = vq->size, i = c->head;
  bool indirect = false;
  for (unsigned steps = 0; steps < vq->size;) {
    struct vring_desc d = desc_load(table, i);
    if (d.flags & DESC_INDIRECT) {
      if (indirect || indirect_table(vq, &d, &table, &entries) < 0)
        return -EPROTO;
      indirect = true;
      i = 0;
      continue;
    }
    if (chain_add(vq, c, &d) < 0)
      return -EPROTO;
    if (!(d.flags & DESC_NEXT))
      return 0;
    if (d.next >= entries)
      return -EPROTO;
    i = d.next;
    steps++;
  }
  return -EPROTO; /* longer than the queue: a loop, or as bad */
}

int mv_vq_pop(struct mv_vq *vq, struct mv_vq_chain *out) {
  if (!vq->ready || !mv_virtio_running(vq->dev))
    return 0;
  uint16_t count = avail_count(vq);
  if (!count)
    count = avail_arm(vq);
  if (!count)
    return 0;
  out->nread = out->nwrite = 0;
  out->read_len = out->write_len = 0;
  out->head =
      load16(vq->avail_hva + RING_ENTRIES + (vq->last_avail & (vq->size - 1)) * sizeof(uint16_t),
             __ATOMIC_RELAXED);
  if (count > vq->size || out->head >= vq->size || chain_walk(vq, out) < 0) {
    mv_virtio_broken(vq->dev);
    return -EPROTO;
  }
  vq->last_avail++;
  return 1;
}

void mv_vq_unpop(struct mv_vq *vq) {
  vq->last_avail--;
}

void mv_vq_push(struct mv_vq *vq, const struct mv_vq_chain *chain, uint32_t written) {
  struct mv_mem *mem = vq->dev->mem;
  if (!vq->ready)
    return;
  uint32_t left = written;
  for (unsigned i = chain->nread; i < chain->nread + chain->nwrite && left; i++) {
    uint32_t len = chain->iov[i].iov_len < left ? chain->iov[i].iov_len : left;
    mv_mem_written(mem, chain->gpa[i], len);
    left -= len;
  }
  uint64_t off = RING_ENTRIES + (vq->used_idx & (vq->size - 1)) * sizeof(struct used_elem);
  struct used_elem elem = {htole32(chain->head), htole32(written)};
  memcpy(vq->used_hva + off, &elem, sizeof(elem));
  vq->used_idx++;
  store16(vq->used_hva + RING_IDX, vq->used_idx);
  mv_mem_written(mem, vq->used + off, sizeof(elem));
  mv_mem_written(mem, vq->used + RING_IDX, sizeof(uint16_t));
}

/* §2.7.10.1: has used.idx passed used_event since we last looked? */
static bool event_passed(uint16_t event, uint16_t now, uint16_t before) {
  return (uint16_t)(now - event - 1) < (uint16_t)(now - before);
}

void mv_vq_signal(struct mv_vq *vq) {
  if (!vq->ready || vq->signalled == vq->used_idx)
    return;
  uint16_t before = vq->signalled;
  vq->signalled = vq->used_idx;
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  bool wanted;
  if (has_feature(vq, MV_VIRTIO_F_EVENT_IDX)) {
    const uint8_t *used_event = vq->avail_hva + RING_ENTRIES + vq->size * sizeof(uint16_t);
    wanted = event_passed(load16(used_event, __ATOMIC_RELAXED), vq->used_idx, before);
  } else {
    wanted = !(load16(vq->avail_hva + RING_FLAGS, __ATOMIC_RELAXED) & AVAIL_NO_INTERRUPT);
  }
  if (wanted)
    mv_virtio_interrupt(vq->dev);
}

int mv_vq_enable(struct mv_vq *vq) {
  const struct mv_mem *mem = vq->dev->mem;
  unsigned n = vq->size;
  if (!n || n > MV_VQ_SIZE_MAX || (n & (n - 1)))
    return -EINVAL;
  /* Alignments: §2.7, table of virtqueue parts. Both event fields are counted
   * in, negotiated or not. */
  if (vq->desc % 16 || vq->avail % 2 || vq->used % 4)
    return -EINVAL;
  vq->desc_hva = mv_mem_ptr(mem, vq->desc, n * sizeof(struct vring_desc));
  vq->avail_hva = mv_mem_ptr(mem, vq->avail, RING_ENTRIES + n * 2 + 2);
  vq->used_hva = mv_mem_ptr(mem, vq->used, RING_ENTRIES + n * sizeof(struct used_elem) + 2);
  if (!vq->desc_hva || !vq->avail_hva || !vq->used_hva)
    return -EFAULT;
  vq->last_avail = vq->used_idx = vq->signalled = 0;
  vq->ready = true;
  return 0;
}

void mv_vq_reset(struct mv_vq *vq) {
  struct mv_virtio *dev = vq->dev;
  memset(vq, 0, sizeof(*vq));
  vq->dev = dev;
}

/* ---- bytes of a chain --------------------------------------------------- */

size_t mv_chain_read(const struct mv_vq_chain *chain, uint64_t off, void *buf, size_t len) {
  size_t done = 0;
  for (unsigned i = 0; i < chain->nread && done < len; i++) {
    size_t part = chain->iov[i].iov_len;
    if (off >= part) {
      off -= part;
      continue;
    }
    part = part - off < len - done ? part - off : len - done;
    memcpy((uint8_t *)buf + done, (uint8_t *)chain->iov[i].iov_base + off, part);
    done += part;
    off = 0;
  }
  return done;
}

size_t mv_chain_write(const struct mv_vq_chain *chain, uint64_t off, const void *buf, size_t len) {
  size_t done = 0;
  for (unsigned i = chain->nread; i < chain->nread + chain->nwrite && done < len; i++) {
    size_t part = chain->iov[i].iov_len;
    if (off >= part) {
      off -= part;
      continue;
    }
    part = part - off < len - done ? part - off : len - done;
    memcpy((uint8_t *)chain->iov[i].iov_base + off, (const uint8_t *)buf + done, part);
    done += part;
    off = 0;
  }
  return done;
}

unsigned mv_chain_slice(struct iovec *out, const struct iovec *iov, unsigned n, uint64_t off,
                        uint64_t len) {
  unsigned used = 0;
  for (unsigned i = 0; i < n && len; i++) {
    uint64_t part = iov[i].iov_len;
    if (off >= part) {
      off -= part;
      continue;
    }
    part = part - off < len ? part - off : len;
    out[used++] = (struct iovec){.iov_base = (uint8_t *)iov[i].iov_base + off, .iov_len = part};
    len -= part;
    off = 0;
  }
  return used;
}
