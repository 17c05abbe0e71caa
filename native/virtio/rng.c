/*
 * Entropy device (virtio 1.2 §5.4): each buffer is filled from getrandom(2).
 * At most 64 KiB a request, so that no buffer holds the lock for long; a
 * shorter answer is legal (§5.4.6.2).
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/random.h>

#include "mv/devices.h"
#include "transport.h"

#define REQUEST_MAX 65536

struct rng {
  struct mv_virtio dev;
  struct mv_vq_chain chain;
};

/* Fills what it can of one request; returns the number of bytes. */
static uint32_t chain_fill(const struct mv_vq_chain *chain) {
  uint32_t total = 0;
  for (unsigned i = chain->nread; i < chain->nread + chain->nwrite; i++) {
    size_t len = chain->iov[i].iov_len;
    if (len > REQUEST_MAX - total)
      len = REQUEST_MAX - total;
    ssize_t got = len ? getrandom(chain->iov[i].iov_base, len, 0) : 0;
    if (got <= 0)
      break;
    total += got;
    if ((size_t)got < chain->iov[i].iov_len)
      break;
  }
  return total;
}

static void rng_notify(struct mv_virtio *dev, unsigned queue) {
  struct rng *rng = (struct rng *)dev;
  struct mv_vq *vq = &dev->vq[queue];
  while (mv_vq_pop(vq, &rng->chain) == 1)
    mv_vq_push(vq, &rng->chain, chain_fill(&rng->chain));
  mv_vq_signal(vq);
}

static void rng_destroy(struct mv_virtio *dev) {
  mv_virtio_detach(dev);
  free(dev);
}

static const struct mv_virtio_ops rng_ops = {
    .device_id = MV_VIRTIO_ID_RNG,
    .name = "rng",
    .nqueues = 1,
    .notify = rng_notify,
    .destroy = rng_destroy,
};

int mv_rng_new(struct mv_virtio **out, const struct mv_virtio_place *at) {
  struct rng *rng = calloc(1, sizeof(*rng));
  if (!rng)
    return -ENOMEM;
  rng->dev = (struct mv_virtio){.ops = &rng_ops, .mem = at->mem, .irq = at->irq};
  int rc = mv_virtio_attach(&rng->dev, at->mmio, at->gpa);
  if (rc) {
    free(rng);
    return rc;
  }
  *out = &rng->dev;
  return 0;
}
