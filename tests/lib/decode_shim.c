/* Lets a test call mv_decode() on many instructions at once: one 16-byte slot
 * each in, FIELDS integers each out (names: FIELDS in decoder_under_test.py). */
#include <stddef.h>

#include "insn_row.h"

#define API __attribute__((visibility("default")))

static int64_t *put_gpr(int64_t *o, const struct mv_gpr_ref *r) {
  *o++ = r->reg;
  *o++ = r->access;
  *o++ = r->size;
  *o++ = r->high8;
  return o;
}

API int decode_batch(const uint8_t *in, int n, int avail, int mode, int64_t *out) {
  int64_t *o = out;
  for (int i = 0; i < n; i++) {
    struct mv_insn x;
    *o++ = mv_decode(&x, in + (size_t)16 * i, avail, mode);
    int64_t head[] = {
        x.len,       x.cls,      x.op,          x.enc,        x.map,          x.opcode,
        x.lock,      x.rep,      x.repne,       x.segment,    x.rex,          x.op_size,
        x.addr_size, x.cc,       x.opcode_off,  x.modrm_off,  x.sib_off,      x.disp_off,
        x.imm_off,   x.disp_len, x.imm_len,     x.has_mem,    x.mem_access,   x.mem_size,
        x.mem_align, x.base,     x.index,       x.scale,      x.disp,         x.imm,
        x.imm2,      x.gpr_read, x.gpr_written, x.flags_read, x.flags_killed, x.flags_written,
        x.feature,   x.feature2, x.unit,        x.row,
    };
    for (unsigned f = 0; f < sizeof(head) / sizeof(head[0]); f++)
      *o++ = head[f];
    o = put_gpr(o, &x.reg);
    o = put_gpr(o, &x.rm);
    o = put_gpr(o, &x.vvvv);
    o = put_gpr(o, &x.opreg);
  }
  return n ? (int)((o - out) / n) : 0;
}

API int row_count(void) {
  return (int)mv_row_count;
}

API void mark_rows(const uint8_t *in, int n, int mode, uint8_t *seen) {
  for (int i = 0; i < n; i++) {
    struct mv_insn x;
    if (mv_decode(&x, in + (size_t)16 * i, 15, mode) == MV_DECODE_OK)
      seen[x.row] = 1;
  }
}

API const char *row_name(int row) {
  struct mv_insn x = {.row = row};
  return mv_insn_name(&x);
}

API int feature_bit(int feature, int *out) {
  if (feature < 0 || feature >= MV_FEAT_COUNT)
    return -1;
  out[0] = mv_feature_bits[feature].leaf;
  out[1] = mv_feature_bits[feature].subleaf;
  out[2] = mv_feature_bits[feature].reg;
  out[3] = mv_feature_bits[feature].bit;
  return 0;
}
