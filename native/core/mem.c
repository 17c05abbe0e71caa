/*
 * Guest physical memory (mv/mem.h).
 *
 * RAM is private anonymous memory without a swap reservation: what the guest
 * never touches costs nothing.  It is aligned to 2 MiB in the host's address
 * space as in the guest's, so that the host can back it with huge pages.
 * Files (kernel, initrd) are mapped over it copy-on-write, so that guests of
 * one image share its pages until they write them.
 *
 * Slots are added before the vCPUs start and constant afterwards: look-ups
 * take no lock.
 */
#define _GNU_SOURCE
#include "mv/mem.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#define PAGE_SIZE 4096ULL
#define HUGE_SIZE (2ULL << 20)

static bool page_aligned(uint64_t v) {
  return (v & (PAGE_SIZE - 1)) == 0;
}

/* Reserves `size` bytes at a 2 MiB boundary, if the size is worth it. */
static uint8_t *ram_map(uint64_t size) {
  uint64_t slack = size >= HUGE_SIZE ? HUGE_SIZE : 0;
  uint8_t *base = mmap(NULL, size + slack, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED)
    return NULL;
  if (!slack)
    return base;
  uint8_t *start = (uint8_t *)(((uintptr_t)base + HUGE_SIZE - 1) & ~(uintptr_t)(HUGE_SIZE - 1));
  uint64_t before = start - base, after = slack - before;
  if (before)
    munmap(base, before);
  if (after)
    munmap(start + size, after);
  /* Without THP in the host's kernel this fails, and nothing is lost. */
  madvise(start, size, MADV_HUGEPAGE);
  return start;
}

int mv_mem_add(struct mv_mem *mem, uint64_t gpa, uint64_t size) {
  if (!size || !page_aligned(gpa) || !page_aligned(size) || gpa + size < gpa)
    return -EINVAL;
  unsigned at = 0;
  while (at < mem->nslots && mem->slot[at].gpa < gpa)
    at++;
  if (at > 0 && mem->slot[at - 1].gpa + mem->slot[at - 1].size > gpa)
    return -EINVAL;
  if (at < mem->nslots && gpa + size > mem->slot[at].gpa)
    return -EINVAL;
  if (mem->nslots == MV_MEM_SLOTS_MAX)
    return -ENOSPC;
  if (size + HUGE_SIZE < size)
    return -ENOMEM;
  uint8_t *hva = ram_map(size);
  if (!hva)
    return -ENOMEM;
  memmove(&mem->slot[at + 1], &mem->slot[at], (mem->nslots - at) * sizeof(mem->slot[0]));
  mem->slot[at] = (struct mv_memslot){.gpa = gpa, .size = size, .hva = hva};
  mem->nslots++;
  return 0;
}

int mv_mem_map_file(struct mv_mem *mem, uint64_t gpa, int fd, uint64_t off, uint64_t len) {
  struct stat st;
  if (!len || !page_aligned(gpa) || !page_aligned(off) || off + len < off ||
      len + PAGE_SIZE - 1 < len)
    return -EINVAL;
  if (fstat(fd, &st) < 0)
    return -errno;
  /* A page past the end of the file would be a SIGBUS in the middle of the guest. */
  if (off + len > (uint64_t)st.st_size)
    return -EINVAL;
  len = (len + PAGE_SIZE - 1) & ~(PAGE_SIZE - 1);
  void *hva = mv_mem_ptr(mem, gpa, len);
  if (!hva)
    return -EFAULT;
  if (mmap(hva, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, fd, off) ==
      MAP_FAILED)
    return -errno;
  mv_mem_written(mem, gpa, len);
  return 0;
}

void mv_mem_destroy(struct mv_mem *mem) {
  for (unsigned i = 0; i < mem->nslots; i++)
    munmap(mem->slot[i].hva, mem->slot[i].size);
  mem->nslots = 0;
}

void *mv_mem_ptr(const struct mv_mem *mem, uint64_t gpa, uint64_t len) {
  for (unsigned i = 0; i < mem->nslots; i++) {
    const struct mv_memslot *slot = &mem->slot[i];
    uint64_t off = gpa - slot->gpa; /* below the slot: wraps to a huge value */
    if (off < slot->size && len <= slot->size - off)
      return slot->hva + off;
  }
  return NULL;
}

int mv_mem_read(const struct mv_mem *mem, uint64_t gpa, void *buf, uint64_t len) {
  const void *src = mv_mem_ptr(mem, gpa, len);
  if (!src)
    return -EFAULT;
  memcpy(buf, src, len);
  return 0;
}

int mv_mem_write(struct mv_mem *mem, uint64_t gpa, const void *buf, uint64_t len) {
  void *dst = mv_mem_ptr(mem, gpa, len);
  if (!dst)
    return -EFAULT;
  memcpy(dst, buf, len);
  mv_mem_written(mem, gpa, len);
  return 0;
}
