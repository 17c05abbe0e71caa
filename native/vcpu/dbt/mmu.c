/*
 * Guest memory by virtual address: page walk (SDM 3A §4.5), software TLB,
 * accesses by C.
 *
 * The TLB has an array a privilege, direct mapped by page number. A tag equals
 * the page's address for reads and for writes apart: no write tag while the
 * page-table entry is not dirty, is read-only, or the page holds translated
 * code, so that such writes come to mv_slow_mem(). Only RAM is in it.
 */
#include <errno.h>
#include <stdlib.h>

#include "cache.h"
#include "system.h"

#define PTE_P    1ull
#define PTE_W    2ull
#define PTE_U    4ull
#define PTE_A    0x20ull
#define PTE_D    0x40ull
#define PTE_PS   0x80ull
#define PTE_G    0x100ull
#define PTE_NX   (1ull << 63)
#define PTE_ADDR 0x000ffffffffff000ull

enum { PF_P = 1, PF_W = 2, PF_U = 4, PF_RSVD = 8, PF_I = 16 };
enum { CR0_WP = 1 << 16, CR4_PAE = 1 << 5, CR4_PGE = 1 << 7, CR4_SMEP = 1 << 20 };
#define CR0_PG   (1ull << 31)
#define EFER_LME (1ull << 8)
#define EFER_NXE (1ull << 11)

/* What mv_tlb_entry.global holds. */
enum { ENTRY_GLOBAL = 1, ENTRY_LARGE = 2 };

#define LIST_MAX (2 * MV_TLB_SIZE)
struct mv_dbt_mmu {
  /* Entries to drop at a MOV CR3: non-global ones filled since the last. */
  uint16_t filled[MV_PRIV_COUNT][LIST_MAX];
  unsigned nfilled[MV_PRIV_COUNT];
  /* Addresses covered by large pages, user and kernel half, of the TLB and of code that was
   * fetched: INVLPG there must look at every entry. Code is kept beyond TLB flushes. */
  struct mv_large {
    uint64_t lo[2], hi[2];
  } large, large_code;
};

/* A tag that no address of entry `index` can match: its index bits differ. */
static uint64_t tlb_no_tag(unsigned index) {
  return 1ull << 63 | (uint64_t)(index ^ 1) << 12;
}

uint8_t *mv_mmu_ram(struct mv_dbt *d, uint64_t gpa, unsigned *slot) {
  const struct mv_mem *mem = &d->vm->mem;
  for (unsigned i = 0; i < mem->nslots; i++) {
    uint64_t off = gpa - mem->slot[i].gpa;
    if (off < mem->slot[i].size) {
      if (slot)
        *slot = i;
      return mem->slot[i].hva + off;
    }
  }
  return NULL;
}

/* ======================= TLB ============================================ */

static void entry_drop(struct mv_dbt *d, unsigned priv, unsigned i) {
  struct mv_tlb_entry *e = &d->tlb[priv][i];
  e->tag_r = e->tag_w = tlb_no_tag(i);
}

static void large_clear(struct mv_large *l) {
  l->lo[0] = l->lo[1] = ~0ull;
  l->hi[0] = l->hi[1] = 0;
}

static void large_note(struct mv_large *l, uint64_t gva) {
  unsigned half = gva >> 63;
  if (gva < l->lo[half])
    l->lo[half] = gva;
  if (gva > l->hi[half])
    l->hi[half] = gva;
}

/* May a large page around gva be noted? It has at most 1 GiB. */
static bool large_near(const struct mv_large *l, uint64_t gva) {
  unsigned half = gva >> 63;
  return (gva | 0x3fffffff) >= l->lo[half] && (gva & ~0x3fffffffull) <= l->hi[half];
}

void mv_mmu_note_large_code(struct mv_dbt *d, uint64_t gva) {
  large_note(&d->mmu->large_code, gva);
}

void mv_mmu_tlb_fill(struct mv_dbt *d, uint64_t gva, bool user, const struct mv_walk *w) {
  unsigned priv = user ? MV_PRIV_USER : MV_PRIV_KERNEL;
  unsigned i = (gva >> 12) & (MV_TLB_SIZE - 1);
  struct mv_tlb_entry *e = &d->tlb[priv][i];
  struct mv_dbt_mmu *m = d->mmu;
  uint64_t page = gva & ~0xfffull;
  if (d->vm->dbt.no_tlb)
    return;
  e->tag_r = page;
  bool writes = w->writable && w->dirty && !mv_cache_is_code(d, w->gpa);
  e->tag_w = writes ? page : tlb_no_tag(i);
  if (writes)
    mv_cache_note_write_tag(d, w->gpa);
  e->hva = (uint64_t)(uintptr_t)w->hva;
  e->global = (w->global ? ENTRY_GLOBAL : 0) | (w->large ? ENTRY_LARGE : 0);
  if (w->large)
    large_note(&m->large, page);
  if (!w->global && m->nfilled[priv] < LIST_MAX)
    m->filled[priv][m->nfilled[priv]++] = (uint16_t)i;
  d->vcpu->stats.tlb_misses++;
}

static void forget_last_pages(struct mv_dbt *d) {
  struct mv_last_page *l = &d->last[0][0][0];
  for (unsigned i = 0; i < sizeof d->last / sizeof *l; i++)
    l[i] = (struct mv_last_page){MV_NO_PAGE, MV_NO_HVA};
}

void mv_mmu_protect(struct mv_dbt *d, uint64_t gpa) {
  forget_last_pages(d);
  uint64_t hva = (uint64_t)(uintptr_t)mv_mmu_ram(d, gpa & ~0xfffull, NULL);
  for (unsigned p = 0; p < MV_PRIV_COUNT; p++)
    for (unsigned i = 0; i < MV_TLB_SIZE; i++)
      if (d->tlb[p][i].hva == hva)
        d->tlb[p][i].tag_w = tlb_no_tag(i);
}

void mv_mmu_flush_all(struct mv_dbt *d) {
  forget_last_pages(d);
  for (unsigned p = 0; p < MV_PRIV_COUNT; p++) {
    for (unsigned i = 0; i < MV_TLB_SIZE; i++)
      entry_drop(d, p, i);
    d->mmu->nfilled[p] = 0;
  }
  large_clear(&d->mmu->large);
  mv_cache_forget_mappings(d);
  mv_cache_verify_global(d, ~0ull);
}

void mv_mmu_flush_nonglobal(struct mv_dbt *d) {
  struct mv_dbt_mmu *m = d->mmu;
  if (!(d->cr4 & CR4_PGE)) { /* then there are no global pages                 */
    mv_mmu_flush_all(d);
    return;
  }
  forget_last_pages(d);
  for (unsigned p = 0; p < MV_PRIV_COUNT; p++) {
    if (m->nfilled[p] < LIST_MAX) {
      for (unsigned k = 0; k < m->nfilled[p]; k++) {
        unsigned i = m->filled[p][k];
        if (!(d->tlb[p][i].global & ENTRY_GLOBAL))
          entry_drop(d, p, i);
      }
    } else {
      for (unsigned i = 0; i < MV_TLB_SIZE; i++)
        if (!(d->tlb[p][i].global & ENTRY_GLOBAL))
          entry_drop(d, p, i);
    }
    m->nfilled[p] = 0;
  }
  mv_cache_forget_mappings(d);
}

void mv_mmu_flush_page(struct mv_dbt *d, uint64_t gva) {
  forget_last_pages(d);
  uint64_t page = gva & ~0xfffull;
  unsigned i = (gva >> 12) & (MV_TLB_SIZE - 1);
  bool large = large_near(&d->mmu->large, gva);
  bool large_code = large || large_near(&d->mmu->large_code, gva);
  for (unsigned p = 0; p < MV_PRIV_COUNT; p++) {
    if (d->tlb[p][i].tag_r == page)
      entry_drop(d, p, i);
    for (unsigned k = 0; large && k < MV_TLB_SIZE; k++)
      if (d->tlb[p][k].global & ENTRY_LARGE && (d->tlb[p][k].tag_r ^ gva) >> 30 == 0)
        entry_drop(d, p, k);
  }
  mv_cache_forget_mapping(d, gva, large_code);
  mv_cache_verify_global(d, large_code ? ~0ull : page);
}

int mv_mmu_init(struct mv_dbt *d) {
  d->mmu = calloc(1, sizeof *d->mmu);
  if (!d->mmu)
    return -ENOMEM;
  large_clear(&d->mmu->large);
  large_clear(&d->mmu->large_code);
  for (unsigned p = 0; p < MV_PRIV_COUNT; p++)
    for (unsigned i = 0; i < MV_TLB_SIZE; i++)
      entry_drop(d, p, i);
  forget_last_pages(d);
  return 0;
}

void mv_mmu_destroy(struct mv_dbt *d) {
  free(d->mmu);
}

/* ======================= page walk ====================================== */

static bool canonical(uint64_t gva) {
  return (int64_t)(gva << 16) >> 16 == (int64_t)gva;
}

/* Loads an entry and sets its accessed (and dirty) bit. NULL: not in RAM. */
static uint64_t *entry_at(struct mv_dbt *d, uint64_t table, unsigned index) {
  return (uint64_t *)mv_mmu_ram(d, (table & PTE_ADDR) + index * 8, NULL);
}

static int fault(struct mv_dbt *d, uint64_t gva, unsigned access, bool user, unsigned code) {
  if (access & MV_ACC_W)
    code |= PF_W;
  if (user)
    code |= PF_U;
  if (access & MV_ACC_X && (d->efer & EFER_NXE || d->cr4 & CR4_SMEP))
    code |= PF_I;
  return mv_dbt_raise_pf(d, gva, code);
}

static int walk_unpaged(struct mv_dbt *d, uint64_t gva, struct mv_walk *out) {
  *out = (struct mv_walk){.gpa = (uint32_t)gva, .writable = true, .dirty = true};
  out->hva = mv_mmu_ram(d, out->gpa & ~0xfffull, NULL);
  return 0;
}

/* Marks the entries of a walk accessed, the last one dirty. */
static void mark(uint64_t *const *path, unsigned n, bool dirty) {
  for (unsigned i = 0; i < n; i++) {
    uint64_t bits = PTE_A | (dirty && i == n - 1 ? PTE_D : 0);
    if ((*path[i] & bits) != bits)
      __atomic_or_fetch(path[i], bits, __ATOMIC_RELAXED);
  }
}

int mv_mmu_walk(struct mv_dbt *d, uint64_t gva, unsigned access, bool user, struct mv_walk *out) {
  if (!(d->cr0 & CR0_PG))
    return walk_unpaged(d, gva, out);
  if (!canonical(gva))
    return mv_dbt_raise_code(d, MV_EXC_GP, 0);
  uint64_t *path[4], rights = PTE_W | PTE_U, nx = 0, pte = d->cr3;
  unsigned n = 0, shift = 39;
  uint64_t reserved = (PTE_ADDR & ~d->sys->phys_mask) | (d->efer & EFER_NXE ? 0 : PTE_NX);
  for (;; shift -= 9) {
    path[n] = entry_at(d, pte, (gva >> shift) & 511);
    if (!path[n]) /* a table outside RAM reads as zeros: not present          */
      return fault(d, gva, access, user, 0);
    pte = __atomic_load_n(path[n++], __ATOMIC_RELAXED);
    if (!(pte & PTE_P))
      return fault(d, gva, access, user, 0);
    if (pte & reserved || (shift == 39 && pte & PTE_PS))
      return fault(d, gva, access, user, PF_P | PF_RSVD);
    rights &= pte;
    nx |= pte & PTE_NX;
    if (shift == 12 || pte & PTE_PS)
      break;
  }
  bool writable = rights & PTE_W || (!user && !(d->cr0 & CR0_WP));
  bool allowed = (!user || rights & PTE_U) && (!(access & MV_ACC_W) || writable) &&
                 !(access & MV_ACC_X && nx) &&
                 !(access & MV_ACC_X && !user && rights & PTE_U && d->cr4 & CR4_SMEP);
  if (!allowed)
    return fault(d, gva, access, user, PF_P);
  mark(path, n, access & MV_ACC_W);
  uint64_t size_mask = (1ull << shift) - 1;
  out->gpa = (pte & PTE_ADDR & ~size_mask) | (gva & size_mask);
  out->writable = writable;
  out->g_bit = pte & PTE_G;
  out->global = out->g_bit && d->cr4 & CR4_PGE;
  out->dirty = pte & PTE_D || access & MV_ACC_W;
  out->large = shift > 12;
  out->hva = mv_mmu_ram(d, out->gpa & ~0xfffull, NULL);
  return 0;
}

int mv_mmu_translate(struct mv_dbt *d, uint64_t gva, unsigned access, enum mv_mmu_as as,
                     uint64_t *gpa) {
  struct mv_walk w;
  if (mv_mmu_walk(d, gva, access, as == MV_AS_CPL && d->cpl == 3, &w))
    return -1;
  *gpa = w.gpa;
  return 0;
}

/* ======================= accesses by C ================================== */

/* Host address of a byte for C, or NULL with *w filled (MMIO, code page), or
 * *failed set and an exception raised. */
static uint8_t *host_of(struct mv_dbt *d, uint64_t gva, unsigned access, bool user,
                        struct mv_walk *w, bool *failed) {
  struct mv_tlb_entry *e =
      &d->tlb[user ? MV_PRIV_USER : MV_PRIV_KERNEL][(gva >> 12) & (MV_TLB_SIZE - 1)];
  uint64_t page = gva & ~0xfffull;
  *failed = false;
  if ((access & MV_ACC_W ? e->tag_w : e->tag_r) == page)
    return (uint8_t *)(uintptr_t)(e->hva + (gva & 0xfff));
  if (mv_mmu_walk(d, gva, access, user, w)) {
    *failed = true;
    return NULL;
  }
  if (!w->hva)
    return NULL;
  if (d->cr0 & CR0_PG || !(gva >> 32))
    mv_mmu_tlb_fill(d, gva, user, w);
  if (access & MV_ACC_W && mv_cache_is_code(d, w->gpa))
    return NULL;
  return w->hva + (gva & 0xfff);
}

int mv_mmu_phys_rw(struct mv_dbt *d, uint64_t gpa, void *buf, unsigned len, bool write) {
  uint8_t *ram = mv_mmu_ram(d, gpa, NULL);
  if (!ram)
    return mv_dbt_mmio(d, gpa, buf, len, write);
  if (write) {
    mv_cache_written(d, gpa, len);
    __builtin_memcpy(ram, buf, len);
  } else {
    __builtin_memcpy(buf, ram, len);
  }
  return 0;
}

static int access_page(struct mv_dbt *d, uint64_t gva, void *buf, unsigned len, bool write,
                       bool user) {
  struct mv_walk w;
  bool failed;
  uint8_t *p = host_of(d, gva, write ? MV_ACC_W : MV_ACC_R, user, &w, &failed);
  if (failed)
    return -1;
  if (!p)
    return mv_mmu_phys_rw(d, w.gpa, buf, len, write);
  if (len == 8 && write)
    __builtin_memcpy(p, buf, 8); /* one move                                   */
  else if (len == 8)
    __builtin_memcpy(buf, p, 8);
  else if (write)
    __builtin_memcpy(p, buf, len);
  else
    __builtin_memcpy(buf, p, len);
  return 0;
}

static int access_virt(struct mv_dbt *d, uint64_t gva, void *buf, unsigned len, bool write,
                       enum mv_mmu_as as) {
  bool user = as == MV_AS_CPL && d->cpl == 3;
  unsigned in_page = 0x1000 - (gva & 0xfff);
  if (len <= in_page)
    return access_page(d, gva, buf, len, write, user);
  /* Across pages: all of them must allow it before a byte moves.            */
  struct mv_walk w;
  bool failed;
  for (uint64_t at = gva; at - gva < len; at = (at | 0xfff) + 1) {
    host_of(d, at, write ? MV_ACC_W : MV_ACC_R, user, &w, &failed);
    if (failed)
      return -1;
  }
  for (unsigned done = 0; done < len;) {
    unsigned n = 0x1000 - ((gva + done) & 0xfff);
    if (n > len - done)
      n = len - done;
    if (access_page(d, gva + done, (uint8_t *)buf + done, n, write, user))
      return -1;
    done += n;
  }
  return 0;
}

int mv_mmu_read(struct mv_dbt *d, uint64_t gva, void *buf, unsigned len, enum mv_mmu_as as) {
  return access_virt(d, gva, buf, len, false, as);
}
int mv_mmu_write(struct mv_dbt *d, uint64_t gva, const void *buf, unsigned len, enum mv_mmu_as as) {
  return access_virt(d, gva, (void *)(uintptr_t)buf, len, true, as);
}

uint8_t *mv_mmu_host(struct mv_dbt *d, uint64_t gva, unsigned access, bool *failed) {
  struct mv_walk w;
  return host_of(d, gva, access, d->cpl == 3, &w, failed);
}
