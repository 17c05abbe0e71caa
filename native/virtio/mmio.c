/*
 * The virtio-mmio transport, version 2 (virtio 1.2 §4.2).
 *
 * Registers are 32 bits wide, and accessed so; any other width or alignment
 * reads as 0 and writes nothing.  Configuration space, from 0x100, takes 1, 2,
 * 4 and 8 bytes (§4.2.2.2).
 *
 * Device status (§2.1, §3.1): bits are set in order and cleared only by a
 * reset.  What may be written when:
 *
 *   status so far                        features    queues    notify
 *   0, ACKNOWLEDGE                       -           -         -
 *   | DRIVER                             write       -         -
 *   | FEATURES_OK                        -           write     -
 *   | DRIVER_OK                          -           -         served
 *   | NEEDS_RESET or FAILED              -           -         -
 *
 * FEATURES_OK is accepted only with VERSION_1 and nothing that we did not
 * offer.  A write at the wrong time is ignored.
 *
 * Interrupts: the line is high while InterruptStatus is not 0.  When the
 * driver acknowledges one bit of two, the line is dropped and raised again,
 * so that an edge-triggered pin does not lose the other.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "mv/devices.h"
#include "mv/layout.h"
#include "transport.h"

#define MAGIC     0x74726976u /* "virt" */
#define VENDOR    0x4d56564du
#define CONFIG    0x100
#define NO_SHM    0xffffffffu /* §4.2.2: a region that does not exist has length -1 */
#define MMIO_SIZE MV_VIRTIO_MMIO_STRIDE

enum reg {
  REG_MAGIC = 0x000,
  REG_VERSION = 0x004,
  REG_DEVICE_ID = 0x008,
  REG_VENDOR_ID = 0x00c,
  REG_DEVICE_FEATURES = 0x010,
  REG_DEVICE_FEATURES_SEL = 0x014,
  REG_DRIVER_FEATURES = 0x020,
  REG_DRIVER_FEATURES_SEL = 0x024,
  REG_QUEUE_SEL = 0x030,
  REG_QUEUE_SIZE_MAX = 0x034,
  REG_QUEUE_SIZE = 0x038,
  REG_QUEUE_READY = 0x044,
  REG_QUEUE_NOTIFY = MV_VIRTIO_NOTIFY_OFFSET,
  REG_INTERRUPT_STATUS = 0x060,
  REG_INTERRUPT_ACK = 0x064,
  REG_STATUS = 0x070,
  REG_QUEUE_DESC_LOW = 0x080,
  REG_QUEUE_DESC_HIGH = 0x084,
  REG_QUEUE_DRIVER_LOW = 0x090,
  REG_QUEUE_DRIVER_HIGH = 0x094,
  REG_QUEUE_DEVICE_LOW = 0x0a0,
  REG_QUEUE_DEVICE_HIGH = 0x0a4,
  REG_SHM_LEN_LOW = 0x0b0,
  REG_SHM_LEN_HIGH = 0x0b4,
  REG_SHM_BASE_LOW = 0x0b8,
  REG_SHM_BASE_HIGH = 0x0bc,
  REG_CONFIG_GENERATION = 0x0fc,
};

enum status {
  ACKNOWLEDGE = 1,
  DRIVER = 2,
  DRIVER_OK = 4,
  FEATURES_OK = 8,
  NEEDS_RESET = 64,
  FAILED = 128,
};

/* Each bit that the driver may set, and the bits that come before it (§3.1.1). */
static const struct {
  uint8_t bit, before;
} status_order[] = {
    {ACKNOWLEDGE, 0},
    {DRIVER, ACKNOWLEDGE},
    {FEATURES_OK, ACKNOWLEDGE | DRIVER},
    {DRIVER_OK, ACKNOWLEDGE | DRIVER | FEATURES_OK},
    {FAILED, 0},
};

enum isr { ISR_USED = 1, ISR_CONFIG = 2 };

static uint64_t offered_features(const struct mv_virtio *dev) {
  return dev->ops->features | 1ULL << MV_VIRTIO_F_VERSION_1 | 1ULL << MV_VIRTIO_F_EVENT_IDX |
         1ULL << MV_VIRTIO_F_INDIRECT_DESC;
}

/* ---- interrupts and status ---------------------------------------------- */

static void isr_raise(struct mv_virtio *dev, uint32_t bit) {
  uint32_t before = dev->isr;
  dev->isr |= bit;
  if (!before)
    mv_irq_set(&dev->irq, 1);
}

static void isr_ack(struct mv_virtio *dev, uint32_t bits) {
  if (!dev->isr)
    return;
  dev->isr &= ~bits;
  mv_irq_set(&dev->irq, 0);
  if (dev->isr)
    mv_irq_set(&dev->irq, 1);
}

void mv_virtio_interrupt(struct mv_virtio *dev) {
  isr_raise(dev, ISR_USED);
}

void mv_virtio_config_changed(struct mv_virtio *dev) {
  dev->config_generation++;
  if (mv_virtio_running(dev))
    isr_raise(dev, ISR_CONFIG);
}

bool mv_virtio_running(const struct mv_virtio *dev) {
  return (dev->status & (DRIVER_OK | NEEDS_RESET | FAILED)) == DRIVER_OK;
}

void mv_virtio_broken(struct mv_virtio *dev) {
  bool running = mv_virtio_running(dev);
  dev->status |= NEEDS_RESET;
  if (running)
    isr_raise(dev, ISR_CONFIG); /* §2.1.2: tell the driver once it is up */
}

/* The device first lets go of the guest's memory, then all is as at power-on. */
static void device_reset(struct mv_virtio *dev) {
  if (dev->ops->reset)
    dev->ops->reset(dev);
  if (dev->isr)
    isr_ack(dev, ~0u);
  dev->status = 0;
  dev->driver_features = 0;
  dev->features_sel = dev->driver_features_sel = dev->queue_sel = 0;
  for (unsigned i = 0; i < dev->ops->nqueues; i++)
    mv_vq_reset(&dev->vq[i]);
}

static bool features_acceptable(const struct mv_virtio *dev) {
  return (dev->driver_features & ~offered_features(dev)) == 0 &&
         dev->driver_features >> MV_VIRTIO_F_VERSION_1 & 1;
}

static void status_write(struct mv_virtio *dev, uint32_t value) {
  if (value == 0) {
    device_reset(dev);
    return;
  }
  uint32_t before = dev->status;
  for (unsigned i = 0; i < sizeof(status_order) / sizeof(status_order[0]); i++) {
    uint8_t bit = status_order[i].bit;
    if (!(value & bit) || (dev->status & status_order[i].before) != status_order[i].before)
      continue;
    if (bit == FEATURES_OK && !(dev->status & FEATURES_OK) && !features_acceptable(dev))
      continue;
    dev->status |= bit;
  }
  if ((dev->status & ~before & DRIVER_OK) && mv_virtio_running(dev) && dev->ops->driver_ok)
    dev->ops->driver_ok(dev);
}

/* ---- registers ----------------------------------------------------------- */

static struct mv_vq *selected_queue(struct mv_virtio *dev) {
  return dev->queue_sel < dev->ops->nqueues ? &dev->vq[dev->queue_sel] : NULL;
}

/* The selected queue, if it may be changed now. */
static struct mv_vq *writable_queue(struct mv_virtio *dev) {
  const uint32_t mask = FEATURES_OK | DRIVER_OK | NEEDS_RESET | FAILED;
  struct mv_vq *vq = selected_queue(dev);
  return vq && (dev->status & mask) == FEATURES_OK ? vq : NULL;
}

static uint32_t reg_read(struct mv_virtio *dev, uint64_t off) {
  const struct mv_vq *vq = selected_queue(dev);
  switch (off) {
  case REG_MAGIC:
    return MAGIC;
  case REG_VERSION:
    return 2;
  case REG_DEVICE_ID:
    return dev->ops->device_id;
  case REG_VENDOR_ID:
    return VENDOR;
  case REG_DEVICE_FEATURES:
    return dev->features_sel < 2 ? offered_features(dev) >> (32 * dev->features_sel) : 0;
  case REG_QUEUE_SIZE_MAX:
    return vq ? MV_VQ_SIZE_MAX : 0;
  case REG_QUEUE_READY:
    return vq ? vq->ready : 0;
  case REG_INTERRUPT_STATUS:
    return dev->isr;
  case REG_STATUS:
    return dev->status;
  case REG_SHM_LEN_LOW:
  case REG_SHM_LEN_HIGH:
  case REG_SHM_BASE_LOW:
  case REG_SHM_BASE_HIGH:
    return NO_SHM;
  case REG_CONFIG_GENERATION:
    return dev->config_generation;
  default: /* write-only or unassigned */
    return 0;
  }
}

static void driver_features_write(struct mv_virtio *dev, uint32_t value) {
  if ((dev->status & (DRIVER | FEATURES_OK)) != DRIVER || dev->driver_features_sel > 1)
    return;
  unsigned shift = 32 * dev->driver_features_sel;
  dev->driver_features &= ~(0xffffffffULL << shift);
  dev->driver_features |= (uint64_t)value << shift;
}

static void queue_ready_write(struct mv_vq *vq, uint32_t value) {
  if (!(value & 1))
    vq->ready = false;
  else if (!vq->ready && mv_vq_enable(vq) < 0)
    vq->ready = false; /* the driver reads back 0: §4.2.3.2 */
}

static void set_low(uint64_t *v, uint32_t half) {
  *v = (*v & ~0xffffffffULL) | half;
}
static void set_high(uint64_t *v, uint32_t half) {
  *v = (uint32_t)*v | (uint64_t)half << 32;
}

/* Size and addresses: only while the queue is not ready. */
static void queue_write(struct mv_vq *vq, uint64_t off, uint32_t value) {
  if (vq->ready)
    return;
  switch (off) {
  case REG_QUEUE_SIZE: /* out of range becomes 0, which QueueReady refuses */
    vq->size = value <= MV_VQ_SIZE_MAX ? value : 0;
    break;
  case REG_QUEUE_DESC_LOW:
    set_low(&vq->desc, value);
    break;
  case REG_QUEUE_DESC_HIGH:
    set_high(&vq->desc, value);
    break;
  case REG_QUEUE_DRIVER_LOW:
    set_low(&vq->avail, value);
    break;
  case REG_QUEUE_DRIVER_HIGH:
    set_high(&vq->avail, value);
    break;
  case REG_QUEUE_DEVICE_LOW:
    set_low(&vq->used, value);
    break;
  case REG_QUEUE_DEVICE_HIGH:
    set_high(&vq->used, value);
    break;
  }
}

static void queue_notify(struct mv_virtio *dev, uint32_t queue) {
  if (queue < dev->ops->nqueues && dev->vq[queue].ready && mv_virtio_running(dev))
    dev->ops->notify(dev, queue);
}

static void reg_write(struct mv_virtio *dev, uint64_t off, uint32_t value) {
  struct mv_vq *vq;
  switch (off) {
  case REG_DEVICE_FEATURES_SEL:
    dev->features_sel = value;
    break;
  case REG_DRIVER_FEATURES_SEL:
    dev->driver_features_sel = value;
    break;
  case REG_DRIVER_FEATURES:
    driver_features_write(dev, value);
    break;
  case REG_QUEUE_SEL:
    dev->queue_sel = value;
    break;
  case REG_QUEUE_NOTIFY:
    queue_notify(dev, value);
    break;
  case REG_INTERRUPT_ACK:
    isr_ack(dev, value);
    break;
  case REG_STATUS:
    status_write(dev, value);
    break;
  case REG_QUEUE_READY:
    vq = writable_queue(dev);
    if (vq)
      queue_ready_write(vq, value);
    break;
  default:
    vq = writable_queue(dev);
    if (vq)
      queue_write(vq, off, value);
    break;
  }
}

/* ---- the bus's side ------------------------------------------------------ */

static uint64_t config_read(struct mv_virtio *dev, uint64_t off, unsigned len) {
  uint64_t value = 0;
  if (off < dev->ops->config_len && len <= dev->ops->config_len - off)
    memcpy(&value, dev->config + off, len); /* little endian, as the host */
  return value;
}

static void config_write(struct mv_virtio *dev, uint64_t off, uint64_t value, unsigned len) {
  if (dev->ops->config_write && off < dev->ops->config_len && len <= dev->ops->config_len - off)
    dev->ops->config_write(dev, off, value, len);
}

static uint64_t mmio_read(void *ctx, uint64_t off, unsigned len) {
  struct mv_virtio *dev = ctx;
  uint64_t value = 0;
  pthread_mutex_lock(&dev->lock);
  if (off >= CONFIG)
    value = config_read(dev, off - CONFIG, len);
  else if (len == 4 && off % 4 == 0)
    value = reg_read(dev, off);
  pthread_mutex_unlock(&dev->lock);
  return value;
}

static void mmio_write(void *ctx, uint64_t off, uint64_t value, unsigned len) {
  struct mv_virtio *dev = ctx;
  pthread_mutex_lock(&dev->lock);
  if (off >= CONFIG)
    config_write(dev, off - CONFIG, value, len);
  else if (len == 4 && off % 4 == 0)
    reg_write(dev, off, value);
  pthread_mutex_unlock(&dev->lock);
}

static const struct mv_io_ops mmio_ops = {.read = mmio_read, .write = mmio_write};

int mv_virtio_attach(struct mv_virtio *dev, struct mv_bus *mmio, uint64_t gpa) {
  pthread_mutex_init(&dev->lock, NULL);
  dev->notify_fd = -1;
  dev->notify_loop = NULL;
  for (unsigned i = 0; i < MV_VIRTIO_QUEUES_MAX; i++)
    dev->vq[i] = (struct mv_vq){.dev = dev};
  int rc = mv_bus_add(mmio, gpa, MMIO_SIZE, &mmio_ops, dev);
  if (rc)
    pthread_mutex_destroy(&dev->lock);
  return rc;
}

void mv_virtio_detach(struct mv_virtio *dev) {
  if (dev->notify_fd >= 0) {
    mv_loop_del(dev->notify_loop, dev->notify_fd);
    close(dev->notify_fd);
    dev->notify_fd = -1;
  }
  pthread_mutex_destroy(&dev->lock);
}

void mv_virtio_free(struct mv_virtio *dev) {
  if (dev)
    dev->ops->destroy(dev);
}

/* One eventfd for all queues: which one was meant is cheaper to look up in
 * the rings than to have an eventfd each. */
static void notify_event(void *ctx, uint32_t events) {
  (void)events;
  struct mv_virtio *dev = ctx;
  uint64_t count;
  if (read(dev->notify_fd, &count, sizeof(count)) < 0)
    return;
  pthread_mutex_lock(&dev->lock);
  for (unsigned i = 0; i < dev->ops->nqueues; i++)
    queue_notify(dev, i);
  pthread_mutex_unlock(&dev->lock);
}

int mv_virtio_notify_fd(struct mv_virtio *dev, struct mv_loop *loop) {
  int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0)
    return -errno;
  int rc = mv_loop_add(loop, fd, EPOLLIN, notify_event, dev);
  if (rc) {
    close(fd);
    return rc;
  }
  dev->notify_loop = loop;
  dev->notify_fd = fd;
  return fd;
}
