/*
 * What the transport, the queues and the devices share and others need not
 * see: constants of virtio 1.2 and helpers for the bytes of a chain.
 */
#ifndef MV_VIRTIO_TRANSPORT_H
#define MV_VIRTIO_TRANSPORT_H

#include <stddef.h>

#include "mv/virtio.h"

/* Device types, §5. */
enum { MV_VIRTIO_ID_BLK = 2, MV_VIRTIO_ID_CONSOLE = 3, MV_VIRTIO_ID_RNG = 4 };
enum { MV_VIRTIO_ID_VSOCK = 19 };

/* Feature bits of the ring and the transport, §6. */
enum { MV_VIRTIO_F_INDIRECT_DESC = 28, MV_VIRTIO_F_EVENT_IDX = 29, MV_VIRTIO_F_VERSION_1 = 32 };

#define MV_VRING_DESC_SIZE 16
#define MV_VRING_USED_SIZE 8

/* QueueReady = 1: checks the three parts and enables. 0, -EINVAL, -EFAULT. */
int mv_vq_enable(struct mv_vq *vq);
void mv_vq_reset(struct mv_vq *vq);

/* Copy between a buffer and the readable or writable bytes of a chain, from
 * byte `off` on; return how many bytes there were, at most `len`. */
size_t mv_chain_read(const struct mv_vq_chain *chain, uint64_t off, void *buf, size_t len);
size_t mv_chain_write(const struct mv_vq_chain *chain, uint64_t off, const void *buf, size_t len);
/* Bytes [off, off + len) of an iovec array; `out` has room for n entries.
 * Returns the number of entries. */
unsigned mv_chain_slice(struct iovec *out, const struct iovec *iov, unsigned n, uint64_t off,
                        uint64_t len);

#endif
