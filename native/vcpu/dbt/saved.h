/*
 * Translations kept between starts.
 *
 * A kernel runs the same code at every boot, so what one guest translated the
 * next one can have. Blocks are kept in a file, each as a record that depends
 * on nothing but itself: guest bytes, host code, and where in the host code
 * numbers of this run (sites, links, cold stubs) stand.
 *
 * A record is believed only if the guest's bytes are what they were, and the
 * file only if its key (program, CPU, features), its sum and its owner are
 * right. What is not in it is translated as ever and, at the end, added.
 */
#ifndef MV_SAVED_H
#define MV_SAVED_H

#include "cache.h"

enum mv_reloc_kind {
  MV_RELOC_COLD, /* rel32 in the hot part; value: offset in the cold part     */
  MV_RELOC_HOT,  /* rel32 in the cold part; value: offset in the hot part     */
  MV_RELOC_SITE, /* imm32; value: index among the block's sites               */
  MV_RELOC_LINK, /* imm32; value: slot of mv_block.out                        */
};
struct mv_reloc {
  uint16_t at; /* offset in the hot or the cold part                          */
  uint16_t value;
  uint8_t kind; /* enum mv_reloc_kind                                         */
  bool cold;    /* lies in the cold part                                      */
};

/* A record; behind it, each padded to 8 bytes: guest bytes, peeked bytes, hot
 * and cold code, instruction map, sites, relocations, decoded instruction. */
struct mv_saved_block {
  uint64_t rip, peek_rip;
  uint32_t next; /* in the same bucket: offset in the file / 8, or 0           */
  uint32_t size; /* of it all, bytes                                          */
  uint16_t mode, guest_len, peek_len, hot_len, cold_len, nrelocs;
  uint8_t ninsns, nsites, has_helper, peek_elsewhere;
  struct {
    uint64_t rip;
    uint16_t used, patch, stub, pad; /* offsets in the hot, the cold part     */
  } out[2];
};

/* A block that was just translated, as saved.c needs it. */
struct mv_fresh {
  struct mv_block *b;
  const uint8_t *guest, *peek;
  uint64_t peek_rip;
  uint32_t cold; /* where its cold part begins                               */
  uint32_t cold_end, site;
  unsigned nsites, nrelocs;
  bool has_helper;
  const struct mv_reloc *reloc;
};

struct mv_saved;

/* Opens what was kept at `path` (it may be missing or unfit: then nothing is
 * there yet). 0 or -ENOMEM. */
int mv_saved_open(struct mv_saved **out, struct mv_dbt *d, const char *path);
/* Writes the file anew if enough was added, and frees it all. */
void mv_saved_close(struct mv_saved *s);
/* The record for code at `rip` whose bytes are [guest, guest + avail), or NULL.
 * Peeked bytes are the caller's to compare. */
const struct mv_saved_block *mv_saved_find(struct mv_saved *s, uint64_t rip, unsigned mode,
                                           const uint8_t *guest, unsigned avail);
/* The peeked bytes of a record. */
const uint8_t *mv_saved_peeked(const struct mv_saved_block *r);
/* Puts a record's code into the cache as block `b` (rip, gpa, mode, codepage
 * are set). */
void mv_saved_revive(struct mv_dbt *d, const struct mv_saved_block *r, struct mv_block *b);
void mv_saved_add(struct mv_saved *s, struct mv_dbt *d, const struct mv_fresh *f);
/* Mode as records are keyed by it: with what else translation depends on. */
static inline unsigned mv_saved_mode(const struct mv_dbt *d, unsigned mode) {
  return mode | (unsigned)d->exec->tsd << 8;
}
/* Equality without vector registers or a call. */
bool mv_same_bytes(const uint8_t *a, const uint8_t *b, unsigned n);

#endif
