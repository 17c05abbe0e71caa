/*
 * The code cache: translated blocks, how they are found, linked and thrown
 * away.
 *
 * Code lies in one memfd that is mapped twice, once writable and once
 * executable. The hot part of blocks grows from its start, their cold stubs
 * from its middle. There is no freeing of single blocks: when it is full, all
 * goes (`code_flushes`).
 *
 * A block is keyed by guest physical address, RIP, mode and variant. Several
 * address spaces that map the same page at the same place share its blocks.
 * Whether the page at a virtual address *is* still that page is checked
 *   - by a guard in the block's entry, for user pages: the number of the
 *     mapping (struct mv_codepage) is compared with the one seen there now
 *     (mv_dbt.itlb, emptied by TLB flushes);
 *   - not at all for global kernel pages, which CR3 writes do not change:
 *     flushes of global pages verify them (mv_cache_verify_global).
 */
#ifndef MV_CACHE_H
#define MV_CACHE_H

#include <pthread.h>

#include "dbt.h"

/* What translated code depends on beside its bytes. */
enum {
  MV_MODE_USER = 1 << 0,
  MV_MODE_NOFPU = 1 << 1,     /* CR0.TS or EM: x87/SSE raise #NM (#UD for EM)     */
  MV_MODE_NOSSE = 1 << 2,     /* CR4.OSFXSR clear                                */
  MV_MODE_NOAVX = 1 << 3,     /* OSXSAVE or XCR0.AVX clear                       */
  MV_MODE_NOT64 = 1 << 4,     /* not 64-bit code: cannot run it                  */
  MV_MODE_UNGUARDED = 1 << 5, /* of the block's page                          */
};
/* Kinds of translation of the same guest code; bits. 0 is the usual one. */
enum mv_variant {
  MV_VAR_NORMAL = 0,
  MV_VAR_SINGLE = 1, /* one instruction, a check an access                   */
  MV_VAR_BOUNCE = 2, /* memory operands in d->bounce, with SINGLE            */
  MV_VAR_STEP = 4,   /* its exits are never linked, with SINGLE              */
};

struct mv_link {
  uint32_t patch;  /* offset of the rel32 in the hot part                    */
  uint32_t stub;   /* offset of the stub that calls MV_TRAMP_LINK            */
  uint32_t target; /* block, or 0: not linked                                */
  uint32_t next;   /* next link into the same target: block << 1 | slot      */
  uint64_t rip;    /* guest address of the target                            */
};

struct mv_block {
  uint64_t rip, gpa, gpa2; /* gpa2: page of the bytes past the first page, if it crosses */
  uint64_t peek_gpa;       /* bytes that were looked at for the flags they read (plan.c) */
  uint16_t peek_len;
  uint32_t code, code_end; /* offsets in the cache                           */
  uint32_t guarded_entry;  /* 0: not made yet                                */
  uint32_t indirect_entry; /* 0: not made yet                                */
  uint32_t codepage, codepage2;
  uint32_t map; /* first of ninsns entries of mv_dbt_exec.map               */
  uint16_t guest_len;
  uint8_t ninsns, variant;
  uint8_t mode;
  bool dead, crosses; /* crosses: its instruction lies on two pages          */
  uint8_t failures;   /* of coalesced checks                                   */
  uint32_t hash_next, page_next[2];
  uint32_t links_in; /* list of links into this block                        */
  struct mv_link out[2];
};

/* Where the code of an instruction begins. */
struct mv_insn_map {
  uint32_t code; /* offset in the cache                                      */
  uint16_t guest;
};

enum { MV_SITE_COALESCED = 1, MV_SITE_STACK = 2 /* through SS: #SS, not #GP */ };
/* A place in translated code that calls C about an instruction. */
struct mv_site {
  uint32_t block;
  uint32_t restart; /* code offset to run (again) when C is done             */
  uint16_t guest;   /* offset of the instruction in the block                */
  uint16_t size;    /* bytes of memory                                       */
  uint8_t access, flags, insn;
  uint8_t align;   /* what the instruction demands of the address, or 0       */
  uint32_t helper; /* MV_TRAMP_INSN: index of the decoded instruction          */
};

/* One guest page of code as seen at one virtual address. */
struct mv_codepage {
  uint64_t vpage, ppage;
  uint32_t mode; /* with MV_MODE_UNGUARDED if so                             */
  uint32_t next;
};

/* Blocks in a page of guest RAM. */
struct mv_physpage {
  uint64_t mask;  /* bit i: bytes [64 i, 64 i + 64) were translated          */
  uint32_t block; /* first, then mv_block.page_next                          */
  bool written;   /* the TLB may have a write tag for it                      */
};

#define MV_BLOCK_HASH_BITS    15
#define MV_CODEPAGE_HASH_BITS 12
#define MV_BLOCK_INSNS_MAX    32
#define MV_BLOCK_ROOM         (16u << 10) /* the most that one block may emit, each part */

enum { MV_ONCE_OFF, MV_ONCE_ARMED, MV_ONCE_DONE };

struct mv_saved;

struct mv_dbt_exec {
  /* the cache's memory */
  uint8_t *rw, *rx;
  uint64_t size;
  uint32_t hot, cold;             /* offsets of the free parts                           */
  uint32_t hot_ready, cold_ready; /* up to here the cache's pages are there   */
  struct mv_block *blocks;
  uint32_t nblocks, max_blocks;
  struct mv_site *sites;
  uint32_t nsites, max_sites;
  struct mv_insn *helpers; /* decoded instructions that C executes            */
  uint32_t nhelpers, max_helpers;
  struct mv_insn_map *map;
  uint32_t nmap, max_map;
  struct mv_codepage *codepages;
  uint32_t ncodepages, max_codepages;
  uint64_t global_lo, global_hi; /* pages with unguarded code lie within      */
  uint32_t *hash, *codepage_hash;
  struct mv_physpage *pages[MV_MEM_SLOTS_MAX]; /* one array a memory slot     */

  struct mv_saved *saved; /* translations of earlier starts, or NULL          */

  uint32_t mode; /* MV_MODE_* now, without UNGUARDED                          */
  bool tsd;      /* CR4.TSD, which code is translated for                     */
  /* Changes when a block is invalidated, and when the code at RIP may be another's
   * than it was: mode, mappings. Links of a block do not hold over that.      */
  uint64_t epoch;

  /* exec.c's */
  struct mv_exit_info *exit;
  bool irq_waits;   /* when IF is set: look whether one waits               */
  bool stepping;    /* a MV_VAR_STEP block runs                               */
  uint8_t once;     /* MV_ONCE_*: mv_dbt_step()                               */
  bool step_trap;   /* with TF: #DB follows                                   */
  bool next_single; /* the next block translated checks each access           */
  uint8_t *fpu;     /* XSAVE image, 64-byte aligned                           */
  uint64_t fpu_mask;
  unsigned fpu_size;
  uint64_t bounce_gva;
  void *alt_stack; /* signal.c's                                              */
  /* Someone wants the vCPU to look at interrupts, or to come out; a futex.   */
  _Atomic uint32_t poked;
  atomic_bool kicked;
  struct mv_dbt_signal {
    uint64_t code, addr; /* host RIP, si_addr                                  */
    int trap, signal;
  } sig;
  /* Ranges of RAM that devices wrote over translated code.                   */
  pthread_mutex_t dma_lock;
  unsigned ndma;
  bool dma_all; /* too many: drop everything                                  */
  struct mv_dma_range {
    uint64_t gpa, len;
  } dma[64];
};

struct mv_walk;

int mv_cache_init(struct mv_dbt *d);
void mv_cache_destroy(struct mv_dbt *d);
/* The block for RIP in the current mode and address space, translated if need
 * be; 0 with an exception raised if RIP cannot be fetched. */
uint32_t mv_cache_get(struct mv_dbt *d, uint64_t rip, enum mv_variant variant);
/* Throws everything away. */
void mv_cache_flush(struct mv_dbt *d);
/* Guest RAM [gpa, gpa+len) changes: drops blocks made of these bytes. */
void mv_cache_written(struct mv_dbt *d, uint64_t gpa, uint64_t len);
/* Does the page hold translated code? Such a page gets no write tag. */
bool mv_cache_is_code(struct mv_dbt *d, uint64_t gpa);
/* The TLB has a write tag for a page. */
void mv_cache_note_write_tag(struct mv_dbt *d, uint64_t gpa);
/* Does a range of RAM? Any thread: a hint that is right for what was translated
 * before the range was written. */
bool mv_cache_any_code(struct mv_dbt *d, uint64_t gpa, uint64_t len);
/* Mappings of global pages may have changed (gva: of this page; ~0: of all). */
void mv_cache_verify_global(struct mv_dbt *d, uint64_t gva);
/* Forget which guarded pages are mapped where: all; the page (or, if large,
 * the 1 GiB) around gva. */
void mv_cache_forget_mappings(struct mv_dbt *d);
void mv_cache_forget_mapping(struct mv_dbt *d, uint64_t gva, bool large);
/* Forget who jumps where, after a change of mode. */
void mv_cache_forget_jumps(struct mv_dbt *d);
void mv_cache_invalidate(struct mv_dbt *d, uint32_t block);
/* The number of (virtual page, physical page, mode). 0: table full. */
uint32_t mv_cache_codepage(struct mv_dbt *d, uint64_t vpage, uint64_t ppage, uint32_t mode);
/* Is RIP in a global kernel page of RAM? Fills *w; raises nothing. */
bool mv_cache_probe_global(struct mv_dbt *d, uint64_t rip, struct mv_walk *w);
/* Entry for indirect jumps to a block; for direct jumps from another page. */
uint32_t mv_cache_indirect_entry(struct mv_dbt *d, uint32_t block);
uint32_t mv_cache_guarded_entry(struct mv_dbt *d, uint32_t block);
void mv_cache_link(struct mv_dbt *d, uint32_t from, unsigned slot, uint32_t to);

/* translate.c: fills `b` (rip, gpa, mode, variant set) and emits its code.
 * bytes[0..avail) is what is left of the page, then of the next page (avail2;
 * only for an instruction that crosses). 0; -ENOSPC: the cache is full;
 * 1: the second page is needed but absent (fetch it). */
int mv_translate(struct mv_dbt *d, struct mv_block *b, const uint8_t *bytes, unsigned avail,
                 const uint8_t *bytes2);
/* entries of blocks, in the cold part: see translate.c */
uint32_t mv_emit_indirect_entry(struct mv_dbt *d, struct mv_block *b);
uint32_t mv_emit_guarded_entry(struct mv_dbt *d, struct mv_block *b);

/* enter.S */
void mv_dbt_enter(struct mv_dbt *d, const void *code);
extern const char mv_dbt_leave[], mv_jump_kernel[], mv_jump_user[];
extern const char mv_tramp_mem[], mv_tramp_link[], mv_tramp_indirect[], mv_tramp_guard[],
    mv_tramp_insn[], mv_tramp_raise[], mv_tramp_bounce_in[], mv_tramp_bounce_out[],
    mv_tramp_signal[];
/* exec.c, called from enter.S: arg is what translated code left in T1; they
 * return the code to go on with. */
const void *mv_slow_mem(struct mv_dbt *d, uint32_t site);
const void *mv_slow_link(struct mv_dbt *d, uint32_t link);
const void *mv_slow_indirect(struct mv_dbt *d, uint32_t arg);
const void *mv_slow_guard(struct mv_dbt *d, uint32_t block);
const void *mv_slow_insn(struct mv_dbt *d, uint32_t site);
const void *mv_slow_raise(struct mv_dbt *d, uint32_t arg);
const void *mv_slow_bounce_in(struct mv_dbt *d, uint32_t site);
const void *mv_slow_bounce_out(struct mv_dbt *d, uint32_t site);
const void *mv_slow_signal(struct mv_dbt *d, uint32_t arg);

/* mmu.c, for the slow paths */
struct mv_walk {
  uint64_t gpa;
  bool writable, dirty, large;
  bool global;  /* kept by MOV CR3: CR4.PGE is set and the entry's G            */
  bool g_bit;   /* the entry's G alone                                         */
  uint8_t *hva; /* of the page, or NULL: not RAM                             */
};
/* Walks for an access; 0 or -1 with the exception raised. */
int mv_mmu_walk(struct mv_dbt *d, uint64_t gva, unsigned access, bool user, struct mv_walk *out);
void mv_mmu_tlb_fill(struct mv_dbt *d, uint64_t gva, bool user, const struct mv_walk *w);
/* Code was fetched through a large page: INVLPG anywhere in it concerns it. */
void mv_mmu_note_large_code(struct mv_dbt *d, uint64_t gva);
/* A page became, or ceased to be, code: writes through the TLB stop. */
void mv_mmu_protect(struct mv_dbt *d, uint64_t gpa);
int mv_mmu_init(struct mv_dbt *d);
void mv_mmu_destroy(struct mv_dbt *d);
/* Host address of RAM page, or NULL; `slot` out may be NULL. */
uint8_t *mv_mmu_ram(struct mv_dbt *d, uint64_t gpa, unsigned *slot);
/* Physical accesses by C, MMIO included. */
int mv_mmu_phys_rw(struct mv_dbt *d, uint64_t gpa, void *buf, unsigned len, bool write);

/* Host address of a guest byte at the current privilege, good to the page's
 * end; NULL: not plain RAM (go through mv_mmu_read/write), or *failed with an
 * exception raised. */
uint8_t *mv_mmu_host(struct mv_dbt *d, uint64_t gva, unsigned access, bool *failed);
/* exec.c: an access outside RAM. */
int mv_dbt_mmio(struct mv_dbt *d, uint64_t gpa, void *buf, unsigned len, bool write);

/* string.c */
int mv_string_exec(struct mv_dbt *d, const struct mv_insn *insn);
/* exec_insn.c: instructions of class VSIB, XSAVE, MASKED and other rare ones. */
int mv_insn_exec(struct mv_dbt *d, const struct mv_insn *insn);
/* Segment base + effective address of the ModRM memory operand. */
uint64_t mv_insn_ea(struct mv_dbt *d, const struct mv_insn *insn);

#endif
