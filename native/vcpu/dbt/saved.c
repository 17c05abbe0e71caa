/*
 * Translations kept between starts: see saved.h.
 *
 * The file is written whole, under another name, and renamed into place, so
 * that guests that end together cannot spoil it. It is read by mapping it.
 */
#define _GNU_SOURCE
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "saved.h"
#include "system.h"

#define BUCKETS    (1u << 15)
#define BYTES_MAX  (48ull << 20) /* of a file                                */
#define ADDED_MIN  (48u << 10)   /* fewer new bytes are not worth a writing  */
#define RECORD_MAX (16u << 10)

static const char magic[8] = "mvcode1";

struct file {
  char magic[8];
  uint64_t key, size, sum; /* sum: of all that follows the header             */
  uint32_t bucket[BUCKETS];
  /* records */
};

struct mv_saved {
  char *path;
  uint64_t key;
  const struct file *old; /* mapped, or NULL                                  */
  uint64_t next;          /* offset of the record after the last one found    */
  uint8_t *fresh;         /* records of this run, as they will follow         */
  uint64_t nfresh, fresh_room;
};

static unsigned pad8(unsigned n) {
  return (n + 7) & ~7u;
}

/* ======================= the key ======================================== */

static uint64_t mix(uint64_t h, uint64_t v) {
  h = (h ^ v) * 0x9e3779b97f4a7c15ull;
  return h ^ h >> 29;
}

static uint64_t sum_of(const void *data, uint64_t bytes) {
  const uint64_t *p = data;
  uint64_t a = 1, b = 2;
  for (uint64_t i = 0; i + 1 < bytes / 8; i += 2) { /* two chains, for speed   */
    a = mix(a, p[i]);
    b = mix(b, p[i + 1]);
  }
  if (bytes / 8 & 1)
    a = mix(a, p[bytes / 8 - 1]);
  return mix(a, b);
}

/* The linker's build id of the program or library that this code is in. */
static int find_build_id(struct dl_phdr_info *info, size_t size, void *out) {
  uint64_t here = (uint64_t)(uintptr_t)&find_build_id, h = 0;
  bool ours = false;
  (void)size;
  for (unsigned i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) *p = &info->dlpi_phdr[i];
    if (p->p_type == PT_LOAD && here - (info->dlpi_addr + p->p_vaddr) < p->p_memsz)
      ours = true;
    if (p->p_type != PT_NOTE)
      continue;
    const uint8_t *at = (const uint8_t *)(uintptr_t)(info->dlpi_addr + p->p_vaddr);
    const uint8_t *end = at + p->p_memsz;
    while (at + sizeof(ElfW(Nhdr)) <= end) {
      const ElfW(Nhdr) *n = (const void *)at;
      const uint8_t *desc = at + sizeof *n + ((n->n_namesz + 3) & ~3u);
      if (n->n_type == NT_GNU_BUILD_ID && n->n_namesz == 4)
        for (unsigned k = 0; k < n->n_descsz; k++)
          h = mix(h, desc[k]);
      at = desc + ((n->n_descsz + 3) & ~3u);
    }
  }
  if (ours)
    *(uint64_t *)out = h;
  return ours;
}

/* Program, CPU and offered features; 0: the program has no build id. */
static uint64_t key_of(struct mv_dbt *d) {
  uint64_t key = 0;
  dl_iterate_phdr(find_build_id, &key);
  if (!key)
    return 0;
  const struct mv_system *sys = d->sys;
  for (unsigned i = 0; i < sys->ncpuid; i++) {
    const struct kvm_cpuid_entry2 *e = &sys->cpuid[i];
    key = mix(mix(key, e->function), e->index);
    key = mix(mix(key, (uint64_t)e->eax << 32 | e->ebx), (uint64_t)e->ecx << 32 | e->edx);
  }
  return key;
}

/* ======================= reading ======================================== */

static const struct file *map_file(const char *path, uint64_t key) {
  struct stat st;
  int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
  if (fd < 0)
    return NULL;
  const struct file *f = MAP_FAILED;
  bool ours = !fstat(fd, &st) && S_ISREG(st.st_mode) && st.st_uid == geteuid() &&
              !(st.st_mode & (S_IWGRP | S_IWOTH));
  if (ours && st.st_size > (off_t)sizeof *f && st.st_size <= (off_t)BYTES_MAX)
    f = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
  close(fd);
  if (f == MAP_FAILED)
    return NULL;
  if (!__builtin_memcmp(f->magic, magic, sizeof magic) && f->key == key &&
      f->size == (uint64_t)st.st_size && f->size % 8 == 0 &&
      f->sum == sum_of(f->bucket, f->size - offsetof(struct file, bucket)))
    return f;
  munmap((void *)(uintptr_t)f, (size_t)st.st_size);
  return NULL;
}

int mv_saved_open(struct mv_saved **out, struct mv_dbt *d, const char *path) {
  *out = NULL;
  uint64_t key = key_of(d);
  if (!key)
    return 0;
  struct mv_saved *s = calloc(1, sizeof *s);
  if (!s || !(s->path = strdup(path))) {
    free(s);
    return -ENOMEM;
  }
  s->key = key;
  s->old = map_file(path, key);
  s->next = sizeof(struct file);
  *out = s;
  return 0;
}

bool mv_same_bytes(const uint8_t *a, const uint8_t *b, unsigned n) {
  uint64_t x, y;
  for (; n >= 8; n -= 8, a += 8, b += 8) {
    __builtin_memcpy(&x, a, 8);
    __builtin_memcpy(&y, b, 8);
    if (x != y)
      return false;
  }
  for (; n; n--, a++, b++)
    if (*a != *b)
      return false;
  return true;
}

static unsigned bucket_of(uint64_t rip, unsigned mode) {
  return (unsigned)(mix(rip, mode) >> 32) & (BUCKETS - 1);
}

static const uint8_t *guest_of(const struct mv_saved_block *r) {
  return (const uint8_t *)(r + 1);
}
const uint8_t *mv_saved_peeked(const struct mv_saved_block *r) {
  return guest_of(r) + pad8(r->guest_len);
}

static const struct mv_saved_block *record_at(const struct mv_saved *s, uint64_t at) {
  return (const void *)((const uint8_t *)s->old + at);
}
static bool record_fits(const struct mv_saved_block *r, uint64_t rip, unsigned mode,
                        const uint8_t *guest, unsigned avail) {
  return r->rip == rip && r->mode == mode && r->guest_len <= avail &&
         mv_same_bytes(guest_of(r), guest, r->guest_len);
}

const struct mv_saved_block *mv_saved_find(struct mv_saved *s, uint64_t rip, unsigned mode,
                                           const uint8_t *guest, unsigned avail) {
  if (!s->old)
    return NULL;
  /* Boots repeat themselves: most often it is the next record.               */
  const struct mv_saved_block *r = record_at(s, s->next);
  if (s->next < s->old->size && record_fits(r, rip, mode, guest, avail)) {
    s->next += r->size;
    return r;
  }
  for (uint32_t at = s->old->bucket[bucket_of(rip, mode)]; at; at = r->next) {
    r = record_at(s, (uint64_t)at * 8);
    if (record_fits(r, rip, mode, guest, avail)) {
      s->next = (uint64_t)at * 8 + r->size;
      return r;
    }
  }
  return NULL;
}

/* ======================= reviving ======================================= */

static void copy8(uint8_t *to, const uint8_t *from, unsigned n) {
  for (unsigned i = 0; i < n; i += 8)
    __builtin_memcpy(to + i, from + i, 8);
}

static void relocate(struct mv_dbt_exec *x, uint32_t hot, uint32_t cold, uint32_t site,
                     uint32_t block, const struct mv_reloc *r) {
  uint32_t at = (r->cold ? cold : hot) + r->at, v;
  if (r->kind == MV_RELOC_COLD)
    v = cold + r->value - (at + 4);
  else if (r->kind == MV_RELOC_HOT)
    v = hot + r->value - (at + 4);
  else
    v = r->kind == MV_RELOC_SITE ? site + r->value : block << 1 | r->value;
  __builtin_memcpy(x->rw + at, &v, 4);
}

void mv_saved_revive(struct mv_dbt *d, const struct mv_saved_block *r, struct mv_block *b) {
  struct mv_dbt_exec *x = d->exec;
  uint32_t hot = x->hot, cold = x->cold, site = x->nsites, id = (uint32_t)(b - x->blocks);
  const uint8_t *p = mv_saved_peeked(r) + pad8(r->peek_len);
  copy8(x->rw + hot, p, r->hot_len);
  p += pad8(r->hot_len);
  copy8(x->rw + cold, p, r->cold_len);
  p += pad8(r->cold_len);
  const struct mv_insn_map *map = (const void *)p;
  p += pad8(r->ninsns * (unsigned)sizeof *map);
  const struct mv_site *sites = (const void *)p;
  p += pad8(r->nsites * (unsigned)sizeof *sites);
  const struct mv_reloc *relocs = (const void *)p;
  p += pad8(r->nrelocs * (unsigned)sizeof *relocs);

  b->code = hot;
  b->code_end = hot + r->hot_len;
  b->map = x->nmap;
  b->guest_len = r->guest_len;
  b->ninsns = r->ninsns;
  for (unsigned i = 0; i < r->ninsns; i++)
    x->map[x->nmap++] = (struct mv_insn_map){.code = hot + map[i].code, .guest = map[i].guest};
  for (unsigned i = 0; i < r->nsites; i++) {
    struct mv_site *s = &x->sites[x->nsites++];
    *s = sites[i];
    s->block = id;
    s->restart += hot;
    s->helper = x->nhelpers;
  }
  if (r->has_helper)
    x->helpers[x->nhelpers++] = *(const struct mv_insn *)(const void *)p;
  for (unsigned i = 0; i < r->nrelocs; i++)
    relocate(x, hot, cold, site, id, &relocs[i]);
  for (unsigned k = 0; k < 2; k++)
    if (r->out[k].used)
      b->out[k] = (struct mv_link){
          .patch = hot + r->out[k].patch, .stub = cold + r->out[k].stub, .rip = r->out[k].rip};
  x->hot = (b->code_end + 15) & ~15u;
  x->cold = cold + r->cold_len;
}

/* ======================= adding ========================================= */

static bool reserve(struct mv_saved *s, uint64_t bytes) {
  if (s->nfresh + bytes <= s->fresh_room)
    return true;
  uint64_t old = s->old ? s->old->size : sizeof(struct file);
  if (old + s->nfresh + bytes > BYTES_MAX)
    return false;
  uint64_t room = s->fresh_room ? s->fresh_room * 2 : 1 << 20;
  uint8_t *p = realloc(s->fresh, room);
  if (!p)
    return false;
  s->fresh = p;
  s->fresh_room = room;
  return true;
}

static uint8_t *append(uint8_t *to, const void *from, unsigned n) {
  __builtin_memcpy(to, from, n);
  __builtin_memset(to + n, 0, pad8(n) - n);
  return to + pad8(n);
}

void mv_saved_add(struct mv_saved *s, struct mv_dbt *d, const struct mv_fresh *f) {
  const struct mv_dbt_exec *x = d->exec;
  const struct mv_block *b = f->b;
  if (!reserve(s, RECORD_MAX))
    return;
  struct mv_saved_block *r = (void *)(s->fresh + s->nfresh);
  *r = (struct mv_saved_block){
      .rip = b->rip,
      .peek_rip = f->peek_rip,
      .mode = (uint16_t)mv_saved_mode(d, b->mode),
      .guest_len = b->guest_len,
      .peek_len = b->peek_len,
      .hot_len = (uint16_t)(b->code_end - b->code),
      .cold_len = (uint16_t)(f->cold_end - f->cold),
      .nrelocs = (uint16_t)f->nrelocs,
      .ninsns = b->ninsns,
      .nsites = (uint8_t)f->nsites,
      .has_helper = f->has_helper,
      .peek_elsewhere = b->peek_len && (b->peek_gpa ^ b->gpa) >> 12,
  };
  for (unsigned k = 0; k < 2; k++)
    if (b->out[k].patch) {
      r->out[k].used = 1;
      r->out[k].rip = b->out[k].rip;
      r->out[k].patch = (uint16_t)(b->out[k].patch - b->code);
      r->out[k].stub = (uint16_t)(b->out[k].stub - f->cold);
    }
  uint8_t *p = append((uint8_t *)(r + 1), f->guest, b->guest_len);
  p = append(p, f->peek, b->peek_len);
  p = append(p, x->rw + b->code, r->hot_len);
  p = append(p, x->rw + f->cold, r->cold_len);
  struct mv_insn_map map[MV_BLOCK_INSNS_MAX];
  __builtin_memset(map, 0, sizeof map); /* padding, too: it goes to a file      */
  for (unsigned i = 0; i < b->ninsns; i++) {
    map[i].code = x->map[b->map + i].code - b->code;
    map[i].guest = x->map[b->map + i].guest;
  }
  p = append(p, map, b->ninsns * (unsigned)sizeof *map);
  struct mv_site *sites = (void *)p;
  p = append(p, &x->sites[f->site], f->nsites * (unsigned)sizeof *sites);
  for (unsigned i = 0; i < f->nsites; i++) {
    sites[i].restart -= b->code;
    sites[i].block = sites[i].helper = 0;
  }
  p = append(p, f->reloc, f->nrelocs * (unsigned)sizeof *f->reloc);
  if (f->has_helper)
    p = append(p, &x->helpers[x->nhelpers - 1], sizeof *x->helpers);
  r->size = (uint32_t)(p - (uint8_t *)r);
  s->nfresh += r->size;
}

/* ======================= writing ======================================== */

/* Links a record into its bucket. */
static void chain(struct file *f, uint64_t at) {
  struct mv_saved_block *r = (void *)((uint8_t *)f + at);
  uint32_t *bucket = &f->bucket[bucket_of(r->rip, r->mode)];
  r->next = *bucket;
  *bucket = (uint32_t)(at / 8);
}

static int write_whole(const char *path, const void *data, uint64_t size) {
  char temp[4096];
  int n = snprintf(temp, sizeof temp, "%s.%d.new", path, (int)getpid());
  if (n < 0 || n >= (int)sizeof temp)
    return -ENAMETOOLONG;
  int fd = open(temp, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0)
    return -errno;
  uint64_t done = 0;
  while (done < size) {
    ssize_t w = write(fd, (const uint8_t *)data + done, size - done);
    if (w <= 0)
      break;
    done += (uint64_t)w;
  }
  bool good = done == size;
  if (close(fd) || !good || rename(temp, path)) {
    unlink(temp);
    return -EIO;
  }
  return 0;
}

static void write_merged(struct mv_saved *s) {
  uint64_t kept = s->old ? s->old->size - sizeof *s->old : 0;
  uint64_t size = sizeof(struct file) + kept + s->nfresh;
  struct file *f = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (f == MAP_FAILED)
    return;
  uint8_t *records = (uint8_t *)(f + 1);
  if (s->old)
    __builtin_memcpy(records, s->old + 1, kept);
  __builtin_memcpy(records + kept, s->fresh, s->nfresh);
  for (uint64_t at = sizeof *f; at < size;) {
    chain(f, at);
    at += ((struct mv_saved_block *)(void *)((uint8_t *)f + at))->size;
  }
  __builtin_memcpy(f->magic, magic, sizeof magic);
  f->key = s->key;
  f->size = size;
  f->sum = sum_of(f->bucket, size - offsetof(struct file, bucket));
  write_whole(s->path, f, size); /* a full disk costs the next start time, no more */
  munmap(f, size);
}

void mv_saved_close(struct mv_saved *s) {
  if (!s)
    return;
  if (s->nfresh >= ADDED_MIN)
    write_merged(s);
  if (s->old)
    munmap((void *)(uintptr_t)s->old, s->old->size);
  free(s->fresh);
  free(s->path);
  free(s);
}
