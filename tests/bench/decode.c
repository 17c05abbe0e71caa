/* Nanoseconds per mv_decode() over a program's code: decode FILE OFFSET LENGTH.
 * Decodes linearly from the start of each function as far as the next one; an
 * undefined byte (data, padding) is stepped over. Built and run by decode.py. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "insn.h"

enum { PASSES = 20 };

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1e9 + t.tv_nsec;
}

int main(int argc, char **argv) {
  if (argc != 4)
    return 2;
  size_t offset = strtoul(argv[2], NULL, 0), length = strtoul(argv[3], NULL, 0);
  FILE *f = fopen(argv[1], "rb");
  uint8_t *code = malloc(length);
  if (!f || !code || fseek(f, (long)offset, SEEK_SET) || fread(code, 1, length, f) != length)
    return 1;
  double best = 1e18;
  unsigned long count = 0, undefined = 0;
  for (int pass = 0; pass < PASSES; pass++) {
    double start = now();
    count = undefined = 0;
    for (size_t at = 0; at < length;) {
      struct mv_insn insn;
      size_t rest = length - at;
      if (mv_decode(&insn, code + at, rest < 15 ? rest : 15, MV_MODE_64) == MV_DECODE_OK) {
        at += insn.len;
        count++;
      } else {
        at++;
        undefined++;
      }
    }
    double took = now() - start;
    best = took < best ? took : best;
  }
  printf("%lu instructions, %lu undefined bytes, %.1f ns an instruction (best of %d)\n", count,
         undefined, best / (double)(count + undefined), PASSES);
  return 0;
}
