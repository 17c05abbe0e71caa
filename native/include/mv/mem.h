/*
 * Guest physical memory: a few slots of RAM, each backed by host memory.
 *
 * Everyone who touches guest RAM by physical address comes through here.
 * Every address and length is the guest's and is checked; a range is good
 * only if it lies wholly within one slot.
 */
#ifndef MV_MEM_H
#define MV_MEM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define MV_MEM_SLOTS_MAX 16

struct mv_memslot {
  uint64_t gpa;  /* page aligned                                          */
  uint64_t size; /* bytes, page aligned                                   */
  uint8_t *hva;
};

/* Called after host code (a device's DMA) wrote guest RAM, from any thread.
 * The translator uses it to drop translations of the bytes. */
typedef void (*mv_mem_written_fn)(void *ctx, uint64_t gpa, uint64_t len);

struct mv_mem {
  unsigned nslots;
  struct mv_memslot slot[MV_MEM_SLOTS_MAX]; /* sorted by gpa, disjoint     */
  mv_mem_written_fn written;
  void *written_ctx;
};

/* Adds RAM of `size` bytes at `gpa`.  0, -EINVAL (alignment, overlap, wrap),
 * -ENOSPC (slots), -ENOMEM.  The memory is private, zero, populated on touch. */
int mv_mem_add(struct mv_mem *mem, uint64_t gpa, uint64_t size);
/* Maps `len` bytes of file `fd` at `off` copy-on-write over RAM at `gpa`
 * (all page aligned; len is rounded up to a page).  0 or -errno. */
int mv_mem_map_file(struct mv_mem *mem, uint64_t gpa, int fd, uint64_t off, uint64_t len);
void mv_mem_destroy(struct mv_mem *mem);

/* Host pointer to [gpa, gpa+len), or NULL unless wholly inside one slot. */
void *mv_mem_ptr(const struct mv_mem *mem, uint64_t gpa, uint64_t len);
/* Copies; 0 or -EFAULT with nothing copied. mv_mem_write reports the write. */
int mv_mem_read(const struct mv_mem *mem, uint64_t gpa, void *buf, uint64_t len);
int mv_mem_write(struct mv_mem *mem, uint64_t gpa, const void *buf, uint64_t len);
/* Reports bytes that were written through a pointer from mv_mem_ptr. */
static inline void mv_mem_written(struct mv_mem *mem, uint64_t gpa, uint64_t len) {
  if (mem->written)
    mem->written(mem->written_ctx, gpa, len);
}

#endif
