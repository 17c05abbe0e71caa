/*
 * Segment registers and descriptor tables: SDM 3A §3.4, §5 and the pages of
 * the instructions in SDM 2.
 */
#include "system.h"

struct mv_seg mv_desc_seg(uint16_t sel, uint64_t raw) {
  struct mv_seg s = {.sel = sel, .attr = mv_desc_attr(raw)};
  s.base = (raw >> 16 & 0xffffff) | (raw >> 56 << 24);
  s.limit = (raw & 0xffff) | (raw >> 32 & 0xf0000);
  if (s.attr & MV_SEG_G)
    s.limit = s.limit << 12 | 0xfff;
  return s;
}

struct mv_seg mv_seg_real(uint16_t sel, uint16_t attr) {
  return (struct mv_seg){.base = (uint64_t)sel << 4, .limit = 0xffff, .sel = sel, .attr = attr};
}

/* Linear address of a selector's descriptor; false: outside its table. */
static bool desc_address(const struct mv_dbt *d, uint16_t sel, unsigned size, uint64_t *gva) {
  uint64_t base = d->gdt.base, limit = d->gdt.limit;
  if (sel & 4) {
    const struct mv_seg *ldt = &d->seg[MV_SEG_LDTR];
    if (!(ldt->attr & MV_SEG_P))
      return false;
    base = ldt->base;
    limit = ldt->limit;
  }
  *gva = base + (sel & ~7u);
  return (sel & ~7u) + size - 1 <= limit;
}

int mv_desc_read(struct mv_dbt *d, uint16_t sel, unsigned vector, unsigned ext, uint64_t *raw) {
  uint64_t gva;
  if (!desc_address(d, sel, 8, &gva))
    return mv_dbt_raise_code(d, vector, (sel & ~3u) | ext);
  return mv_mmu_read(d, gva, raw, 8, MV_AS_SYSTEM);
}

int mv_desc_accessed(struct mv_dbt *d, uint16_t sel, uint64_t *raw) {
  uint64_t gva;
  if (*raw & 1ULL << 40 || !desc_address(d, sel, 8, &gva))
    return 0;
  *raw |= 1ULL << 40;
  uint8_t access = *raw >> 40;
  return mv_mmu_write(d, gva + 5, &access, 1, MV_AS_SYSTEM);
}

void mv_seg_changed(struct mv_dbt *d) {
  mv_mmu_mode_changed(d);
}

/* ---- loading data segments ------------------------------------------------ */

static int load_null(struct mv_dbt *d, unsigned seg, uint16_t sel) {
  if (seg == MV_SEG_SS && (!mv_is_code64(d) || d->cpl == 3 || (sel & 3) != d->cpl))
    return mv_gp0(d);
  d->seg[seg] = mv_seg_null(sel, seg == MV_SEG_SS ? d->cpl : 0);
  return 0;
}

/* SDM 2B, MOV: "Loading a segment register while in protected mode". */
static int check_data_segment(struct mv_dbt *d, unsigned seg, uint16_t sel, uint16_t attr) {
  unsigned dpl = attr >> 5 & 3, rpl = sel & 3;
  bool code = attr & MV_SEG_CODE, bad = !(attr & MV_SEG_S);
  if (seg == MV_SEG_SS)
    bad = bad || code || !(attr & MV_SEG_RW) || rpl != d->cpl || dpl != d->cpl;
  else
    bad = bad || (code && !(attr & MV_SEG_RW)) ||
          (!(code && (attr & MV_SEG_CONFORM)) && (rpl > dpl || d->cpl > dpl));
  if (bad)
    return mv_dbt_raise_code(d, MV_EXC_GP, sel & ~3u);
  if (!(attr & MV_SEG_P))
    return mv_dbt_raise_code(d, seg == MV_SEG_SS ? MV_EXC_SS : MV_EXC_NP, sel & ~3u);
  return 0;
}

int mv_seg_load(struct mv_dbt *d, unsigned seg, uint16_t sel) {
  uint64_t raw;
  if (!mv_is_protected(d) || mv_is_vm86(d)) {
    /* Real mode keeps limit and attributes ("unreal" mode relies on it). */
    d->seg[seg].sel = sel;
    d->seg[seg].base = (uint64_t)sel << 4;
  } else if (sel < 4) {
    if (load_null(d, seg, sel) < 0)
      return -1;
  } else {
    if (mv_desc_read(d, sel, MV_EXC_GP, 0, &raw) < 0 ||
        check_data_segment(d, seg, sel, mv_desc_attr(raw)) < 0 ||
        mv_desc_accessed(d, sel, &raw) < 0)
      return -1;
    d->seg[seg] = mv_desc_seg(sel, raw);
  }
  if (!mv_is_code64(d))
    mv_seg_changed(d);
  return 0;
}

static void shadow_after_ss(struct mv_dbt *d, unsigned seg) {
  if (seg == MV_SEG_SS) {
    d->irq_shadow = true;
    d->sys->shadow_kind = KVM_X86_SHADOW_INT_MOV_SS;
  }
}

int mv_sys_mov_seg_read(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned seg = insn->modrm >> 3 & 7;
  if (seg > MV_SEG_GS)
    return mv_ud(d);
  return mv_operand_write(d, insn, d->seg[seg].sel, 2, insn->op_size);
}

int mv_sys_mov_seg_write(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned seg = insn->modrm >> 3 & 7;
  uint64_t sel;
  if (seg > MV_SEG_GS || seg == MV_SEG_CS)
    return mv_ud(d);
  if (mv_operand_read(d, insn, 2, &sel) < 0 || mv_seg_load(d, seg, sel) < 0)
    return -1;
  shadow_after_ss(d, seg);
  return 0;
}

/* The segment that PUSH/POP 06..1F, 0F A0..A9 name. */
static unsigned seg_of_opcode(const struct mv_insn *insn) {
  if (insn->map == 1)
    return insn->opcode < 0xa8 ? MV_SEG_FS : MV_SEG_GS;
  return insn->opcode >> 3 & 3;
}

int mv_sys_push_seg(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t value = d->seg[seg_of_opcode(insn)].sel;
  uint64_t sp = d->gpr[MV_RSP] - insn->op_size;
  if (mv_mmu_write(d, mv_stack_linear(d, sp), &value, insn->op_size, MV_AS_CPL) < 0)
    return -1;
  mv_stack_set(d, sp);
  return 0;
}

int mv_sys_pop_seg(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned seg = seg_of_opcode(insn);
  uint64_t sp = d->gpr[MV_RSP];
  uint16_t sel;
  if (mv_mmu_read(d, mv_stack_linear(d, sp), &sel, 2, MV_AS_CPL) < 0)
    return -1;
  struct mv_seg old_ss = d->seg[MV_SEG_SS];
  if (mv_seg_load(d, seg, sel) < 0)
    return -1;
  /* POP SS moves SP by the size of the stack that it came from. */
  struct mv_seg new_ss = d->seg[MV_SEG_SS];
  d->seg[MV_SEG_SS] = old_ss;
  mv_stack_set(d, sp + insn->op_size);
  d->seg[MV_SEG_SS] = new_ss;
  shadow_after_ss(d, seg);
  return 0;
}

/* LES C4, LDS C5, LSS 0F B2, LFS 0F B4, LGS 0F B5: offset, then selector. */
int mv_sys_lxs(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned seg = insn->map == 0         ? (insn->opcode == 0xc4 ? MV_SEG_ES : MV_SEG_DS)
                 : insn->opcode == 0xb2 ? MV_SEG_SS
                 : insn->opcode == 0xb4 ? MV_SEG_FS
                                        : MV_SEG_GS;
  uint8_t buf[10];
  uint64_t gva, offset = 0;
  uint16_t sel;
  unsigned size = insn->op_size;
  if (!insn->has_mem)
    return mv_ud(d);
  if (mv_operand_address(d, insn, size + 2, MV_ACC_R, &gva) < 0 ||
      mv_mmu_read(d, gva, buf, size + 2, MV_AS_CPL) < 0)
    return -1;
  __builtin_memcpy(&offset, buf, size);
  __builtin_memcpy(&sel, buf + size, 2);
  if (mv_seg_load(d, seg, sel) < 0)
    return -1;
  mv_gpr_put(d, mv_modrm_reg(insn), offset, size);
  shadow_after_ss(d, seg);
  return 0;
}

/* ---- GDTR, IDTR ------------------------------------------------------------ */

static bool is_idt(const struct mv_insn *insn) {
  return insn->modrm >> 3 & 1;
}

/* LGDT, LIDT */
int mv_sys_lgdt(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned base_len = insn->mode == MV_MODE_64 ? 8 : 4;
  uint8_t buf[10];
  uint64_t gva, base = 0;
  uint16_t limit;
  if (d->cpl)
    return mv_gp0(d);
  if (mv_operand_address(d, insn, 2 + base_len, MV_ACC_R, &gva) < 0 ||
      mv_mmu_read(d, gva, buf, 2 + base_len, MV_AS_CPL) < 0)
    return -1;
  __builtin_memcpy(&limit, buf, 2);
  __builtin_memcpy(&base, buf + 2, base_len);
  if (insn->mode != MV_MODE_64 && insn->op_size == 2)
    base &= 0xffffff;
  if (!mv_is_canonical(base))
    return mv_gp0(d);
  *(is_idt(insn) ? &d->idt : &d->gdt) = (struct mv_dtr){.base = base, .limit = limit};
  return 0;
}

/* SGDT, SIDT */
int mv_sys_sgdt(struct mv_dbt *d, const struct mv_insn *insn) {
  unsigned base_len = insn->mode == MV_MODE_64 ? 8 : 4;
  const struct mv_dtr *dtr = is_idt(insn) ? &d->idt : &d->gdt;
  uint8_t buf[10];
  uint64_t gva;
  if (d->cpl && (d->cr4 & MV_CR4_UMIP))
    return mv_gp0(d);
  __builtin_memcpy(buf, &dtr->limit, 2);
  __builtin_memcpy(buf + 2, &dtr->base, 8);
  if (mv_operand_address(d, insn, 2 + base_len, MV_ACC_W, &gva) < 0)
    return -1;
  return mv_mmu_write(d, gva, buf, 2 + base_len, MV_AS_CPL);
}

/* ---- LDTR, TR --------------------------------------------------------------- */

/* Reads the system descriptor (16 bytes in long mode) that LLDT or LTR load. */
static int read_system_desc(struct mv_dbt *d, uint16_t sel, uint64_t *raw, uint64_t *base_high) {
  unsigned size = mv_is_long(d) ? 16 : 8;
  uint64_t buf[2] = {0, 0}, gva;
  if ((sel & 4) || !desc_address(d, sel, size, &gva))
    return mv_dbt_raise_code(d, MV_EXC_GP, sel & ~3u);
  if (mv_mmu_read(d, gva, buf, size, MV_AS_SYSTEM) < 0)
    return -1;
  *raw = buf[0];
  *base_high = buf[1] << 32;
  return 0;
}

static int load_system_seg(struct mv_dbt *d, unsigned seg, uint16_t sel, unsigned type_mask,
                           unsigned type) {
  uint64_t raw = 0, high = 0;
  if (read_system_desc(d, sel, &raw, &high) < 0)
    return -1;
  uint16_t attr = mv_desc_attr(raw);
  struct mv_seg s = mv_desc_seg(sel, raw);
  s.base |= high;
  if ((attr & (MV_SEG_S | type_mask)) != type || !mv_is_canonical(s.base))
    return mv_dbt_raise_code(d, MV_EXC_GP, sel & ~3u);
  if (!(attr & MV_SEG_P))
    return mv_dbt_raise_code(d, MV_EXC_NP, sel & ~3u);
  if (seg == MV_SEG_TR) {
    uint8_t busy = (uint8_t)attr | 2;
    if (mv_mmu_write(d, d->gdt.base + (sel & ~7u) + 5, &busy, 1, MV_AS_SYSTEM) < 0)
      return -1;
    s.attr |= 2;
  }
  d->seg[seg] = s;
  return 0;
}

static int system_seg_operand(struct mv_dbt *d, const struct mv_insn *insn, uint64_t *sel) {
  if (!mv_is_protected(d) || mv_is_vm86(d))
    return mv_ud(d);
  if (d->cpl)
    return mv_gp0(d);
  return mv_operand_read(d, insn, 2, sel);
}

int mv_sys_lldt(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t sel;
  if (system_seg_operand(d, insn, &sel) < 0)
    return -1;
  if (sel < 4) {
    d->seg[MV_SEG_LDTR] = mv_seg_null(sel, 0);
    return 0;
  }
  return load_system_seg(d, MV_SEG_LDTR, sel, MV_SEG_TYPE, 2);
}

/* Available TSS: type 9; type 1 (16 bits) outside long mode. */
int mv_sys_ltr(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t sel;
  if (system_seg_operand(d, insn, &sel) < 0)
    return -1;
  if (sel < 4)
    return mv_gp0(d);
  if (mv_is_long(d))
    return load_system_seg(d, MV_SEG_TR, sel, MV_SEG_TYPE, 9);
  return load_system_seg(d, MV_SEG_TR, sel, 7, 1);
}

static int store_system_seg(struct mv_dbt *d, const struct mv_insn *insn, unsigned seg) {
  if (!mv_is_protected(d) || mv_is_vm86(d))
    return mv_ud(d);
  if (d->cpl && (d->cr4 & MV_CR4_UMIP))
    return mv_gp0(d);
  return mv_operand_write(d, insn, d->seg[seg].sel, 2, insn->op_size);
}

int mv_sys_sldt(struct mv_dbt *d, const struct mv_insn *insn) {
  return store_system_seg(d, insn, MV_SEG_LDTR);
}

int mv_sys_str(struct mv_dbt *d, const struct mv_insn *insn) {
  return store_system_seg(d, insn, MV_SEG_TR);
}

/* ---- LAR, LSL, VERR, VERW ----------------------------------------------------- */

/* Reads the descriptor that `sel` names, if there is one and CPL and RPL may
 * see it. 1 and *raw, 0 if not, -1 with an exception raised. */
static int visible_desc(struct mv_dbt *d, uint16_t sel, uint64_t *raw) {
  uint64_t gva;
  if (sel < 4 || !desc_address(d, sel, 8, &gva))
    return 0;
  if (mv_mmu_read(d, gva, raw, 8, MV_AS_SYSTEM) < 0)
    return -1;
  uint16_t attr = mv_desc_attr(*raw);
  unsigned dpl = attr >> 5 & 3;
  bool conforming = (attr & (MV_SEG_S | MV_SEG_CODE | MV_SEG_CONFORM)) ==
                    (MV_SEG_S | MV_SEG_CODE | MV_SEG_CONFORM);
  return conforming || (dpl >= d->cpl && dpl >= (sel & 3u));
}

static void set_zf(struct mv_dbt *d, bool on) {
  d->flags = on ? d->flags | MV_F_ZF : d->flags & ~(uint64_t)MV_F_ZF;
}

/* System descriptor types that LAR and LSL accept, as bit sets (SDM 2A tables
 * of LAR and LSL). */
enum { LAR_LEGACY = 0x1a3e, LAR_LONG = 0x1a04, LSL_LEGACY = 0x0a0e, LSL_LONG = 0x0a04 };

static int look_up(struct mv_dbt *d, const struct mv_insn *insn, unsigned legacy, unsigned longm,
                   uint64_t *raw) {
  uint64_t sel;
  if (!mv_is_protected(d) || mv_is_vm86(d))
    return mv_ud(d);
  if (mv_operand_read(d, insn, 2, &sel) < 0)
    return -1;
  int seen = visible_desc(d, sel, raw);
  if (seen <= 0)
    return seen;
  uint16_t attr = mv_desc_attr(*raw);
  unsigned types = mv_is_long(d) ? longm : legacy;
  return (attr & MV_SEG_S) || (types >> (attr & MV_SEG_TYPE) & 1);
}

int mv_sys_lar(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t raw = 0;
  int ok = look_up(d, insn, LAR_LEGACY, LAR_LONG, &raw);
  if (ok < 0)
    return -1;
  if (ok)
    mv_gpr_put(d, mv_modrm_reg(insn), raw >> 32 & 0xffff00, insn->op_size);
  set_zf(d, ok);
  return 0;
}

int mv_sys_lsl(struct mv_dbt *d, const struct mv_insn *insn) {
  uint64_t raw = 0;
  int ok = look_up(d, insn, LSL_LEGACY, LSL_LONG, &raw);
  if (ok < 0)
    return -1;
  if (ok)
    mv_gpr_put(d, mv_modrm_reg(insn), mv_desc_seg(0, raw).limit, insn->op_size);
  set_zf(d, ok);
  return 0;
}

/* VERR /4, VERW /5 */
int mv_sys_verr(struct mv_dbt *d, const struct mv_insn *insn) {
  bool write = insn->modrm >> 3 & 1;
  uint64_t raw = 0;
  int ok = look_up(d, insn, 0, 0, &raw);
  if (ok < 0)
    return -1;
  uint16_t attr = mv_desc_attr(raw);
  bool code = attr & MV_SEG_CODE, rw = attr & MV_SEG_RW;
  set_zf(d, ok && (write ? !code && rw : !code || rw));
  return 0;
}
