/*
 * memcpy and friends without vector registers, for the translator's C: native
 * /Makefile renames the compiler's calls to these.  REP MOVSB/STOSB is fast on
 * every CPU with ERMS, and the copies here are short.
 */
#include <stddef.h>

void *mv_gp_memcpy(void *dst, const void *src, size_t n);
void *mv_gp_memset(void *dst, int c, size_t n);
void *mv_gp_memmove(void *dst, const void *src, size_t n);
int mv_gp_memcmp(const void *a, const void *b, size_t n);

void *mv_gp_memcpy(void *dst, const void *src, size_t n) {
  void *d = dst;
  __asm__ volatile("rep movsb" : "+D"(d), "+S"(src), "+c"(n) : : "memory");
  return dst;
}

void *mv_gp_memset(void *dst, int c, size_t n) {
  void *d = dst;
  __asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(c) : "memory");
  return dst;
}

void *mv_gp_memmove(void *dst, const void *src, size_t n) {
  if ((size_t)((char *)dst - (const char *)src) >= n)
    return mv_gp_memcpy(dst, src, n);
  char *d = (char *)dst + n - 1;
  const char *s = (const char *)src + n - 1;
  __asm__ volatile("std; rep movsb; cld" : "+D"(d), "+S"(s), "+c"(n) : : "memory");
  return dst;
}

int mv_gp_memcmp(const void *a, const void *b, size_t n) {
  const unsigned char *x = a, *y = b;
  for (; n; n--, x++, y++)
    if (*x != *y)
      return *x - *y;
  return 0;
}
