/*
 * What a guest computes: ten small loads, each a fixed amount of work.
 *
 *   compute [-n REPEATS] [NAME...]
 *
 * A line of output for every repeat of every load:
 *
 *   NAME TICKS UNITS UNIT CHECK
 *
 * CHECK depends on what was computed alone, so it is the same wherever the
 * program runs: a machine that computes wrong is found out. Time is read from
 * the TSC, because the clock of a guest may be a coarse one, and lose ticks
 * (under TCG Linux may have no better clock than its timer). "begin TICKS NS"
 * and "end TICKS NS" come first and last, with CLOCK_MONOTONIC: on the host
 * they give the length of a tick, in a guest they show how far its clock, and
 * its TSC, can be trusted.
 *
 * The same static program runs on a host, in a guest's session, and as PID 1
 * of a guest that has nothing else: there it writes to the first serial port
 * itself (no driver, no interrupt), and ends the machine with a write to the
 * debug exit port of QEMU and of microvm. Linux hands it the words after "--"
 * on the kernel's command line.
 */
#define _GNU_SOURCE
#include <malloc.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/io.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>
#include <zlib.h>

#define SERIAL_DATA     0x3f8
#define SERIAL_STATUS   0x3fd
#define SERIAL_ROOM     0x20
#define DEBUG_EXIT_PORT 0xf4

#define PAGE_SIZE    4096
#define BUFFER_SIZE  (1 << 20)
#define INTS         200000
#define TREE_KEYS    50000
#define TREE_LOOKUPS 100000
#define MATRIX       320
#define CRC_PASSES   16
#define SHA_PASSES   8
#define TEXT_SIZE    (BUFFER_SIZE / 2)
#define SYSCALLS     300000
#define EXECS        100
#define ROUND_TRIPS  5000
#define FAULT_PAGES  16384
#define EXEC_STATUS  42

struct load {
  const char *name, *unit;
  uint64_t units;
  void (*prepare)(void); /* Untimed; may be NULL. */
  uint64_t (*run)(void); /* Returns the check. */
};

static int is_init;
static uint8_t buffer[BUFFER_SIZE], packed[BUFFER_SIZE], unpacked[BUFFER_SIZE];
static int ints[INTS];
static double matrix_a[MATRIX][MATRIX], matrix_b[MATRIX][MATRIX], matrix_c[MATRIX][MATRIX];

static void say(const char *text, size_t len) {
  if (!is_init) {
    (void)!write(STDOUT_FILENO, text, len);
    return;
  }
  for (size_t i = 0; i < len; i++) {
    while (!(inb(SERIAL_STATUS) & SERIAL_ROOM))
      ;
    outb((unsigned char)text[i], SERIAL_DATA);
  }
}

static _Noreturn void finish(int status) {
  if (!is_init)
    exit(status);
  outl((unsigned)status, DEBUG_EXIT_PORT);
  for (;;)
    pause();
}

static _Noreturn void fail(const char *what) {
  char line[128];
  say(line, (size_t)snprintf(line, sizeof(line), "fail %.100s\n", what));
  finish(1);
}

/* xorshift64: the same numbers everywhere. */
static uint64_t random_next(uint64_t *state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  *state ^= *state << 17;
  return *state;
}

static uint64_t mix(uint64_t sum, uint64_t value) {
  return (sum ^ value) * 0x100000001b3;
}

static void bytes_prepare(void) {
  uint64_t state = 1;
  for (size_t i = 0; i < BUFFER_SIZE; i++)
    buffer[i] = (uint8_t)random_next(&state);
}

/* --- CRC-32, a table and a byte at a time ------------------------------------------------- */

static uint32_t crc_table[256];

static void crc_prepare(void) {
  bytes_prepare();
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t crc = i;
    for (int bit = 0; bit < 8; bit++)
      crc = crc & 1 ? crc >> 1 ^ 0xedb88320 : crc >> 1;
    crc_table[i] = crc;
  }
}

static uint64_t crc_run(void) {
  uint32_t crc = ~0u;
  for (int pass = 0; pass < CRC_PASSES; pass++)
    for (size_t i = 0; i < BUFFER_SIZE; i++)
      crc = crc >> 8 ^ crc_table[(crc ^ buffer[i]) & 0xff];
  return ~crc;
}

/* --- A binary tree of nodes from malloc ---------------------------------------------------- */

struct node {
  struct node *child[2];
  uint64_t key;
};

static void tree_insert(struct node **at, uint64_t key) {
  while (*at) {
    if ((*at)->key == key)
      return;
    at = &(*at)->child[key > (*at)->key];
  }
  struct node *node = calloc(1, sizeof(*node));
  if (!node)
    fail("tree: out of memory");
  node->key = key;
  *at = node;
}

static int tree_has(const struct node *node, uint64_t key) {
  while (node && node->key != key)
    node = node->child[key > node->key];
  return node != NULL;
}

/* Keys in order go into the check. */
static uint64_t tree_free(struct node *node, uint64_t sum) {
  if (!node)
    return sum;
  sum = tree_free(node->child[0], sum);
  sum = mix(sum, node->key);
  sum = tree_free(node->child[1], sum);
  free(node);
  return sum;
}

static uint64_t tree_run(void) {
  struct node *root = NULL;
  uint64_t state = 2, found = 0;
  for (int i = 0; i < TREE_KEYS; i++)
    tree_insert(&root, random_next(&state) >> 44);
  for (int i = 0; i < TREE_LOOKUPS; i++)
    found += (uint64_t)tree_has(root, random_next(&state) >> 44);
  return tree_free(root, found);
}

/* --- qsort with a callback ----------------------------------------------------------------- */

static void ints_prepare(void) {
  uint64_t state = 3;
  for (int i = 0; i < INTS; i++)
    ints[i] = (int)random_next(&state);
}

static int ints_compare(const void *a, const void *b) {
  int x = *(const int *)a, y = *(const int *)b;
  return (x > y) - (x < y);
}

static uint64_t qsort_run(void) {
  uint64_t sum = 0;
  qsort(ints, INTS, sizeof(*ints), ints_compare);
  for (int i = 0; i < INTS; i += 64)
    sum = mix(sum, (uint32_t)ints[i]);
  return sum;
}

/* --- A naive product of matrices ----------------------------------------------------------- */

static void matrix_prepare(void) {
  uint64_t state = 4;
  for (int i = 0; i < MATRIX; i++)
    for (int j = 0; j < MATRIX; j++) {
      matrix_a[i][j] = (double)(random_next(&state) >> 40) / 1024;
      matrix_b[i][j] = (double)(random_next(&state) >> 40) / 1024;
    }
}

static uint64_t matrix_run(void) {
  uint64_t sum = 0;
  for (int i = 0; i < MATRIX; i++)
    for (int j = 0; j < MATRIX; j++) {
      double dot = 0;
      for (int k = 0; k < MATRIX; k++)
        dot += matrix_a[i][k] * matrix_b[k][j];
      matrix_c[i][j] = dot;
    }
  for (int i = 0; i < MATRIX; i++) {
    uint64_t bits;
    memcpy(&bits, &matrix_c[i][i], sizeof(bits));
    sum = mix(sum, bits);
  }
  return sum;
}

/* --- SHA-256 (FIPS 180-4) ------------------------------------------------------------------ */

static const uint32_t sha_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

static uint32_t rotate(uint32_t x, int by) {
  return x >> by | x << (32 - by);
}

static void sha_block(uint32_t state[8], const uint8_t *data) {
  uint32_t w[64];
  for (int i = 0; i < 16; i++) {
    memcpy(&w[i], data + 4 * i, 4);
    w[i] = __builtin_bswap32(w[i]);
  }
  for (int i = 16; i < 64; i++) {
    uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3;
    uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
  uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
  for (int i = 0; i < 64; i++) {
    uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
    uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + sha_k[i] + w[i];
    uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
    uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1;
    d = c, c = b, b = a, a = t1 + t2;
  }
  state[0] += a, state[1] += b, state[2] += c, state[3] += d;
  state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

/* Whole blocks, without the padding of the last: it is the rounds that are measured. */
static uint64_t sha_run(void) {
  uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                       0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  for (int pass = 0; pass < SHA_PASSES; pass++)
    for (size_t at = 0; at < BUFFER_SIZE; at += 64)
      sha_block(state, buffer + at);
  return (uint64_t)state[0] << 32 | state[1];
}

/* --- gzip there and back, by zlib ---------------------------------------------------------- */

/* Words of a small made-up language, some much more frequent than others. */
static void text_prepare(void) {
  static const char syllable[16][4] = {"ka", "lo", "min", "ter", "a",   "sul", "o",  "re",
                                       "ve", "in", "do",  "pra", "qui", "st",  "en", "u"};
  uint64_t state = 5;
  for (size_t at = 0; at < TEXT_SIZE;) {
    uint64_t pick = random_next(&state);
    uint64_t rank = pick % (1 + (pick >> 32) % 2000);
    uint64_t word = rank * 0x9e3779b97f4a7c15;
    for (uint64_t i = 0; i < 1 + rank % 4; i++, word >>= 4)
      for (const char *c = syllable[word >> 28 & 15]; *c && at < TEXT_SIZE; c++)
        buffer[at++] = (uint8_t)*c;
    if (at < TEXT_SIZE)
      buffer[at++] = pick >> 60 ? ' ' : '\n';
  }
}

static uint64_t gzip_run(void) {
  z_stream out = {.next_in = buffer, .avail_in = TEXT_SIZE};
  out.next_out = packed;
  out.avail_out = sizeof(packed);
  if (deflateInit2(&out, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) != Z_OK ||
      deflate(&out, Z_FINISH) != Z_STREAM_END)
    fail("gzip: cannot pack");
  uint64_t size = out.total_out;
  deflateEnd(&out);
  z_stream in = {.next_in = packed, .avail_in = (unsigned)size};
  in.next_out = unpacked;
  in.avail_out = sizeof(unpacked);
  if (inflateInit2(&in, 15 + 16) != Z_OK || inflate(&in, Z_FINISH) != Z_STREAM_END)
    fail("gzip: cannot unpack");
  inflateEnd(&in);
  if (memcmp(buffer, unpacked, TEXT_SIZE) != 0)
    fail("gzip: not the same after packing and unpacking");
  return size;
}

/* --- The kernel's work --------------------------------------------------------------------- */

static uint64_t syscall_run(void) {
  long first = getpid(), same = 0;
  for (int i = 0; i < SYSCALLS; i++)
    same += syscall(SYS_getpid) == first;
  return (uint64_t)same;
}

static uint64_t exec_run(void) {
  const char *self = (const char *)getauxval(AT_EXECFN);
  uint64_t right = 0;
  for (int i = 0; i < EXECS; i++) {
    int status;
    pid_t child = fork();
    if (child == 0) {
      execl(self, self, "-x", (char *)NULL);
      _exit(1);
    }
    if (child < 0 || waitpid(child, &status, 0) != child)
      fail("exec: cannot start a process");
    right += WIFEXITED(status) && WEXITSTATUS(status) == EXEC_STATUS;
  }
  return right;
}

/* Both ends on one CPU, so that each message is a switch of processes. */
static uint64_t pipe_run(void) {
  int there[2], back[2];
  cpu_set_t all, one;
  uint32_t value = 0;
  sched_getaffinity(0, sizeof(all), &all);
  CPU_ZERO(&one);
  CPU_SET((unsigned)sched_getcpu(), &one);
  sched_setaffinity(0, sizeof(one), &one);
  if (pipe(there) || pipe(back))
    fail("pipe: cannot make one");
  pid_t child = fork();
  if (child == 0) {
    close(there[1]);
    while (read(there[0], &value, sizeof(value)) == sizeof(value)) {
      value++;
      (void)!write(back[1], &value, sizeof(value));
    }
    _exit(0);
  }
  for (int i = 0; i < ROUND_TRIPS; i++)
    if (write(there[1], &value, sizeof(value)) != sizeof(value) ||
        read(back[0], &value, sizeof(value)) != sizeof(value))
      fail("pipe: broken");
  close(there[0]);
  close(there[1]);
  close(back[0]);
  close(back[1]);
  waitpid(child, NULL, 0);
  sched_setaffinity(0, sizeof(all), &all);
  return value;
}

static uint64_t fault_run(void) {
  size_t size = (size_t)FAULT_PAGES * PAGE_SIZE;
  uint64_t sum = 0;
  uint8_t *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED)
    fail("fault: out of memory");
  madvise(memory, size, MADV_NOHUGEPAGE);
  for (size_t at = 0; at < size; at += PAGE_SIZE)
    sum += ++memory[at];
  munmap(memory, size);
  return sum;
}

/* -------------------------------------------------------------------------------------------- */

static const struct load loads[] = {
    {"crc32", "byte", CRC_PASSES *BUFFER_SIZE, crc_prepare, crc_run},
    {"tree", "operation", TREE_KEYS + TREE_LOOKUPS, NULL, tree_run},
    {"qsort", "element", INTS, ints_prepare, qsort_run},
    {"matmul", "multiply-add", MATRIX *MATRIX *MATRIX, matrix_prepare, matrix_run},
    {"sha256", "byte", SHA_PASSES *BUFFER_SIZE, bytes_prepare, sha_run},
    {"gzip", "byte", TEXT_SIZE, text_prepare, gzip_run},
    {"getpid", "call", SYSCALLS, NULL, syscall_run},
    {"fork+exec", "process", EXECS, NULL, exec_run},
    {"pipe", "round-trip", ROUND_TRIPS, NULL, pipe_run},
    {"fault", "page", FAULT_PAGES, NULL, fault_run},
};

static void load_measure(const struct load *load) {
  char line[128];
  if (load->prepare)
    load->prepare();
  uint64_t start = __rdtsc();
  uint64_t check = load->run();
  uint64_t ticks = __rdtsc() - start;
  say(line, (size_t)snprintf(line, sizeof(line), "%s %lu %lu %s %016lx\n", load->name, ticks,
                             load->units, load->unit, check));
}

static int is_wanted(const char *name, char **names) {
  if (!*names)
    return 1;
  for (; *names; names++)
    if (!strcmp(*names, name))
      return 1;
  return 0;
}

static void mark(const char *what) {
  char line[64];
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  say(line, (size_t)snprintf(line, sizeof(line), "%s %llu %ld\n", what, __rdtsc(),
                             t.tv_sec * 1000000000 + t.tv_nsec));
}

int main(int argc, char **argv) {
  int option, repeats = 3;
  is_init = getpid() == 1;
  if (is_init && iopl(3))
    return 1;
  while ((option = getopt(argc, argv, "n:x")) != -1) {
    if (option == 'x')
      return EXEC_STATUS;
    if (option == '?')
      finish(2);
    repeats = atoi(optarg);
  }
  /* Memory once touched stays ours: faults have a load of their own. */
  mallopt(M_TRIM_THRESHOLD, 1 << 28);
  mallopt(M_MMAP_THRESHOLD, 1 << 28);
  mark("begin");
  for (size_t i = 0; i < sizeof(loads) / sizeof(*loads); i++)
    for (int repeat = 0; is_wanted(loads[i].name, argv + optind) && repeat < repeats; repeat++)
      load_measure(&loads[i]);
  mark("end");
  finish(0);
}
