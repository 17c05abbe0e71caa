/*
 * Blocks: find, translate on a miss, link, invalidate. See cache.h.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "cache.h"
#include "saved.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

#define CACHE_BYTES_DEFAULT (32ull << 20)
#define CACHE_BYTES_MIN     (256ull << 10)
#define BLOCK_ROOM          MV_BLOCK_ROOM
#define POPULATE_BYTES      (256u << 10)
#define TABLE_ENTRY_BYTES   160 /* cache bytes a block, for sizing tables      */

/* ======================= memory ========================================= */

static void *table_map(uint64_t bytes) {
  void *p =
      mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? NULL : p;
}

static int code_map(struct mv_dbt_exec *x) {
  int fd = memfd_create("mv-code", MFD_CLOEXEC);
  if (fd < 0)
    return -errno;
  if (ftruncate(fd, (off_t)x->size)) {
    close(fd);
    return -ENOMEM;
  }
  void *rw = mmap(NULL, x->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  void *rx = mmap(NULL, x->size, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0);
  close(fd);
  if (rw == MAP_FAILED || rx == MAP_FAILED)
    return -ENOMEM;
  x->rw = rw;
  x->rx = rx;
  x->cold_ready = (uint32_t)(x->size / 2);
  return 0;
}

static void reset(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  x->hot = 64; /* offset 0 stands for "none"                                 */
  x->cold = (uint32_t)(x->size / 2);
  x->nblocks = x->nsites = x->ncodepages = 1;
  x->nmap = x->nhelpers = 0;
  x->global_lo = ~0ull;
  x->global_hi = 0;
  x->epoch++;
  mv_cache_forget_mappings(d);
  mv_cache_forget_jumps(d);
}

int mv_cache_init(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  x->size = d->vm->dbt.cache_bytes ? d->vm->dbt.cache_bytes : CACHE_BYTES_DEFAULT;
  if (x->size < CACHE_BYTES_MIN)
    x->size = CACHE_BYTES_MIN;
  x->size = (x->size + 0xffff) & ~0xffffull;
  if (x->size > 1ull << 30)
    return -EINVAL;
  int r = code_map(x);
  if (r)
    return r;
  x->max_blocks = (uint32_t)(x->size / TABLE_ENTRY_BYTES);
  x->max_sites = x->max_map = x->max_blocks * 8;
  x->max_codepages = x->max_helpers = x->max_blocks / 2;
  x->blocks = table_map(x->max_blocks * sizeof *x->blocks);
  x->sites = table_map(x->max_sites * sizeof *x->sites);
  x->map = table_map(x->max_map * sizeof *x->map);
  x->helpers = table_map(x->max_helpers * sizeof *x->helpers);
  x->codepages = table_map(x->max_codepages * sizeof *x->codepages);
  x->hash = table_map(sizeof(uint32_t) << MV_BLOCK_HASH_BITS);
  x->codepage_hash = table_map(sizeof(uint32_t) << MV_CODEPAGE_HASH_BITS);
  if (!x->blocks || !x->sites || !x->map || !x->helpers || !x->codepages || !x->hash ||
      !x->codepage_hash)
    return -ENOMEM;
  for (unsigned i = 0; i < d->vm->mem.nslots; i++) {
    x->pages[i] = table_map((d->vm->mem.slot[i].size >> 12) * sizeof **x->pages);
    if (!x->pages[i])
      return -ENOMEM;
  }
  reset(d);
  return 0;
}

static void table_unmap(void *p, uint64_t bytes) {
  if (p)
    munmap(p, bytes);
}

void mv_cache_destroy(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  table_unmap(x->rw, x->size);
  table_unmap(x->rx, x->size);
  table_unmap(x->blocks, x->max_blocks * sizeof *x->blocks);
  table_unmap(x->sites, x->max_sites * sizeof *x->sites);
  table_unmap(x->map, x->max_map * sizeof *x->map);
  table_unmap(x->helpers, x->max_helpers * sizeof *x->helpers);
  table_unmap(x->codepages, x->max_codepages * sizeof *x->codepages);
  table_unmap(x->hash, sizeof(uint32_t) << MV_BLOCK_HASH_BITS);
  table_unmap(x->codepage_hash, sizeof(uint32_t) << MV_CODEPAGE_HASH_BITS);
  for (unsigned i = 0; i < d->vm->mem.nslots; i++)
    table_unmap(x->pages[i], (d->vm->mem.slot[i].size >> 12) * sizeof **x->pages);
}

static struct mv_physpage *page_of(struct mv_dbt *d, uint64_t gpa) {
  unsigned slot;
  if (!mv_mmu_ram(d, gpa, &slot))
    return NULL;
  return &d->exec->pages[slot][(gpa - d->vm->mem.slot[slot].gpa) >> 12];
}

/* The other bytes that a block depends on, [*gpa, *gpa + *len): where its last
 * instruction ends, or where it peeked. Do they lie in another page? */
static bool other_page(const struct mv_block *b, uint64_t *gpa, uint64_t *len) {
  *gpa = b->crosses ? b->gpa2 : b->peek_gpa;
  *len = b->crosses ? (b->gpa & 0xfff) + b->guest_len - 0x1000 : b->peek_len;
  return *len && (*gpa ^ b->gpa) >> 12;
}

void mv_cache_flush(struct mv_dbt *d) {
  struct mv_dbt_exec *x = d->exec;
  uint64_t gpa, len;
  for (uint32_t b = 1; b < x->nblocks; b++) {
    struct mv_physpage *p = page_of(d, x->blocks[b].gpa);
    p->mask = p->block = 0;
    if (other_page(&x->blocks[b], &gpa, &len)) {
      p = page_of(d, gpa);
      p->mask = p->block = 0;
    }
  }
  __builtin_memset(x->hash, 0, sizeof(uint32_t) << MV_BLOCK_HASH_BITS);
  __builtin_memset(x->codepage_hash, 0, sizeof(uint32_t) << MV_CODEPAGE_HASH_BITS);
  d->vcpu->stats.code_flushes++;
  reset(d);
}

/* Has the kernel fill the cache's next pages in one go, which takes a fraction
 * of what touching them one by one does. Older kernels refuse: no harm. */
static void populate(struct mv_dbt_exec *x, uint32_t at, uint32_t *ready) {
  if (at + BLOCK_ROOM <= *ready || *ready + POPULATE_BYTES > x->size)
    return;
  madvise(x->rw + *ready, POPULATE_BYTES, MADV_POPULATE_WRITE);
  *ready += POPULATE_BYTES;
}

/* ======================= mappings ======================================= */

void mv_cache_forget_mappings(struct mv_dbt *d) {
  d->exec->epoch++;
  __builtin_memset(d->itlb, 0, sizeof d->itlb);
}

void mv_cache_forget_mapping(struct mv_dbt *d, uint64_t gva, bool large) {
  if (large) {
    mv_cache_forget_mappings(d);
    return;
  }
  d->exec->epoch++;
  for (unsigned p = 0; p < MV_PRIV_COUNT; p++)
    d->itlb[p][(gva >> 12) & (MV_ITLB_SIZE - 1)] = 0;
}

void mv_cache_forget_jumps(struct mv_dbt *d) {
  for (unsigned p = 0; p < MV_PRIV_COUNT; p++)
    for (unsigned i = 0; i < MV_JC_SIZE; i++)
      d->jc[p][i] = d->tramp[MV_TRAMP_INDIRECT];
}

uint32_t mv_cache_codepage(struct mv_dbt *d, uint64_t vpage, uint64_t ppage, uint32_t mode) {
  struct mv_dbt_exec *x = d->exec;
  uint32_t h =
      (uint32_t)((vpage ^ ppage * 31) >> 12 ^ mode * 0x9e5) & ((1u << MV_CODEPAGE_HASH_BITS) - 1);
  for (uint32_t i = x->codepage_hash[h]; i; i = x->codepages[i].next) {
    struct mv_codepage *c = &x->codepages[i];
    if (c->vpage == vpage && c->ppage == ppage && c->mode == mode)
      return i;
  }
  if (x->ncodepages == x->max_codepages)
    return 0;
  x->codepages[x->ncodepages] = (struct mv_codepage){
      .vpage = vpage, .ppage = ppage, .mode = mode, .next = x->codepage_hash[h]};
  x->codepage_hash[h] = x->ncodepages;
  if (mode & MV_MODE_UNGUARDED && vpage < x->global_lo)
    x->global_lo = vpage;
  if (mode & MV_MODE_UNGUARDED && vpage > x->global_hi)
    x->global_hi = vpage;
  return x->ncodepages++;
}

/* ======================= links ========================================== */

static void link_reset(struct mv_dbt_exec *x, uint32_t from, unsigned slot) {
  struct mv_link *l = &x->blocks[from].out[slot];
  int32_t rel = (int32_t)(l->stub - (l->patch + 4));
  __builtin_memcpy(x->rw + l->patch, &rel, 4);
  l->target = 0;
}

void mv_cache_link(struct mv_dbt *d, uint32_t from, unsigned slot, uint32_t to) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_block *a = &x->blocks[from], *b = &x->blocks[to];
  struct mv_link *l = &a->out[slot];
  uint32_t entry = b->code;
  if (!(b->mode & MV_MODE_UNGUARDED) && a->codepage != b->codepage)
    entry = mv_cache_guarded_entry(d, to);
  if (!entry || l->target || a->dead || b->dead)
    return;
  int32_t rel = (int32_t)(entry - (l->patch + 4));
  __builtin_memcpy(x->rw + l->patch, &rel, 4);
  l->target = to;
  l->next = b->links_in;
  b->links_in = from << 1 | slot;
}

/* Undoes link (from, slot) and takes it out of its target's list: the code may
 * be running, and must not go on into what is stale. */
static void link_undo(struct mv_dbt_exec *x, uint32_t from, unsigned slot) {
  struct mv_link *l = &x->blocks[from].out[slot];
  if (!l->target)
    return;
  uint32_t *at = &x->blocks[l->target].links_in;
  while (*at && *at != (from << 1 | slot))
    at = &x->blocks[*at >> 1].out[*at & 1].next;
  if (*at)
    *at = l->next;
  link_reset(x, from, slot);
}

static bool cold_room(struct mv_dbt_exec *x) {
  return x->cold + BLOCK_ROOM < x->size;
}

uint32_t mv_cache_guarded_entry(struct mv_dbt *d, uint32_t block) {
  struct mv_block *b = &d->exec->blocks[block];
  if (!b->guarded_entry && cold_room(d->exec))
    b->guarded_entry = mv_emit_guarded_entry(d, b);
  return b->guarded_entry;
}

uint32_t mv_cache_indirect_entry(struct mv_dbt *d, uint32_t block) {
  struct mv_block *b = &d->exec->blocks[block];
  if (!b->indirect_entry && cold_room(d->exec))
    b->indirect_entry = mv_emit_indirect_entry(d, b);
  return b->indirect_entry;
}

/* ======================= invalidation =================================== */

static void page_unlist(struct mv_dbt *d, uint64_t gpa, uint32_t block, unsigned which) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_physpage *p = page_of(d, gpa);
  uint32_t *at = &p->block;
  while (*at != block) {
    struct mv_block *b = &x->blocks[*at];
    at = &b->page_next[(b->gpa & ~0xfffull) == (gpa & ~0xfffull) ? 0 : 1];
  }
  *at = x->blocks[block].page_next[which];
  if (!p->block)
    p->mask = 0;
}

static uint32_t block_hash(uint64_t rip, uint64_t gpa) {
  uint64_t h = (rip ^ gpa << 7) * 0x9e3779b97f4a7c15ull;
  return (uint32_t)(h >> (64 - MV_BLOCK_HASH_BITS));
}

void mv_cache_invalidate(struct mv_dbt *d, uint32_t block) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_block *b = &x->blocks[block];
  if (b->dead)
    return;
  b->dead = true;
  while (b->links_in) {
    uint32_t in = b->links_in;
    b->links_in = x->blocks[in >> 1].out[in & 1].next;
    link_reset(x, in >> 1, in & 1);
  }
  link_undo(x, block, 0);
  link_undo(x, block, 1);
  uint32_t *at = &x->hash[block_hash(b->rip, b->gpa)];
  while (*at != block)
    at = &x->blocks[*at].hash_next;
  *at = b->hash_next;
  uint64_t gpa, len;
  page_unlist(d, b->gpa, block, 0);
  if (other_page(b, &gpa, &len))
    page_unlist(d, gpa, block, 1);
  unsigned priv = b->mode & MV_MODE_USER ? MV_PRIV_USER : MV_PRIV_KERNEL;
  uint64_t *jc = &d->jc[priv][b->rip & (MV_JC_SIZE - 1)];
  if (b->indirect_entry && *jc == (uint64_t)(uintptr_t)(x->rx + b->indirect_entry))
    *jc = d->tramp[MV_TRAMP_INDIRECT];
  x->epoch++;
}

/* Bits of mv_physpage.mask for bytes [off, off + len) of a page. */
static uint64_t mask_of(uint64_t off, uint64_t len) {
  unsigned lo = (unsigned)(off >> 6), hi = (unsigned)((off + len - 1) >> 6);
  return (hi >= 63 ? ~0ull : (1ull << (hi + 1)) - 1) & ~((1ull << lo) - 1);
}

bool mv_cache_is_code(struct mv_dbt *d, uint64_t gpa) {
  struct mv_physpage *p = page_of(d, gpa);
  return p && p->mask;
}

void mv_cache_note_write_tag(struct mv_dbt *d, uint64_t gpa) {
  page_of(d, gpa)->written = true;
}

bool mv_cache_any_code(struct mv_dbt *d, uint64_t gpa, uint64_t len) {
  for (uint64_t at = gpa & ~0xfffull; at < gpa + len; at += 0x1000)
    if (mv_cache_is_code(d, at))
      return true;
  return false;
}

static bool overlap(uint64_t a, uint64_t alen, uint64_t b, uint64_t blen) {
  return blen && a < b + blen && b < a + alen;
}

/* Does a block depend on any of these bytes? */
static bool made_of(const struct mv_block *b, uint64_t gpa, uint64_t len) {
  uint64_t first = b->crosses ? 0x1000 - (b->gpa & 0xfff) : b->guest_len, other, other_len;
  other_page(b, &other, &other_len);
  return overlap(gpa, len, b->gpa, first) || overlap(gpa, len, other, other_len);
}

/* Drops the blocks of a page made of the bytes [gpa, gpa + len), which are in it. */
static void page_written(struct mv_dbt *d, struct mv_physpage *p, uint64_t gpa, uint64_t len) {
  struct mv_dbt_exec *x = d->exec;
  for (uint32_t i = p->block, next; i; i = next) {
    struct mv_block *b = &x->blocks[i];
    next = b->page_next[(b->gpa ^ gpa) >> 12 ? 1 : 0];
    if (made_of(b, gpa, len))
      mv_cache_invalidate(d, i);
  }
}

void mv_cache_written(struct mv_dbt *d, uint64_t gpa, uint64_t len) {
  while (len) {
    uint64_t off = gpa & 0xfff, n = 0x1000 - off < len ? 0x1000 - off : len;
    struct mv_physpage *p = page_of(d, gpa);
    if (p && p->mask & mask_of(off, n))
      page_written(d, p, gpa, n);
    gpa += n;
    len -= n;
  }
}

/* Drops the blocks of an unguarded mapping that is no more. */
static void codepage_drop(struct mv_dbt *d, uint32_t id) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_physpage *p = page_of(d, x->codepages[id].ppage);
  for (uint32_t i = p->block, next; i; i = next) {
    struct mv_block *b = &x->blocks[i];
    next = b->page_next[(b->gpa & ~0xfffull) == x->codepages[id].ppage ? 0 : 1];
    if (b->codepage == id || b->codepage2 == id)
      mv_cache_invalidate(d, i);
  }
}

bool mv_cache_probe_global(struct mv_dbt *d, uint64_t rip, struct mv_walk *w) {
  uint8_t vector = d->exc_vector; /* a failed walk must raise nothing          */
  uint64_t cr2 = d->cr2;
  bool ok = mv_mmu_walk(d, rip, MV_ACC_X, false, w) == 0 && w->g_bit && w->hva;
  d->exc_vector = vector;
  d->cr2 = cr2;
  if (ok && w->large)
    mv_mmu_note_large_code(d, rip);
  return ok;
}

/* Walks of one verification: kernel code lies in few large pages. */
struct walk_memo {
  uint64_t region; /* of 2 MiB, or ~0                                         */
  uint64_t gpa;
};
#define WALK_MEMOS 16

static bool still_mapped(struct mv_dbt *d, const struct mv_codepage *c, struct walk_memo *memos) {
  struct walk_memo *m = &memos[(c->vpage >> 21) & (WALK_MEMOS - 1)];
  if (m->region == c->vpage >> 21)
    return m->gpa + (c->vpage & 0x1fffff) == c->ppage;
  struct mv_walk w;
  bool ok = mv_cache_probe_global(d, c->vpage, &w);
  if (ok && w.large)
    *m = (struct walk_memo){c->vpage >> 21, w.gpa - (c->vpage & 0x1fffff)};
  return ok && (w.gpa & ~0xfffull) == c->ppage;
}

void mv_cache_verify_global(struct mv_dbt *d, uint64_t gva) {
  struct mv_dbt_exec *x = d->exec;
  struct walk_memo memos[WALK_MEMOS];
  if (gva != ~0ull && (gva < x->global_lo || gva > x->global_hi))
    return;
  for (unsigned i = 0; i < WALK_MEMOS; i++)
    memos[i].region = ~0ull;
  for (uint32_t i = 1; i < x->ncodepages; i++) {
    struct mv_codepage *c = &x->codepages[i];
    if (!(c->mode & MV_MODE_UNGUARDED) || (gva != ~0ull && c->vpage != gva))
      continue;
    if (page_of(d, c->ppage)->block && !still_mapped(d, c, memos))
      codepage_drop(d, i);
  }
}

/* ======================= look-up and translation ======================== */

static uint32_t find(struct mv_dbt_exec *x, uint64_t rip, uint64_t gpa, unsigned mode,
                     unsigned variant) {
  for (uint32_t i = x->hash[block_hash(rip, gpa)]; i; i = x->blocks[i].hash_next) {
    struct mv_block *b = &x->blocks[i];
    if (b->rip == rip && b->gpa == gpa && b->mode == mode && b->variant == variant)
      return i;
  }
  return 0;
}

static bool has_room(struct mv_dbt_exec *x) {
  return x->hot + BLOCK_ROOM < x->size / 2 && cold_room(x) && x->nblocks + 1 < x->max_blocks &&
         x->nsites + 8 * MV_BLOCK_INSNS_MAX < x->max_sites &&
         x->nmap + MV_BLOCK_INSNS_MAX < x->max_map && x->nhelpers + 2 < x->max_helpers &&
         x->ncodepages + 2 < x->max_codepages;
}

static void page_enlist(struct mv_dbt *d, uint64_t gpa, uint64_t len, uint32_t block,
                        unsigned which) {
  struct mv_physpage *p = page_of(d, gpa);
  if (!p->mask && p->written)
    mv_mmu_protect(d, gpa);
  p->written &= p->mask != 0;
  p->mask |= mask_of(gpa & 0xfff, len);
  d->exec->blocks[block].page_next[which] = p->block;
  p->block = block;
}

/* Where the second page of a crossing instruction is: 0 and *w, or -1. */
static int second_page(struct mv_dbt *d, uint64_t rip, struct mv_walk *w) {
  uint64_t gva = (rip | 0xfff) + 1;
  if (mv_mmu_walk(d, gva, MV_ACC_X, d->cpl == 3, w))
    return -1;
  if (!w->hva) /* code in MMIO is not run                                     */
    return mv_dbt_raise_code(d, MV_EXC_GP, 0);
  if (w->large)
    mv_mmu_note_large_code(d, gva);
  return 0;
}

/* Are the bytes that a kept translation peeked at the same now? */
static bool peeked_same(struct mv_dbt *d, struct mv_block *b, const struct mv_saved_block *r,
                        const struct mv_walk *w) {
  uint64_t off = r->peek_rip & 0xfff;
  const uint8_t *now = w->hva + off;
  if (!r->peek_len)
    return true;
  b->peek_gpa = (w->gpa & ~0xfffull) + off;
  if (r->peek_elsewhere) {
    struct mv_walk other;
    if (!mv_cache_probe_global(d, r->peek_rip, &other))
      return false;
    now = other.hva + off;
    b->peek_gpa = other.gpa;
    b->codepage2 = mv_cache_codepage(d, r->peek_rip & ~0xfffull, other.gpa & ~0xfffull, b->mode);
  }
  if (!mv_same_bytes(now, mv_saved_peeked(r), r->peek_len))
    return false;
  b->peek_len = r->peek_len;
  return true;
}

/* Takes the block from what earlier starts left, if it is there. */
static bool revive(struct mv_dbt *d, struct mv_block *b, const struct mv_walk *w) {
  struct mv_dbt_exec *x = d->exec;
  unsigned off = b->rip & 0xfff;
  if (!x->saved || b->variant || b->failures)
    return false;
  const struct mv_saved_block *r =
      mv_saved_find(x->saved, b->rip, mv_saved_mode(d, b->mode), w->hva + off, 0x1000 - off);
  if (!r || !peeked_same(d, b, r, w)) {
    b->peek_gpa = b->codepage2 = 0;
    return false;
  }
  mv_saved_revive(d, r, b);
  d->vcpu->stats.revived_blocks++;
  return true;
}

static uint32_t translate(struct mv_dbt *d, uint64_t rip, const struct mv_walk *w, unsigned mode,
                          unsigned variant, uint32_t cp) {
  struct mv_dbt_exec *x = d->exec;
  uint32_t id = x->nblocks;
  struct mv_block *b = &x->blocks[id];
  populate(x, x->hot, &x->hot_ready);
  populate(x, x->cold, &x->cold_ready);
  *b = (struct mv_block){.rip = rip,
                         .gpa = w->gpa,
                         .mode = (uint8_t)mode,
                         .variant = (uint8_t)variant,
                         .codepage = cp,
                         .failures = x->next_single ? 1 : 0};
  unsigned avail = 0x1000 - (rip & 0xfff);
  const uint8_t *bytes = w->hva + (rip & 0xfff);
  uint64_t gpa2 = 0;
  if (!revive(d, b, w) && mv_translate(d, b, bytes, avail, NULL)) {
    struct mv_walk w2;
    if (second_page(d, rip, &w2))
      return 0;
    gpa2 = w2.gpa & ~0xfffull;
    unsigned mode2 = mode & ~MV_MODE_UNGUARDED;
    if (!(mode & MV_MODE_USER) && w2.g_bit)
      mode2 |= MV_MODE_UNGUARDED;
    b->mode &= (uint8_t)(mode2 | ~MV_MODE_UNGUARDED); /* as guarded as the weaker one */
    uint64_t vpage2 = (rip | 0xfff) + 1;
    b->codepage2 = mv_cache_codepage(d, vpage2, gpa2, mode2);
    unsigned priv = mode & MV_MODE_USER ? MV_PRIV_USER : MV_PRIV_KERNEL;
    d->itlb[priv][(vpage2 >> 12) & (MV_ITLB_SIZE - 1)] = b->codepage2;
    mv_translate(d, b, bytes, avail, w2.hva);
    b->gpa2 = gpa2;
  }
  x->nblocks++;
  uint32_t h = block_hash(rip, b->gpa);
  b->hash_next = x->hash[h];
  x->hash[h] = id;
  uint64_t gpa, len;
  page_enlist(d, b->gpa, b->crosses ? avail : b->guest_len, id, 0);
  if (other_page(b, &gpa, &len))
    page_enlist(d, gpa, len, id, 1);
  else if (len)
    page_of(d, gpa)->mask |= mask_of(gpa & 0xfff, len);
  d->vcpu->stats.translated_blocks++;
  d->vcpu->stats.translated_insns += b->ninsns;
  return id;
}

/* A found block's second page must be the one mapped now. */
static bool second_page_matches(struct mv_dbt *d, const struct mv_block *b) {
  struct mv_walk w;
  if (!b->crosses)
    return true;
  if (second_page(d, b->rip, &w))
    return false;
  if ((w.gpa & ~0xfffull) != b->gpa2)
    return false;
  unsigned priv = b->mode & MV_MODE_USER ? MV_PRIV_USER : MV_PRIV_KERNEL;
  d->itlb[priv][(((b->rip | 0xfff) + 1) >> 12) & (MV_ITLB_SIZE - 1)] = b->codepage2;
  return true;
}

uint32_t mv_cache_get(struct mv_dbt *d, uint64_t rip, enum mv_variant variant) {
  struct mv_dbt_exec *x = d->exec;
  struct mv_walk w;
  if (mv_mmu_walk(d, rip, MV_ACC_X, d->cpl == 3, &w))
    return 0;
  if (!w.hva) {
    mv_dbt_raise_code(d, MV_EXC_GP, 0);
    return 0;
  }
  unsigned mode = x->mode;
  if (!(mode & MV_MODE_USER) && w.g_bit)
    mode |= MV_MODE_UNGUARDED;
  if (w.large)
    mv_mmu_note_large_code(d, rip);
  uint64_t vpage = rip & ~0xfffull, ppage = w.gpa & ~0xfffull;
  if (!has_room(x))
    mv_cache_flush(d);
  uint32_t cp = mv_cache_codepage(d, vpage, ppage, mode);
  unsigned priv = mode & MV_MODE_USER ? MV_PRIV_USER : MV_PRIV_KERNEL;
  d->itlb[priv][(vpage >> 12) & (MV_ITLB_SIZE - 1)] = cp;
  uint32_t id = find(x, rip, w.gpa, mode, variant);
  if (!id && mode & MV_MODE_UNGUARDED) /* it may end in a guarded page          */
    id = find(x, rip, w.gpa, mode & ~MV_MODE_UNGUARDED, variant);
  if (id && second_page_matches(d, &x->blocks[id]))
    return id;
  if (id)
    mv_cache_invalidate(d, id);
  return translate(d, rip, &w, mode, variant, cp);
}
