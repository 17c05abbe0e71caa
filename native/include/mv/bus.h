/*
 * The bus: where vCPUs and devices meet.  An address range has handlers; a
 * vCPU backend calls mv_bus_read/write and never learns who answers.
 */
#ifndef MV_BUS_H
#define MV_BUS_H

#include <stdint.h>

#define MV_BUS_REGIONS_MAX 64

/* `off` is relative to the region; `len` is 1, 2, 4 or 8 and off + len never
 * leaves the region.  Handlers do their own locking and may be called from
 * any vCPU thread. Values are little endian in the low bytes of `value`. */
struct mv_io_ops {
  uint64_t (*read)(void *dev, uint64_t off, unsigned len);
  void (*write)(void *dev, uint64_t off, uint64_t value, unsigned len);
};

struct mv_io_region {
  uint64_t base, size;
  const struct mv_io_ops *ops;
  void *dev;
};

/* One bus for ports and one for MMIO. Filled before the vCPUs start, constant
 * afterwards, so that look-ups need no lock. */
struct mv_bus {
  unsigned nregions;
  struct mv_io_region region[MV_BUS_REGIONS_MAX]; /* sorted by base        */
};

/* 0, -EINVAL (empty, wraps), -EEXIST (overlap), -ENOSPC. */
int mv_bus_add(struct mv_bus *bus, uint64_t base, uint64_t size, const struct mv_io_ops *ops,
               void *dev);
/* Unclaimed addresses read as all ones and ignore writes, as on a PC. */
uint64_t mv_bus_read(struct mv_bus *bus, uint64_t addr, unsigned len);
void mv_bus_write(struct mv_bus *bus, uint64_t addr, uint64_t value, unsigned len);

#endif
