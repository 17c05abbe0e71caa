/*
 * Memory operands: the effective address, the TLB check, the cold stub behind
 * it. The sequence is explained in translate.c.
 */
#include "translate.h"

struct cold *mv_add_cold(struct tr *t, enum cold_kind kind, uint8_t *from, uint32_t arg) {
  struct cold *c = &t->cold[t->ncold++];
  *c = (struct cold){.kind = kind, .from = from, .arg = arg};
  return c;
}

uint32_t mv_add_site(struct tr *t, unsigned i, uint32_t restart) {
  struct mv_site *s = &t->x->sites[t->x->nsites];
  *s = (struct mv_site){.block = (uint32_t)(t->b - t->x->blocks),
                        .restart = restart,
                        .guest = t->off[i],
                        .insn = (uint8_t)i};
  return t->x->nsites++;
}

void mv_add_reloc(struct tr *t, enum mv_reloc_kind kind, bool cold, const uint8_t *at,
                  uint32_t value) {
  uint32_t off = (uint32_t)(at - t->x->rw) - (cold ? t->cold0 : t->hot0);
  t->reloc[t->nreloc++] = (struct mv_reloc){
      .at = (uint16_t)off, .value = (uint16_t)value, .kind = (uint8_t)kind, .cold = cold};
}

void mv_emit_site(struct tr *t, uint32_t site) {
  e_mov_imm(&t->e, MV_T1, site);
  mv_add_reloc(t, MV_RELOC_SITE, false, t->e.p - 4, site - t->site0);
}

void mv_emit_flags_save(struct mv_emit *e) {
  e_store(e, MV_DBT(save_rax), MV_RAX);
  e_bytes(e, 0xc0900f9f, 4); /* lahf; seto al                                */
}
void mv_emit_flags_restore(struct mv_emit *e) {
  e_bytes(e, 0x9e7f04, 3); /* add al, 0x7f (overflows if AL is 1); sahf      */
  e_load(e, MV_RAX, MV_DBT(save_rax));
}

/* A register of an address as it is in the host: the guest's R14, R15 are
 * loaded into the scratch register of the same number. */
void mv_emit_address_regs(struct tr *t, const struct mv_insn *in) {
  if (guest_scratch(in->base))
    e_load(&t->e, in->base, MV_DBT_GPR(in->base));
  if (guest_scratch(in->index) && in->index != in->base)
    e_load(&t->e, in->index, MV_DBT_GPR(in->index));
}

/* T0 = segment base + effective address of the ModRM operand of insn i.
 * `add`: what POP [rsp] adds. Touches T1, no flags. */
static void emit_ea(struct tr *t, unsigned i, int32_t add) {
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  bool addr32 = in->addr_size == 4;
  bool seg = in->segment == MV_SEG_FS || in->segment == MV_SEG_GS;
  uint32_t seg_off = seg ? MV_DBT(seg[0].base) + in->segment * (uint32_t)sizeof(struct mv_seg) : 0;
  uint64_t ea = (uint64_t)in->disp + (in->base == MV_REG_RIP ? next_rip(t, i) : 0);
  if (addr32)
    ea = (uint32_t)ea;

  if (in->base == MV_REG_RIP || (in->base == MV_REG_NONE && in->index == MV_REG_NONE)) {
    if (seg && fits32((int64_t)ea)) { /* the kernel's per-CPU variables       */
      e_load(e, MV_T0, seg_off);
      if (ea)
        e_lea(e, MV_T0, MV_T0, MV_REG_NONE, 1, (int32_t)ea, false);
      return;
    }
    e_mov_imm(e, MV_T0, ea);
  } else if (seg && !addr32 && !add && in->index == MV_REG_NONE && !guest_scratch(in->base)) {
    e_load(e, MV_T0, seg_off);
    e_lea(e, MV_T0, MV_T0, in->base == MV_RSP ? MV_REG_NONE : in->base, 1, (int32_t)in->disp,
          false);
    if (in->base == MV_RSP) /* RSP cannot be an index                        */
      e_lea(e, MV_T0, MV_RSP, MV_T0, 1, 0, false);
    return;
  } else {
    mv_emit_address_regs(t, in);
    e_lea(e, MV_T0, in->base, in->index, in->scale, (int32_t)in->disp, addr32);
    if (add)
      e_lea(e, MV_T0, MV_T0, MV_REG_NONE, 1, add, addr32);
  }
  if (seg) {
    e_load(e, MV_T1, seg_off);
    e_lea(e, MV_T0, MV_T0, MV_T1, 1, 0, false);
  }
}

/* T1 = the bit offset of BT and friends; RAX may be away (emit_flags_save). */
void mv_emit_bit_index(struct tr *t, unsigned i) {
  unsigned reg = t->insn[i].reg.reg;
  if (guest_scratch((uint8_t)reg))
    e_load(&t->e, MV_T1, MV_DBT_GPR(reg));
  else if (reg == MV_RAX && t->live[i] & MV_F_ARITH)
    e_load(&t->e, MV_T1, MV_DBT(save_rax));
  else
    e_mov_rr(&t->e, MV_T1, reg);
}

/* BT/BTS/BTR/BTC m, r: the bit offset moves the address by whole operands.
 * SDM 2A §3.1.1.9. Clobbers flags; T1 too. */
static void emit_bit_offset(struct tr *t, unsigned i) {
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  unsigned shift = in->op_size == 8 ? 6 : 5;
  mv_emit_bit_index(t, i);
  if (in->op_size == 4) { /* movsxd t1, t1d                                  */
    e_rexw(e, MV_T1, 0, MV_T1);
    e8(e, 0x63);
    e_modrm(e, 3, MV_T1, MV_T1);
  }
  e_rexw(e, 0, 0, MV_T1); /* sar t1, shift                                   */
  e8(e, 0xc1);
  e_modrm(e, 3, 7, MV_T1);
  e8(e, shift);
  e_lea(e, MV_T0, MV_T0, MV_T1, in->op_size, 0, false);
}

/* The check of an operand at a constant address: the TLB entry is known. */
static void emit_check_const(struct tr *t, struct access *a, struct cold *c, uint64_t ea) {
  struct mv_emit *e = &t->e;
  unsigned index = (ea >> 12) & (MV_TLB_SIZE - 1);
  uint32_t entry = MV_DBT(tlb[0][0]) +
                   (priv_of(t) * MV_TLB_SIZE + index) * (uint32_t)sizeof(struct mv_tlb_entry);
  uint64_t page = ea & ~0xfffull;
  uint32_t tag = entry + (a->run_acc & MV_ACC_W ? 8 : 0);
  if (fits32((int64_t)page)) { /* cmp qword gs:[tag], imm32                   */
    e8(e, 0x65), e8(e, 0x48), e8(e, 0x81);
    e_modrm(e, 0, 7, 4);
    e8(e, 0x25);
    e32(e, tag);
    e32(e, (uint32_t)page);
  } else {
    e_mov_imm(e, MV_T0, page);
    e_gs_abs(e, 0x3b, MV_T0, tag);
  }
  c->ea_known = true;
  c->ea = ea;
  c->from = e_jcc(e, 5);
  e_load(e, MV_T0, entry + (uint32_t)offsetof(struct mv_tlb_entry, hva));
  a->at = (int32_t)(ea & 0xfff);
}

static void emit_cmp_t0(struct mv_emit *e, unsigned size) { /* cmp t0, 4096 - size */
  e_bytes(e, 0xfe8149ull | (uint64_t)(4096 - size) << 24, 7);
}

static void emit_check_tlb(struct tr *t, struct access *a, struct cold *c, unsigned size) {
  struct mv_emit *e = &t->e;
  uint32_t tlb =
      MV_DBT(tlb[0][0]) + priv_of(t) * MV_TLB_SIZE * (uint32_t)sizeof(struct mv_tlb_entry);
  uint32_t tag = tlb + (a->run_acc & MV_ACC_W ? 8 : 0);
  /* mov t1, t0;  shr t1, 7 */
  e_bytes(e, 0x07efc149f7894dull, 7);
  e_bytes(e, 0xe78141ull | (uint64_t)((MV_TLB_SIZE - 1) << 5) << 24, 7); /* and t1d, imm32 */
  e_gs_base(e, 0x33, MV_T0, MV_T1, tag);                                 /* xor t0, gs:[t1 + tag] */
  emit_cmp_t0(e, size);
  c->tag_off = tag;
  c->from = e_jcc(e, 7); /* ja                                               */
  e_gs_base(e, 0x03, MV_T0, MV_T1, tlb + (uint32_t)offsetof(struct mv_tlb_entry, hva));
}

/* Is an access made through SS? SDM 1 table 3-5. */
static unsigned stack_flag(const struct mv_insn *in, const struct access *a) {
  unsigned base = a->base != MV_REG_NONE ? a->base : in->base;
  bool other = a->modrm && in->segment != MV_REG_NONE;
  return (base == MV_RSP || base == MV_RBP) && !other ? MV_SITE_STACK : 0;
}

/* ---- last pages -------------------------------------------------------------
 * The stack, and tables at fixed addresses, are accessed in one page again and
 * again. Such an access compares with the page that its kind went to last:
 *     xor t0, gs:[last.tag];  cmp t0, 4096 - size;  ja cold
 *     add t0, gs:[last.hva]
 * which is shorter than the TLB's sequence and, for tables, takes the look-up
 * out of the chain of dependent loads. The cold part looks into the TLB and
 * remembers what it finds. Whatever drops TLB entries forgets all last pages.  */

/* Which last page the access compares with, or -1: none. */
static int last_page(struct tr *t, unsigned i, const struct access *a) {
  const struct mv_insn *in = &t->insn[i];
  if (t->b->variant)
    return -1;
  if (a->base != MV_REG_NONE)
    return a->base == MV_RSP ? 0 : -1;
  if (a->modrm && in->index != MV_REG_NONE && in->scale >= 2 && in->segment == MV_REG_NONE &&
      in->op != MV_OP_BT_MEM_REG)
    return 1 + (int)(rip_of(t, i) >> 2 & (MV_LAST_PAGES - 2));
  return -1;
}

static void emit_check_last(struct tr *t, struct access *a, struct cold *c, unsigned size,
                            unsigned index) {
  struct mv_emit *e = &t->e;
  unsigned write = a->run_acc & MV_ACC_W ? 1 : 0;
  uint32_t last = MV_DBT(last[0][0][0]) + ((priv_of(t) * 2 + write) * MV_LAST_PAGES + index) *
                                              (uint32_t)sizeof(struct mv_last_page);
  e_gs_abs(e, 0x33, MV_T0, last);
  emit_cmp_t0(e, size);
  c->kind = COLD_LAST;
  c->from = e_jcc(e, 7);
  e_gs_abs(e, 0x03, MV_T0, last + (uint32_t)offsetof(struct mv_last_page, hva));
  c->last = last;
  c->size = (uint16_t)size;
  c->resume = e->p;
  c->tag_off = MV_DBT(tlb[0][0]) +
               priv_of(t) * MV_TLB_SIZE * (uint32_t)sizeof(struct mv_tlb_entry) + write * 8;
}

uint8_t *mv_emit_last_miss(struct tr *t, struct mv_emit *c, const struct cold *s) {
  uint32_t hva = s->tag_off - (s->tag_off - MV_DBT(tlb[0][0])) % sizeof(struct mv_tlb_entry) +
                 (uint32_t)offsetof(struct mv_tlb_entry, hva);
  e_gs_abs(c, 0x33, MV_T0, s->last); /* t0 is the address again               */
  e_bytes(c, 0x07efc149f7894dull, 7);
  e_bytes(c, 0xe78141ull | (uint64_t)((MV_TLB_SIZE - 1) << 5) << 24, 7);
  e_gs_base(c, 0x33, MV_T0, MV_T1, s->tag_off);
  emit_cmp_t0(c, s->size);
  uint8_t *miss = e_jcc(c, 7);
  e_store(c, MV_DBT(borrow), MV_RAX); /* it may hold the flags                */
  e_gs_base(c, 0x8b, MV_RAX, MV_T1, s->tag_off);
  e_store(c, s->last, MV_RAX);
  e_gs_base(c, 0x8b, MV_RAX, MV_T1, hva);
  e_store(c, s->last + (uint32_t)offsetof(struct mv_last_page, hva), MV_RAX);
  e_bytes(c, 0xc60149, 3); /* add t0, rax                                     */
  e_load(c, MV_RAX, MV_DBT(borrow));
  uint8_t *back = e_jmp(c);
  e_patch(back, s->resume);
  mv_add_reloc(t, MV_RELOC_HOT, true, back, (uint32_t)(s->resume - t->x->rw) - t->hot0);
  return miss;
}

/* In a bounce block C checks, reads the operand and puts it into d->bounce. */
static void emit_bounce_in(struct tr *t, unsigned i, struct access *a) {
  uint32_t site = mv_add_site(t, i, 0);
  a->run_acc = a->acc;
  t->x->sites[site].size = a->size;
  t->x->sites[site].access = a->acc;
  t->x->sites[site].align = t->insn[i].mem_align;
  t->x->sites[site].flags = (uint8_t)stack_flag(&t->insn[i], a);
  mv_emit_site(t, site);
  e_jmp_gs(&t->e, MV_DBT(tramp[MV_TRAMP_BOUNCE_IN]));
  t->x->sites[site].restart = here(t);
  e_mov_imm(&t->e, MV_T0, (uint64_t)(uintptr_t)t->d->bounce);
  a->at = 0;
}

/* Is the operand's address known now, and the operand within a page? */
static bool constant_address(struct tr *t, unsigned i, const struct access *a, uint64_t *ea) {
  const struct mv_insn *in = &t->insn[i];
  if (a->base != MV_REG_NONE || in->segment != MV_REG_NONE || in->index != MV_REG_NONE ||
      in->op == MV_OP_BT_MEM_REG || (in->base != MV_REG_RIP && in->base != MV_REG_NONE))
    return false;
  *ea = (uint64_t)in->disp + (in->base == MV_REG_RIP ? next_rip(t, i) : 0);
  if (in->addr_size == 4)
    *ea = (uint32_t)*ea;
  return (*ea & 0xfff) + a->size <= 4096;
}

/* T0 = address of access k of instruction i, or of its run. */
static void emit_address(struct tr *t, unsigned i, const struct access *a) {
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  if (a->base != MV_REG_NONE) {
    if (guest_scratch(a->base))
      e_load(e, MV_T0, MV_DBT_GPR(a->base));
    e_lea(e, MV_T0, guest_scratch(a->base) ? MV_T0 : a->base, MV_REG_NONE, 1, a->run_lo + a->moved,
          false);
  } else {
    emit_ea(t, i, a->modrm && in->op == MV_OP_POP && in->base == MV_RSP ? in->op_size : 0);
  }
}

static void emit_access_bounce(struct tr *t, unsigned i, struct access *a) {
  bool bit = t->insn[i].op == MV_OP_BT_MEM_REG && a->modrm;
  emit_address(t, i, a);
  if (bit && flags_live(t, i))
    mv_emit_flags_save(&t->e);
  if (bit)
    emit_bit_offset(t, i);
  if (bit && flags_live(t, i))
    mv_emit_flags_restore(&t->e);
  emit_bounce_in(t, i, a);
}

void mv_emit_check(struct tr *t, unsigned at, unsigned i, unsigned k) {
  struct access *a = &t->acc[i][k];
  const struct mv_insn *in = &t->insn[i];
  struct mv_emit *e = &t->e;
  uint32_t restart = here(t);
  bool live = flags_live(t, at);
  unsigned size = a->base != MV_REG_NONE ? a->run_size : a->size;
  uint64_t ea = 0;
  bool constant = constant_address(t, i, a, &ea);
  a->checked = true;
  if (a->base == MV_REG_NONE)
    a->run_acc = a->acc;
  if (!constant)
    emit_address(t, i, a);
  if (live)
    mv_emit_flags_save(e);
  if (in->op == MV_OP_BT_MEM_REG && a->modrm)
    emit_bit_offset(t, i);

  uint32_t site = mv_add_site(t, at, restart);
  struct mv_site *s = &t->x->sites[site];
  s->size = (uint16_t)size;
  s->access = a->run_acc;
  s->flags = size != a->size || a->run_acc != a->acc || at != i ? MV_SITE_COALESCED : 0;
  s->flags |= (uint8_t)stack_flag(in, a);
  s->align = in->mem_align;
  struct cold *c = mv_add_cold(t, COLD_MEM, NULL, site);
  c->flags_saved = live;
  int last = last_page(t, i, a);
  if (constant)
    emit_check_const(t, a, c, ea);
  else if (last >= 0)
    emit_check_last(t, a, c, size, (unsigned)last);
  else
    emit_check_tlb(t, a, c, size);
  if (live)
    mv_emit_flags_restore(e);
}

int32_t mv_emit_access(struct tr *t, unsigned i, unsigned k) {
  struct access *a = &t->acc[i][k];
  if (a->starts && !a->checked && t->b->variant & MV_VAR_BOUNCE)
    emit_access_bounce(t, i, a);
  else if (a->starts && !a->checked)
    mv_emit_check(t, i, i, k);
  return a->at;
}

void mv_emit_access_done(struct tr *t, unsigned i, unsigned k) {
  if (!(t->b->variant & MV_VAR_BOUNCE) || !(t->acc[i][k].run_acc & MV_ACC_W))
    return;
  uint32_t site = mv_add_site(t, i, 0);
  t->x->sites[site].size = t->acc[i][k].size;
  mv_emit_site(t, site);
  e_jmp_gs(&t->e, MV_DBT(tramp[MV_TRAMP_BOUNCE_OUT]));
  t->x->sites[site].restart = here(t);
}
