/*
 * User-level instructions that C executes: state save and restore, gathers and
 * masked moves, and a few rare ones. Their vector operands come in d->vec[],
 * where translated code put them (translate.c, emit_vector_helper).
 */
#include "exec.h"
#include "system.h"

uint64_t mv_insn_ea(struct mv_dbt *d, const struct mv_insn *in) {
  uint64_t ea = (uint64_t)in->disp;
  if (in->base == MV_REG_RIP)
    ea += d->rip + in->len;
  else if (in->base != MV_REG_NONE)
    ea += d->gpr[in->base];
  if (in->index != MV_REG_NONE && in->cls != MV_CLASS_VSIB)
    ea += d->gpr[in->index] * in->scale;
  if (in->addr_size == 4)
    ea = (uint32_t)ea;
  if (in->segment == MV_SEG_FS || in->segment == MV_SEG_GS)
    ea += d->seg[in->segment].base;
  return ea;
}

/* ======================= XSAVE family, SDM 1 §13 ======================== */

enum { LEGACY_BYTES = 512, HEADER_BYTES = 64, AVX_BYTES = 256, IMAGE_BYTES = 832 };
#define XCOMP_COMPACT (1ull << 63)

struct xsave_area {
  uint8_t bytes[IMAGE_BYTES] __attribute__((aligned(64)));
};

static uint64_t load64(const uint8_t *p) {
  uint64_t v;
  __builtin_memcpy(&v, p, 8);
  return v;
}

/* The last x87 instruction's address is ours: the guest reads zeros. */
static void hide_fip(uint8_t *area) {
  __builtin_memset(area + 6, 0, 18);
}

static bool mxcsr_bad(const uint8_t *area) {
  uint32_t v;
  __builtin_memcpy(&v, area + 24, 4);
  return v & 0xffff0000u;
}

static int fxsave(struct mv_dbt *d, uint64_t gva) {
  struct xsave_area a;
  if (gva & 15)
    return mv_gp0(d);
  __asm__ volatile("fxsave64 %0" : "=m"(a));
  hide_fip(a.bytes);
  return mv_mmu_write(d, gva, a.bytes, 416, MV_AS_CPL); /* the rest is kept    */
}

static int fxrstor(struct mv_dbt *d, uint64_t gva) {
  struct xsave_area a;
  if (gva & 15)
    return mv_gp0(d);
  if (mv_mmu_read(d, gva, a.bytes, LEGACY_BYTES, MV_AS_CPL))
    return -1;
  if (mxcsr_bad(a.bytes))
    return mv_gp0(d);
  mv_dbt_fpu_load(d); /* reading a device has put it away                       */
  __asm__ volatile("fxrstor64 %0" : : "m"(a));
  return 0;
}

static uint64_t requested(const struct mv_dbt *d) {
  return (d->gpr[MV_RDX] << 32 | (uint32_t)d->gpr[MV_RAX]) & d->xcr0;
}

/* Bytes that an image with these components takes; AVX directly follows the
 * header in both formats. */
static unsigned image_bytes(uint64_t components) {
  return LEGACY_BYTES + HEADER_BYTES + (components & 4 ? AVX_BYTES : 0);
}

/* XSAVEOPT runs as XSAVE, which it may do: the host's memory of the last
 * XRSTOR is not about the guest's areas. */
static int xsave(struct mv_dbt *d, uint64_t gva, bool compact) {
  struct xsave_area a;
  uint64_t rfbm = requested(d);
  unsigned size = image_bytes(rfbm);
  if (gva & 63)
    return mv_gp0(d);
  /* Components not asked for keep their bytes.                              */
  if (mv_mmu_read(d, gva, a.bytes, size, MV_AS_CPL))
    return -1;
  mv_dbt_fpu_load(d);
  if (compact)
    __asm__ volatile("xsavec64 %0" : "+m"(a) : "a"((uint32_t)rfbm), "d"(0) : "memory");
  else
    __asm__ volatile("xsave64 %0" : "+m"(a) : "a"((uint32_t)rfbm), "d"(0) : "memory");
  if (rfbm & load64(a.bytes + 512) & 1)
    hide_fip(a.bytes);
  return mv_mmu_write(d, gva, a.bytes, size, MV_AS_CPL);
}

/* SDM 1 §13.8.1, §13.8.2: of what the header holds behind its second word, the standard form wants
 * the first 8 bytes zero, the compacted one all. Whatever is let through here, the host's XRSTOR
 * must take: it runs in C. */
static bool header_bad(const struct mv_dbt *d, const uint8_t *area) {
  uint64_t bv = load64(area + 512), comp = load64(area + 520);
  bool compact = comp & XCOMP_COMPACT;
  if (bv & ~d->xcr0 || (!compact && comp))
    return true;
  if (compact &&
      (!mv_feature_offered(MV_FEAT_XSAVEC) || comp & ~XCOMP_COMPACT & ~d->xcr0 || bv & ~comp))
    return true;
  for (unsigned at = 528; at < (compact ? 576 : 536); at += 8)
    if (load64(area + at))
      return true;
  return false;
}

static int xrstor(struct mv_dbt *d, uint64_t gva) {
  struct xsave_area a;
  uint64_t rfbm = requested(d);
  if (gva & 63)
    return mv_gp0(d);
  if (mv_mmu_read(d, gva, a.bytes, LEGACY_BYTES + HEADER_BYTES, MV_AS_CPL))
    return -1;
  if (header_bad(d, a.bytes))
    return mv_gp0(d);
  bool compact = load64(a.bytes + 520) & XCOMP_COMPACT;
  if (rfbm & load64(a.bytes + 512) & 4 &&
      mv_mmu_read(d, gva + 576, a.bytes + 576, AVX_BYTES, MV_AS_CPL))
    return -1;
  /* MXCSR is loaded with SSE or AVX; by the compacted form only with SSE.    */
  if (rfbm & (compact ? load64(a.bytes + 512) & 2 : 6) && mxcsr_bad(a.bytes))
    return mv_gp0(d);
  mv_dbt_fpu_load(d);
  a.bytes[26] = a.bytes[27] = 0; /* whatever the host thinks of bits that are not loaded */
  __asm__ volatile("xrstor64 %0" : : "m"(a), "a"((uint32_t)rfbm), "d"(0) : "memory");
  return 0;
}

static int exec_xsave(struct mv_dbt *d, const struct mv_insn *in) {
  uint64_t gva = mv_insn_ea(d, in);
  bool fx = in->op == MV_OP_FXSAVE || in->op == MV_OP_FXRSTOR;
  if (!fx && !(d->cr4 & MV_CR4_OSXSAVE))
    return mv_ud(d);
  if (d->cr0 & MV_CR0_TS || (fx && d->cr0 & MV_CR0_EM))
    return mv_dbt_raise(d, MV_EXC_NM);
  switch (in->op) {
  case MV_OP_FXSAVE:
    return fxsave(d, gva);
  case MV_OP_FXRSTOR:
    return fxrstor(d, gva);
  case MV_OP_XSAVE:
  case MV_OP_XSAVEOPT:
    return xsave(d, gva, false);
  case MV_OP_XSAVEC:
    return xsave(d, gva, true);
  case MV_OP_XRSTOR:
    return xrstor(d, gva);
  default:
    return mv_ud(d);
  }
}

/* ======================= gathers, masked moves ========================== */

static uint64_t element(const uint8_t *v, unsigned i, unsigned size) {
  uint64_t x = 0;
  __builtin_memcpy(&x, v + i * size, size);
  return x;
}
static bool chosen(const uint8_t *mask, unsigned i, unsigned size) {
  return mask[i * size + size - 1] & 0x80;
}

/* VPGATHERxx, VGATHERxPx: vec[0] destination, vec[1] indices, vec[2] mask.
 * Opcode bit 0: 64-bit indices; VEX.W: 64-bit elements. */
static int exec_gather(struct mv_dbt *d, const struct mv_insn *in) {
  unsigned esize = in->vex_w ? 8 : 4, isize = in->opcode & 1 ? 8 : 4;
  unsigned bytes = in->vex_l ? 32 : 16;
  unsigned n = bytes / (esize > isize ? esize : isize);
  uint8_t out[32];
  __builtin_memcpy(out, d->vec[0], 32);
  for (unsigned i = 0; i < n; i++) {
    if (!chosen(d->vec[2], i, esize))
      continue;
    uint64_t index = element(d->vec[1], i, isize);
    if (isize == 4)
      index = (uint64_t)(int64_t)(int32_t)index;
    uint64_t seg = in->segment != MV_REG_NONE ? d->seg[in->segment].base : 0;
    uint64_t ea = mv_insn_ea(d, in) - seg + index * in->scale;
    if (in->addr_size == 4)
      ea = (uint32_t)ea;
    if (mv_mmu_read(d, ea + seg, out + i * esize, esize, MV_AS_CPL))
      return -1;
  }
  __builtin_memset(out + n * esize, 0, 32 - n * esize);
  __builtin_memcpy(d->vec[0], out, 32);
  __builtin_memset(d->vec[2], 0, 32);
  return 0;
}

static int store_chosen(struct mv_dbt *d, uint64_t gva, const uint8_t *mask, unsigned bytes,
                        unsigned size) {
  uint64_t gpa;
  for (unsigned i = 0; i < bytes / size; i++) /* all may be written, or none is */
    if (chosen(mask, i, size) &&
        (mv_mmu_translate(d, gva + i * size, MV_ACC_W, MV_AS_CPL, &gpa) ||
         mv_mmu_translate(d, gva + i * size + size - 1, MV_ACC_W, MV_AS_CPL, &gpa)))
      return -1;
  for (unsigned i = 0; i < bytes / size; i++)
    if (chosen(mask, i, size) &&
        mv_mmu_write(d, gva + i * size, d->vec[0] + i * size, size, MV_AS_CPL))
      return -1;
  return 0;
}

/* VMASKMOVPS/PD, VPMASKMOVD/Q: vec[0] data, vec[1] mask. MASKMOVDQU, MASKMOVQ:
 * the same by bytes, to [RDI]. */
static int exec_masked(struct mv_dbt *d, const struct mv_insn *in) {
  if (in->map == 1) { /* 0F F7                                                 */
    uint64_t gva = in->addr_size == 4 ? (uint32_t)d->gpr[MV_RDI] : d->gpr[MV_RDI];
    if (in->segment != MV_REG_NONE)
      gva += d->seg[in->segment].base;
    return store_chosen(d, gva, d->vec[1], in->unit == MV_UNIT_MMX ? 8 : 16, 1);
  }
  bool store = in->opcode == 0x2e || in->opcode == 0x2f || in->opcode == 0x8e;
  unsigned size =
      in->opcode == 0x2d || in->opcode == 0x2f || (in->opcode >= 0x8c && in->vex_w) ? 8 : 4;
  unsigned bytes = in->vex_l ? 32 : 16;
  uint64_t gva = mv_insn_ea(d, in);
  if (store)
    return store_chosen(d, gva, d->vec[1], bytes, size);
  uint8_t out[32] = {0};
  for (unsigned i = 0; i < bytes / size; i++)
    if (chosen(d->vec[1], i, size) &&
        mv_mmu_read(d, gva + i * size, out + i * size, size, MV_AS_CPL))
      return -1;
  __builtin_memcpy(d->vec[0], out, 32);
  return 0;
}

/* ======================= rare integer instructions ====================== */

/* ENTER size, level: SDM 2A. */
static int exec_enter(struct mv_dbt *d, const struct mv_insn *in) {
  unsigned level = (unsigned)in->imm2 & 31, size = in->op_size;
  uint64_t frame[33], rsp = d->gpr[MV_RSP], rbp = d->gpr[MV_RBP];
  unsigned n = 0;
  frame[n++] = rbp;
  for (unsigned i = 1; i < level; i++) {
    uint64_t v = 0;
    if (mv_mmu_read(d, rbp - i * size, &v, size, MV_AS_CPL))
      return -1;
    frame[n++] = v;
  }
  uint64_t top = rsp - size;
  if (level)
    frame[n++] = top;
  uint8_t image[33 * 8];
  for (unsigned i = 0; i < n; i++) /* pushed last lies lowest                  */
    __builtin_memcpy(image + (n - 1 - i) * size, &frame[i], size);
  if (mv_mmu_write(d, rsp - n * size, image, n * size, MV_AS_CPL))
    return -1;
  mv_gpr_put(d, MV_RBP, top, size);
  d->gpr[MV_RSP] = rsp - n * size - (uint16_t)in->imm;
  return 0;
}

static int exec_leave(struct mv_dbt *d, const struct mv_insn *in) {
  uint64_t v = 0, rbp = d->gpr[MV_RBP];
  if (mv_mmu_read(d, rbp, &v, in->op_size, MV_AS_CPL))
    return -1;
  d->gpr[MV_RSP] = rbp + in->op_size;
  mv_gpr_put(d, MV_RBP, v, in->op_size);
  return 0;
}

static int exec_xlat(struct mv_dbt *d, const struct mv_insn *in) {
  uint64_t ea = d->gpr[MV_RBX] + (d->gpr[MV_RAX] & 0xff);
  uint8_t v;
  if (in->addr_size == 4)
    ea = (uint32_t)ea;
  if (in->segment == MV_SEG_FS || in->segment == MV_SEG_GS)
    ea += d->seg[in->segment].base;
  if (mv_mmu_read(d, ea, &v, 1, MV_AS_CPL))
    return -1;
  mv_gpr_put(d, MV_RAX, v, 1);
  return 0;
}

/* BT, BTS, BTR, BTC m16, r16. */
static int exec_bit16(struct mv_dbt *d, const struct mv_insn *in) {
  int16_t bit = (int16_t)d->gpr[in->reg.reg];
  uint64_t ea = mv_insn_ea(d, in) + (uint64_t)((int64_t)(bit >> 4) * 2);
  uint16_t v, m = (uint16_t)(1u << (bit & 15));
  uint64_t gpa;
  unsigned kind = in->opcode >> 3 & 3; /* A3 BT, AB BTS, B3 BTR, BB BTC        */
  if (kind && (mv_mmu_translate(d, ea, MV_ACC_W, MV_AS_CPL, &gpa) ||
               mv_mmu_translate(d, ea + 1, MV_ACC_W, MV_AS_CPL, &gpa)))
    return -1;
  if (mv_mmu_read(d, ea, &v, 2, MV_AS_CPL))
    return -1;
  d->flags = (d->flags & ~(uint64_t)MV_F_CF) | (v & m ? MV_F_CF : 0);
  uint16_t out = kind == 1 ? v | m : kind == 2 ? v & ~m : kind == 3 ? v ^ m : v;
  return kind ? mv_mmu_write(d, ea, &out, 2, MV_AS_CPL) : 0;
}

int mv_insn_exec(struct mv_dbt *d, const struct mv_insn *in) {
  int r;
  mv_dbt_fpu_load(d);
  if (in->cls == MV_CLASS_XSAVE)
    r = exec_xsave(d, in);
  else if (in->cls == MV_CLASS_VSIB)
    r = exec_gather(d, in);
  else if (in->cls == MV_CLASS_MASKED)
    r = exec_masked(d, in);
  else if (in->op == MV_OP_ENTER)
    r = exec_enter(d, in);
  else if (in->op == MV_OP_LEAVE)
    r = exec_leave(d, in);
  else if (in->op == MV_OP_XLAT)
    r = exec_xlat(d, in);
  else if (in->op == MV_OP_BT_MEM_REG)
    r = exec_bit16(d, in);
  else
    r = mv_ud(d);
  if (!r)
    d->rip += in->len;
  return r;
}
