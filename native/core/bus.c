/*
 * The bus (mv/bus.h): a sorted array of address ranges, searched by bisection.
 * An access that no region holds whole (unclaimed, or over a region's edge)
 * reads as all ones and writes nowhere.
 */
#include "mv/bus.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

int mv_bus_add(struct mv_bus *bus, uint64_t base, uint64_t size, const struct mv_io_ops *ops,
               void *dev) {
  if (!size || base + size < base)
    return -EINVAL;
  unsigned at = 0;
  while (at < bus->nregions && bus->region[at].base < base)
    at++;
  if (at > 0 && bus->region[at - 1].base + bus->region[at - 1].size > base)
    return -EEXIST;
  if (at < bus->nregions && base + size > bus->region[at].base)
    return -EEXIST;
  if (bus->nregions == MV_BUS_REGIONS_MAX)
    return -ENOSPC;
  memmove(&bus->region[at + 1], &bus->region[at], (bus->nregions - at) * sizeof(bus->region[0]));
  bus->region[at] = (struct mv_io_region){.base = base, .size = size, .ops = ops, .dev = dev};
  bus->nregions++;
  return 0;
}

static const struct mv_io_region *region_find(const struct mv_bus *bus, uint64_t addr,
                                              unsigned len) {
  unsigned lo = 0, hi = bus->nregions;
  while (lo < hi) { /* first region with base > addr */
    unsigned mid = (lo + hi) / 2;
    if (bus->region[mid].base > addr)
      hi = mid;
    else
      lo = mid + 1;
  }
  if (!lo)
    return NULL;
  const struct mv_io_region *region = &bus->region[lo - 1];
  uint64_t off = addr - region->base;
  return off < region->size && len <= region->size - off ? region : NULL;
}

static uint64_t all_ones(unsigned len) {
  return len >= 8 ? ~0ULL : (1ULL << (len * 8)) - 1;
}

uint64_t mv_bus_read(struct mv_bus *bus, uint64_t addr, unsigned len) {
  const struct mv_io_region *region = region_find(bus, addr, len);
  if (!region || !region->ops->read)
    return all_ones(len);
  return region->ops->read(region->dev, addr - region->base, len) & all_ones(len);
}

void mv_bus_write(struct mv_bus *bus, uint64_t addr, uint64_t value, unsigned len) {
  const struct mv_io_region *region = region_find(bus, addr, len);
  if (region && region->ops->write)
    region->ops->write(region->dev, addr - region->base, value & all_ones(len), len);
}
