/*
 * Virtio over MMIO (virtio 1.2): one transport, one virtqueue, each device
 * one ops table.  The transport checks everything that the guest can write;
 * a device sees only descriptor chains that lie in RAM.
 */
#ifndef MV_VIRTIO_H
#define MV_VIRTIO_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/uio.h>

#include "mv/bus.h"
#include "mv/irq.h"
#include "mv/loop.h"
#include "mv/mem.h"

#define MV_VQ_SIZE_MAX       256
#define MV_VIRTIO_QUEUES_MAX 8

struct mv_vq {
  /* set by the guest through the transport, checked at QueueReady */
  uint64_t desc, avail, used; /* gpa                                       */
  uint16_t size;              /* power of two, <= MV_VQ_SIZE_MAX           */
  bool ready;
  /* ours */
  uint8_t *desc_hva, *avail_hva, *used_hva; /* checked at QueueReady        */
  uint16_t last_avail, used_idx;
  uint16_t signalled; /* used_idx at the last look at used_event            */
  struct mv_virtio *dev;
};

/* One request: its readable buffers, then its writable ones. */
struct mv_vq_chain {
  uint16_t head;
  unsigned nread, nwrite; /* iovecs                                   */
  uint64_t read_len, write_len;
  struct iovec iov[MV_VQ_SIZE_MAX]; /* nread readable, then nwrite writable */
  uint64_t gpa[MV_VQ_SIZE_MAX];
};

struct mv_virtio_ops {
  uint32_t device_id;
  const char *name;
  unsigned nqueues;
  uint64_t features; /* offered beside VERSION_1                           */
  uint32_t config_len;
  /* All are called with dev->lock held, on any thread. */
  void (*notify)(struct mv_virtio *dev, unsigned queue);
  void (*driver_ok)(struct mv_virtio *dev);
  void (*reset)(struct mv_virtio *dev); /* forget all requests in flight    */
  void (*config_write)(struct mv_virtio *dev, uint32_t off, uint64_t v, unsigned len);
  /* Without the lock, vCPUs stopped: ends workers, closes, frees the device. */
  void (*destroy)(struct mv_virtio *dev);
};

struct mv_virtio {
  const struct mv_virtio_ops *ops;
  struct mv_mem *mem;
  struct mv_irqline irq;
  pthread_mutex_t lock;
  uint8_t *config; /* config_len bytes, the device's own                    */
  uint32_t status, isr, config_generation;
  uint32_t features_sel, driver_features_sel, queue_sel;
  uint64_t driver_features;
  struct mv_vq vq[MV_VIRTIO_QUEUES_MAX];
  int notify_fd;               /* ioeventfd on KVM; -1 on the translator                  */
  struct mv_loop *notify_loop; /* that watches notify_fd                    */
};

/* Puts `dev` (ops, mem, irq, config set) at `gpa` of the bus. 0 or -errno. */
int mv_virtio_attach(struct mv_virtio *dev, struct mv_bus *mmio, uint64_t gpa);
/* Undoes what attach and notify_fd allocated; devices call it in destroy. */
void mv_virtio_detach(struct mv_virtio *dev);
/* True between DRIVER_OK and a reset, unless the device NEEDS_RESET. */
bool mv_virtio_running(const struct mv_virtio *dev);
/* The rest with dev->lock held.  Config was changed by the device: */
void mv_virtio_config_changed(struct mv_virtio *dev);
/* The driver broke the protocol: DEVICE_NEEDS_RESET, all queues are dead. */
void mv_virtio_broken(struct mv_virtio *dev);
void mv_virtio_interrupt(struct mv_virtio *dev); /* used buffers            */

/* Takes the next chain. 1: *out filled, 0: ring empty (and the driver will
 * notify when it no longer is), -EPROTO: the ring is
 * broken; the transport has set DEVICE_NEEDS_RESET and the queue is dead. */
int mv_vq_pop(struct mv_vq *vq, struct mv_vq_chain *out);
/* Puts the last chain back, to be popped again (no buffer space now). May be
 * repeated, latest first; the ring is read and checked anew by the next pop. */
void mv_vq_unpop(struct mv_vq *vq);
/* Completes a chain of which the first `written` writable bytes were written,
 * and reports them to mv_mem_written. */
void mv_vq_push(struct mv_vq *vq, const struct mv_vq_chain *chain, uint32_t written);
/* Interrupts the driver if it wants to be (after one or more pushes). */
void mv_vq_signal(struct mv_vq *vq);

#endif
