/*
 * The translator's system level against a flat memory (tests/unit/test_system.py
 * compiles and runs it: one process a test, named on the command line).
 *
 * Guest virtual memory is the array `ram` at address 0. A page may be made
 * absent or read-only. Instructions come as bytes, through the real decoder.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "apic.h"
#include "clock.h"
#include "mv/layout.h"
#include "system.h"

#define RAM_SIZE (1u << 20)
static uint8_t ram[RAM_SIZE] __attribute__((aligned(4096)));
static uint8_t absent[RAM_SIZE >> 12], kernel_only[RAM_SIZE >> 12], read_only[RAM_SIZE >> 12];
static unsigned flushes_all, flushes_nonglobal, mode_changes;
static _Atomic unsigned pokes;
static struct mv_vm vm;
static struct mv_vcpu vcpu, vcpu1;
static struct mv_dbt dbt, dbt1, *const d = &dbt;

#define CHECK(cond)                                                                                \
  do {                                                                                             \
    if (!(cond)) {                                                                                 \
      fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #cond);                         \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)
#define EQ(a, b)                                                                                   \
  do {                                                                                             \
    unsigned long long a_ = (unsigned long long)(a), b_ = (unsigned long long)(b);                 \
    if (a_ != b_) {                                                                                \
      fprintf(stderr, "%s:%d: %s is %#llx, not %#llx\n", __FILE__, __LINE__, #a, a_, b_);          \
      exit(1);                                                                                     \
    }                                                                                              \
  } while (0)

/* ---- what the other rooms provide ------------------------------------------------ */

int mv_dbt_raise(struct mv_dbt *v, unsigned vector) {
  v->exc_vector = (uint8_t)vector;
  v->exc_has_code = false;
  v->exc_code = 0;
  return -1;
}
int mv_dbt_raise_code(struct mv_dbt *v, unsigned vector, uint32_t code) {
  mv_dbt_raise(v, vector);
  v->exc_has_code = true;
  v->exc_code = code;
  return -1;
}
int mv_dbt_raise_pf(struct mv_dbt *v, uint64_t gva, uint32_t code) {
  v->cr2 = gva;
  return mv_dbt_raise_code(v, MV_EXC_PF, code);
}
static int check(struct mv_dbt *v, uint64_t gva, unsigned len, bool write, enum mv_mmu_as as) {
  if (!mv_is_canonical(gva))
    return mv_dbt_raise_code(v, MV_EXC_GP, 0);
  bool user = as == MV_AS_CPL && v->cpl == 3;
  for (uint64_t a = gva & ~0xfffull; a < gva + len; a += 4096) {
    uint64_t at = a < gva ? gva : a;
    if (a >= RAM_SIZE || absent[a >> 12])
      return mv_dbt_raise_pf(v, at, (write ? 2 : 0) | (user ? 4 : 0));
    if ((user && kernel_only[a >> 12]) || (write && read_only[a >> 12]))
      return mv_dbt_raise_pf(v, at, 1 | (write ? 2 : 0) | (user ? 4 : 0));
  }
  return 0;
}
int mv_mmu_read(struct mv_dbt *v, uint64_t gva, void *buf, unsigned len, enum mv_mmu_as as) {
  if (check(v, gva, len, false, as) < 0)
    return -1;
  memcpy(buf, ram + gva, len);
  return 0;
}
int mv_mmu_write(struct mv_dbt *v, uint64_t gva, const void *buf, unsigned len, enum mv_mmu_as as) {
  if (check(v, gva, len, true, as) < 0)
    return -1;
  memcpy(ram + gva, buf, len);
  return 0;
}
void mv_mmu_flush_all(struct mv_dbt *v) {
  (void)v;
  flushes_all++;
}
void mv_mmu_flush_nonglobal(struct mv_dbt *v) {
  (void)v;
  flushes_nonglobal++;
}
static uint64_t flushed_page;
void mv_mmu_flush_page(struct mv_dbt *v, uint64_t gva) {
  (void)v;
  flushed_page = gva;
}
void mv_mmu_mode_changed(struct mv_dbt *v) {
  (void)v;
  mode_changes++;
}
static uint64_t io_value = 0x11223344, io_port;
static unsigned io_len, io_writes;
int mv_dbt_port_io(struct mv_dbt *v, uint16_t port, uint64_t *value, unsigned len, bool write) {
  (void)v;
  io_port = port;
  io_len = len;
  if (write) {
    io_value = *value;
    io_writes++;
  } else {
    *value = io_value;
  }
  return 0;
}
void mv_dbt_poke(struct mv_dbt *v) {
  (void)v;
  pokes++;
}
void mv_dbt_fpu_save(struct mv_dbt *v) {
  (void)v;
}
void *mv_mem_ptr(const struct mv_mem *mem, uint64_t gpa, uint64_t len) {
  (void)mem;
  return gpa < RAM_SIZE && len <= RAM_SIZE - gpa ? ram + gpa : NULL;
}
static const struct mv_io_ops *ioapic;
static void *ioapic_dev;
int mv_bus_add(struct mv_bus *bus, uint64_t base, uint64_t size, const struct mv_io_ops *ops,
               void *dev) {
  (void)bus;
  EQ(base, MV_IOAPIC_GPA);
  EQ(size, 0x1000);
  ioapic = ops;
  ioapic_dev = dev;
  return 0;
}

/* ---- a 64-bit machine ------------------------------------------------------------ */

enum {
  GDT = 0x1000,
  IDT = 0x2000,
  TSS = 0x3000,
  KSTACK = 0x8000,
  IST1 = 0x9000,
  USTACK = 0xb000,
  CODE = 0x10000,
  HANDLER = 0x20000,
  LOWTSS_RSP0 = 0xa000,
  DATA = 0x30000,
};
/* Selectors as Linux has them. */
enum { KCS = 0x10, KSS = 0x18, UCS32 = 0x23, USS = 0x2b, UCS = 0x33, TR = 0x40 };

static void put64(uint64_t at, uint64_t v) {
  memcpy(ram + at, &v, 8);
}
static uint64_t get64(uint64_t at) {
  uint64_t v;
  memcpy(&v, ram + at, 8);
  return v;
}
static uint32_t get32(uint64_t at) {
  return (uint32_t)get64(at);
}

static void put_gate(unsigned vector, uint64_t rip, unsigned type, unsigned dpl, unsigned ist) {
  uint64_t lo = (rip & 0xffff) | (uint64_t)KCS << 16 | (uint64_t)ist << 32 |
                (uint64_t)(0x80 | dpl << 5 | type) << 40 | (rip >> 16 & 0xffff) << 48;
  put64(IDT + vector * 16, lo);
  put64(IDT + vector * 16 + 8, rip >> 32);
}

static void put_descriptors(void) {
  put64(GDT + KCS, 0x00af9b000000ffff);
  put64(GDT + KSS, 0x00cf93000000ffff);
  put64(GDT + 0x20, 0x00cffb000000ffff);
  put64(GDT + 0x28, 0x00cff3000000ffff);
  put64(GDT + 0x30, 0x00affb000000ffff);
  put64(GDT + TR, 0x00008b000000206f | (uint64_t)TSS << 16); /* limit 0x206f */
  put64(GDT + TR + 8, 0);
}

static void go_long(struct mv_dbt *v) {
  v->cr0 = 0x80050033;
  v->cr4 = MV_CR4_PAE | MV_CR4_PGE;
  v->efer = MV_EFER_SCE | MV_EFER_LME | MV_EFER_LMA | MV_EFER_NXE;
  v->gdt = (struct mv_dtr){.base = GDT, .limit = 0x4f};
  v->idt = (struct mv_dtr){.base = IDT, .limit = 0xfff};
  v->seg[MV_SEG_CS] = mv_desc_seg(KCS, get64(GDT + KCS));
  v->seg[MV_SEG_SS] = mv_desc_seg(KSS, get64(GDT + KSS));
  v->seg[MV_SEG_TR] = mv_desc_seg(TR, get64(GDT + TR));
  v->star = (uint64_t)0x23 << 48 | (uint64_t)KCS << 32;
  v->lstar = HANDLER;
  v->sfmask = 0x47700;
  v->cpl = 0;
  v->halted = false;
  v->gpr[MV_RSP] = KSTACK;
  v->rip = CODE;
  mv_dbt_set_rflags(v, 0x202);
}

static void machine(void) {
  vcpu.vm = vcpu1.vm = &vm;
  vcpu1.id = 1;
  d->vm = &vm;
  d->vcpu = &vcpu;
  EQ(mv_system_init(d), 0);
  put_descriptors();
  for (unsigned i = 0; i < 256; i++)
    put_gate(i, HANDLER + i * 16, 14, 0, 0);
  put64(TSS + 4, LOWTSS_RSP0);
  put64(TSS + 36, IST1);
  go_long(d);
}

static void to_user(void) {
  d->seg[MV_SEG_CS] = mv_desc_seg(UCS, get64(GDT + 0x30));
  d->seg[MV_SEG_SS] = mv_desc_seg(USS, get64(GDT + 0x28));
  d->cpl = 3;
  d->gpr[MV_RSP] = USTACK;
}

/* Runs one instruction, given in hex. */
static int run(const char *hex) {
  uint8_t bytes[15] = {0};
  unsigned n = 0;
  struct mv_insn insn;
  for (; hex[2 * n]; n++) {
    unsigned b;
    CHECK(sscanf(hex + 2 * n, "%2x", &b) == 1);
    bytes[n] = (uint8_t)b;
  }
  int mode = mv_is_code64(d)                      ? MV_MODE_64
             : d->seg[MV_SEG_CS].attr & MV_SEG_DB ? MV_MODE_32
                                                  : MV_MODE_16;
  int status = mv_decode(&insn, bytes, sizeof(bytes), mode);
  if (status == MV_DECODE_UD || insn.cls == MV_CLASS_UD)
    return mv_dbt_raise(d, MV_EXC_UD);
  EQ(status, MV_DECODE_OK);
  EQ(insn.len, n);
  return mv_system_exec(d, &insn);
}

#define OK(hex) EQ(run(hex), 0)
#define FAULTS(hex, vector, code)                                                                  \
  do {                                                                                             \
    uint64_t rip_ = d->rip, rsp_ = d->gpr[MV_RSP];                                                 \
    EQ(run(hex), (uint64_t)-1);                                                                    \
    EQ(d->exc_vector, vector);                                                                     \
    EQ(d->exc_code, code);                                                                         \
    EQ(d->rip, rip_);                                                                              \
    EQ(d->gpr[MV_RSP], rsp_);                                                                      \
  } while (0)

#define TEST(name) static void name(void)

/* ---- delivery -------------------------------------------------------------------- */

TEST(exception_at_cpl0_pushes_five_words_on_aligned_stack) {
  d->gpr[MV_RSP] = KSTACK - 4;
  mv_dbt_set_rflags(d, 0x246 | MV_FL_TF);
  mv_dbt_raise(d, MV_EXC_UD);
  EQ(mv_system_deliver(d), 0);
  uint64_t sp = KSTACK - 16 - 40;
  EQ(d->gpr[MV_RSP], sp);
  EQ(get64(sp), CODE);
  EQ(get64(sp + 8), KCS);
  EQ(get64(sp + 16), 0x246 | MV_FL_TF | MV_FL_RF);
  EQ(get64(sp + 24), KSTACK - 4);
  EQ(get64(sp + 32), KSS);
  EQ(d->rip, HANDLER + MV_EXC_UD * 16);
  EQ(mv_dbt_rflags(d), 0x46);
  EQ(d->seg[MV_SEG_SS].sel, KSS);
}

TEST(exception_from_user_switches_to_rsp0_and_null_ss) {
  to_user();
  mode_changes = 0;
  mv_dbt_raise_pf(d, 0x1234, 6);
  EQ(mv_system_deliver(d), 0);
  uint64_t sp = LOWTSS_RSP0 - 48;
  EQ(d->gpr[MV_RSP], sp);
  EQ(get64(sp), 6);
  EQ(get64(sp + 16), UCS);
  EQ(get64(sp + 32), USTACK);
  EQ(get64(sp + 40), USS);
  EQ(d->cpl, 0);
  EQ(d->seg[MV_SEG_CS].sel, KCS);
  EQ(d->seg[MV_SEG_SS].sel, 0);
  EQ(d->cr2, 0x1234);
  CHECK(mode_changes > 0);
}

TEST(gate_with_ist_switches_stack_at_same_level) {
  put_gate(MV_EXC_NMI, HANDLER, 14, 0, 1);
  EQ(mv_system_interrupt(d, MV_EXC_NMI, false), 0);
  EQ(d->gpr[MV_RSP], IST1 - 40);
  EQ(get64(IST1 - 16), KSTACK);
}

TEST(trap_gate_keeps_if) {
  put_gate(0x80, HANDLER, 15, 3, 0);
  to_user();
  OK("cd80");
  EQ(d->eflags & MV_FL_IF, MV_FL_IF);
  EQ(get64(d->gpr[MV_RSP]), CODE + 2);
  EQ(get64(d->gpr[MV_RSP] + 16) & MV_FL_RF, 0);
}

TEST(int_n_from_user_through_kernel_gate_is_gp) {
  to_user();
  FAULTS("cd80", MV_EXC_GP, 0x80 * 8 + 2);
}

TEST(hardware_interrupt_ignores_gate_dpl) {
  to_user();
  EQ(mv_system_interrupt(d, 0x80, false), 0);
  EQ(d->cpl, 0);
}

TEST(int3_from_user_needs_dpl3) {
  to_user();
  FAULTS("cc", MV_EXC_GP, 3 * 8 + 2);
  put_gate(3, HANDLER, 14, 3, 0);
  OK("cc");
  EQ(get64(d->gpr[MV_RSP]), CODE + 1);
}

TEST(int1_ignores_gate_dpl) {
  to_user();
  OK("f1");
  EQ(d->rip, HANDLER + 16);
}

TEST(gate_not_present_is_np) {
  put64(IDT + 0x81 * 16, get64(IDT + 0x81 * 16) & ~(1ull << 47));
  FAULTS("cd81", MV_EXC_NP, 0x81 * 8 + 2);
}

TEST(gate_beyond_limit_is_gp) {
  d->idt.limit = 0x81 * 16 + 14;
  FAULTS("cd81", MV_EXC_GP, 0x81 * 8 + 2);
}

TEST(gate_of_wrong_type_is_gp) {
  put_gate(0x81, HANDLER, 5, 0, 0);
  FAULTS("cd81", MV_EXC_GP, 0x81 * 8 + 2);
}

TEST(gate_with_noncanonical_target_is_gp0) {
  put_gate(0x81, 1ull << 47, 14, 0, 0);
  FAULTS("cd81", MV_EXC_GP, 0);
}

TEST(gate_to_32_bit_code_is_gp_selector) {
  put64(GDT + KCS, 0x00cf9b000000ffff);
  FAULTS("cd81", MV_EXC_GP, KCS);
}

TEST(tss_too_short_is_ts) {
  d->seg[MV_SEG_TR].limit = 10;
  put_gate(0x81, HANDLER, 14, 3, 0);
  to_user();
  FAULTS("cd81", MV_EXC_TS, TR);
}

TEST(noncanonical_stack_is_ss) {
  put64(TSS + 36, 1ull << 47);
  put_gate(0x81, HANDLER, 14, 0, 1);
  FAULTS("cd81", MV_EXC_SS, 0);
}

TEST(fault_in_delivery_of_interrupt_is_delivered_with_ext) {
  put64(IDT + 0x81 * 16, get64(IDT + 0x81 * 16) & ~(1ull << 47));
  EQ(mv_system_interrupt(d, 0x81, false), 0);
  EQ(d->rip, HANDLER + MV_EXC_NP * 16);
  EQ(get64(d->gpr[MV_RSP]), 0x81 * 8 + 3);
}

TEST(page_fault_in_page_fault_is_double_fault) {
  put_gate(MV_EXC_DF, HANDLER, 14, 0, 1);
  absent[(KSTACK - 1) >> 12] = 1;
  mv_dbt_raise_pf(d, 0x1234, 0);
  EQ(mv_system_deliver(d), 0);
  EQ(d->gpr[MV_RSP], IST1 - 48);
  EQ(get64(IST1 - 48), 0);
  EQ(get64(IST1 - 40), CODE);
  EQ(get64(IST1 - 24) & MV_FL_RF, 0);
  EQ(d->cr2, KSTACK - 48);
}

TEST(contributory_pair_is_double_fault) {
  put64(IDT + MV_EXC_GP * 16, 0);
  put_gate(MV_EXC_DF, HANDLER, 14, 0, 0);
  mv_dbt_raise_code(d, MV_EXC_GP, 0);
  EQ(mv_system_deliver(d), 0);
  EQ(d->rip, HANDLER);
}

TEST(benign_then_contributory_is_served_in_turn) {
  put64(IDT + MV_EXC_UD * 16, 0);
  mv_dbt_raise(d, MV_EXC_UD);
  EQ(mv_system_deliver(d), 0);
  EQ(d->rip, HANDLER + MV_EXC_GP * 16);
  EQ(get64(d->gpr[MV_RSP]), MV_EXC_UD * 8 + 3);
}

TEST(contributory_then_page_fault_is_page_fault) {
  put_gate(MV_EXC_PF, HANDLER, 14, 0, 1);
  absent[(KSTACK - 1) >> 12] = 1;
  mv_dbt_raise_code(d, MV_EXC_GP, 0);
  EQ(mv_system_deliver(d), 0);
  EQ(d->gpr[MV_RSP], IST1 - 48);
  EQ(get64(IST1 - 48), 2);
}

TEST(fault_in_double_fault_is_triple_fault) {
  d->idt.limit = 0;
  uint64_t rip = d->rip;
  mv_dbt_raise_code(d, MV_EXC_GP, 0);
  EQ(mv_system_deliver(d), (uint64_t)-1);
  EQ(d->rip, rip);
}

TEST(accessed_bit_of_handler_segment_is_set) {
  put64(GDT + KCS, get64(GDT + KCS) & ~(1ull << 40));
  EQ(mv_system_interrupt(d, 0x81, false), 0);
  CHECK(get64(GDT + KCS) & 1ull << 40);
}

TEST(real_mode_interrupt_uses_vector_table) {
  mv_system_reset(d, false);
  d->idt.limit = 0x3ff;
  d->seg[MV_SEG_SS] = mv_seg_real(0x800, d->seg[MV_SEG_SS].attr);
  d->gpr[MV_RSP] = 0x100;
  d->seg[MV_SEG_CS] = mv_seg_real(0x1000, d->seg[MV_SEG_CS].attr);
  d->rip = 0x20;
  memcpy(ram + 0x10 * 4, "\x34\x12\x00\x20", 4);
  OK("cd10");
  EQ(d->rip, 0x1234);
  EQ(d->seg[MV_SEG_CS].base, 0x20000);
  EQ(get64(0x80fa) & 0xffffffffffff, 0x000210000022);
  OK("cf");
  EQ(d->rip, 0x22);
  EQ(d->seg[MV_SEG_CS].sel, 0x1000);
  EQ(d->gpr[MV_RSP], 0x100);
}

/* ---- protected mode, 32 bits ----------------------------------------------------- */

static void go_protected(void) {
  put64(GDT + KCS, 0x00cf9b000000ffff);
  put64(GDT + TR, 0x00008b000000206f | (uint64_t)TSS << 16);
  d->efer = 0;
  d->cr0 = 0x11;
  d->seg[MV_SEG_CS] = mv_desc_seg(KCS, get64(GDT + KCS));
  d->seg[MV_SEG_DS] = d->seg[MV_SEG_SS];
  put64(IDT + 0x80 * 8,
        (uint64_t)HANDLER >> 16 << 48 | 0xee00ull << 32 | KCS << 16 | (HANDLER & 0xffff));
  uint32_t esp0[2] = {LOWTSS_RSP0, KSS};
  memcpy(ram + TSS + 4, esp0, 8);
}

TEST(protected_mode_inner_interrupt_and_iret_round_trip) {
  go_protected();
  d->seg[MV_SEG_CS] = mv_desc_seg(UCS32, get64(GDT + 0x20));
  d->seg[MV_SEG_SS] = mv_desc_seg(USS, get64(GDT + 0x28));
  d->cpl = 3;
  d->gpr[MV_RSP] = USTACK;
  OK("cd80");
  EQ(d->rip, HANDLER);
  EQ(d->cpl, 0);
  EQ(d->seg[MV_SEG_SS].sel, KSS);
  EQ(d->gpr[MV_RSP], LOWTSS_RSP0 - 20);
  EQ(get32(LOWTSS_RSP0 - 20), CODE + 2);
  EQ(get32(LOWTSS_RSP0 - 8), USTACK);
  OK("cf");
  EQ(d->rip, CODE + 2);
  EQ(d->cpl, 3);
  EQ(d->gpr[MV_RSP], USTACK);
  EQ(d->seg[MV_SEG_SS].sel, USS);
}

TEST(real_mode_to_long_mode_as_a_second_cpu_does) {
  mv_system_reset(d, false);
  memcpy(ram + DATA, "\x4f\x00\x00\x10\x00\x00", 6);
  d->seg[MV_SEG_DS] = mv_seg_real(DATA >> 4, d->seg[MV_SEG_DS].attr);
  OK("0f01160000"); /* lgdt [0] */
  EQ(d->gdt.base, GDT);
  EQ(d->gdt.limit, 0x4f);
  d->gpr[MV_RAX] = 0x11;
  OK("0f22c0");
  put64(GDT + 0x48, 0x00cf9b000000ffff);
  OK("66ea000001004800"); /* ljmpl $0x48, $0x10000 */
  EQ(d->rip, 0x10000);
  EQ(d->seg[MV_SEG_CS].attr & MV_SEG_DB, MV_SEG_DB);
  d->gpr[MV_RAX] = KSS;
  OK("8ed8"); /* mov ds, eax */
  EQ(d->seg[MV_SEG_DS].limit, 0xffffffff);
  d->gpr[MV_RAX] = MV_CR4_PAE;
  OK("0f22e0");
  d->gpr[MV_RCX] = 0xc0000080;
  d->gpr[MV_RAX] = MV_EFER_LME;
  d->gpr[MV_RDX] = 0;
  OK("0f30");
  EQ(d->efer, MV_EFER_LME);
  d->gpr[MV_RAX] = 0x80000011;
  OK("0f22c0");
  EQ(d->efer, MV_EFER_LME | MV_EFER_LMA);
  CHECK(!mv_is_code64(d));
  OK("ea000002001000"); /* ljmp $0x10, $0x20000 */
  CHECK(mv_is_code64(d));
  EQ(d->rip, 0x20000);
}

/* ---- IRET, far branches ---------------------------------------------------------- */

static void frame(uint64_t rip, uint64_t cs, uint64_t flags, uint64_t rsp, uint64_t ss) {
  d->gpr[MV_RSP] = KSTACK - 40;
  const uint64_t words[5] = {rip, cs, flags, rsp, ss};
  memcpy(ram + KSTACK - 40, words, 40);
}

TEST(iretq_to_user_loads_all_and_drops_kernel_segments) {
  d->seg[MV_SEG_DS] = mv_desc_seg(KSS, get64(GDT + KSS));
  d->seg[MV_SEG_ES] = mv_desc_seg(USS, get64(GDT + 0x28));
  frame(0x7fff1234, UCS, 0x10246 | MV_FL_TF, USTACK - 8, USS);
  OK("48cf");
  EQ(d->rip, 0x7fff1234);
  EQ(d->cpl, 3);
  EQ(d->gpr[MV_RSP], USTACK - 8);
  EQ(mv_dbt_rflags(d), 0x10246 | MV_FL_TF);
  EQ(d->seg[MV_SEG_CS].sel, UCS);
  EQ(d->seg[MV_SEG_SS].sel, USS);
  EQ(d->seg[MV_SEG_DS].sel, 0);
  EQ(d->seg[MV_SEG_ES].sel, USS);
}

TEST(iretq_to_compatibility_mode) {
  frame(0x1234, UCS32, 0x202, USTACK, USS);
  OK("48cf");
  EQ(d->seg[MV_SEG_CS].attr & MV_SEG_L, 0);
  EQ(d->rip, 0x1234);
  CHECK(!mv_is_code64(d));
}

TEST(iretq_same_level_restores_rsp_and_null_ss) {
  frame(0x1234, KCS, 0x2, KSTACK + 0x100, 0);
  OK("48cf");
  EQ(d->gpr[MV_RSP], KSTACK + 0x100);
  EQ(d->seg[MV_SEG_SS].sel, 0);
  EQ(d->cpl, 0);
}

TEST(iretq_bad_frames_fault_and_change_nothing) {
  frame(1ull << 47, UCS, 0x202, USTACK, USS);
  FAULTS("48cf", MV_EXC_GP, 0);
  frame(0, 3, 0x202, USTACK, USS);
  FAULTS("48cf", MV_EXC_GP, 0);
  frame(0, 0x203, 0x202, USTACK, USS);
  FAULTS("48cf", MV_EXC_GP, 0x200);
  frame(0, USS, 0x202, USTACK, USS);
  FAULTS("48cf", MV_EXC_GP, 0x28);
  frame(0, UCS, 0x202, USTACK, 3);
  FAULTS("48cf", MV_EXC_GP, 0);
  frame(0, UCS, 0x202, USTACK, KSS);
  FAULTS("48cf", MV_EXC_GP, KSS);
  put64(GDT + 0x28, get64(GDT + 0x28) & ~(1ull << 47));
  frame(0, UCS, 0x202, USTACK, USS);
  FAULTS("48cf", MV_EXC_SS, 0x28);
  put64(GDT + 0x30, get64(GDT + 0x30) & ~(1ull << 47));
  FAULTS("48cf", MV_EXC_NP, 0x30);
  d->eflags |= MV_FL_NT;
  frame(0, KCS, 0x202, KSTACK, KSS);
  FAULTS("48cf", MV_EXC_GP, 0);
}

TEST(iretq_to_inner_level_is_gp) {
  to_user();
  const uint64_t words[5] = {0, KCS, 2, KSTACK, KSS};
  memcpy(ram + USTACK - 40, words, 40);
  d->gpr[MV_RSP] = USTACK - 40;
  FAULTS("48cf", MV_EXC_GP, KCS);
}

TEST(iret_in_user_cannot_change_if_or_iopl) {
  to_user();
  const uint64_t words[5] = {0x1234, UCS, 0x3046, USTACK, USS};
  memcpy(ram + USTACK - 40, words, 40);
  d->gpr[MV_RSP] = USTACK - 40;
  OK("48cf");
  EQ(mv_dbt_rflags(d), 0x246);
}

TEST(iret_stack_fault_is_a_page_fault) {
  frame(0, UCS, 2, 0, USS);
  absent[(KSTACK - 40) >> 12] = 1;
  FAULTS("48cf", MV_EXC_PF, 0);
  EQ(d->cr2, KSTACK - 40);
}

TEST(retfq_same_level_and_to_user) {
  d->gpr[MV_RSP] = KSTACK - 32;
  put64(KSTACK - 32, 0x5000);
  put64(KSTACK - 24, KCS);
  OK("48cb");
  EQ(d->rip, 0x5000);
  EQ(d->gpr[MV_RSP], KSTACK - 16);
  d->gpr[MV_RSP] = KSTACK - 32;
  put64(KSTACK - 24, UCS);
  put64(KSTACK - 16, USTACK);
  put64(KSTACK - 8, USS);
  OK("48cb");
  EQ(d->cpl, 3);
  EQ(d->gpr[MV_RSP], USTACK);
}

TEST(far_jump_and_call_through_memory) {
  put64(DATA, 0x12345678);
  put64(DATA + 4, KCS);
  d->gpr[MV_RBX] = DATA;
  OK("ff2b"); /* jmp far [rbx], 16:32 */
  EQ(d->rip, 0x12345678);
  put64(DATA + 8, KCS);
  put64(DATA, 0x1000);
  OK("48ff1b"); /* call far [rbx], 16:64 */
  EQ(d->rip, 0x1000);
  EQ(get64(KSTACK - 16), 0x12345678 + 3);
  EQ(get64(KSTACK - 8), KCS);
  put64(DATA + 8, UCS);
  FAULTS("48ff2b", MV_EXC_GP, UCS & ~3u);
  put64(DATA + 8, 0);
  FAULTS("48ff2b", MV_EXC_GP, 0);
}

/* ---- SYSCALL and its kin --------------------------------------------------------- */

TEST(syscall_and_sysret_round_trip) {
  to_user();
  mv_dbt_set_rflags(d, 0x10a47);
  OK("0f05");
  EQ(d->rip, HANDLER);
  EQ(d->gpr[MV_RCX], CODE + 2);
  EQ(d->gpr[MV_R11], 0xa47);
  EQ(mv_dbt_rflags(d), 0x847 & ~0x700u);
  EQ(d->seg[MV_SEG_CS].sel, KCS);
  EQ(d->seg[MV_SEG_SS].sel, KSS);
  EQ(d->seg[MV_SEG_CS].attr, mv_desc_attr(get64(GDT + KCS)));
  EQ(d->seg[MV_SEG_SS].attr, mv_desc_attr(get64(GDT + KSS)));
  EQ(d->cpl, 0);
  EQ(d->gpr[MV_RSP], USTACK);
  OK("480f07");
  EQ(d->rip, CODE + 2);
  EQ(d->seg[MV_SEG_CS].sel, UCS);
  EQ(d->seg[MV_SEG_SS].sel, USS);
  EQ(d->seg[MV_SEG_CS].attr, mv_desc_attr(get64(GDT + 0x30)));
  EQ(d->seg[MV_SEG_SS].attr, mv_desc_attr(get64(GDT + 0x28)));
  EQ(d->cpl, 3);
  EQ(mv_dbt_rflags(d), 0xa47);
}

TEST(sysret_to_compatibility_mode) {
  d->gpr[MV_RCX] = 0x100001234;
  d->gpr[MV_R11] = 0x202;
  OK("0f07");
  EQ(d->rip, 0x1234);
  EQ(d->seg[MV_SEG_CS].sel, 0x23);
  CHECK(!mv_is_code64(d));
}

TEST(sysret_bad_uses_fault) {
  d->gpr[MV_RCX] = 1ull << 47;
  FAULTS("480f07", MV_EXC_GP, 0);
  d->gpr[MV_RCX] = 0;
  d->efer &= ~(uint64_t)MV_EFER_SCE;
  FAULTS("480f07", MV_EXC_UD, 0);
  FAULTS("0f05", MV_EXC_UD, 0);
  d->efer |= MV_EFER_SCE;
  to_user();
  FAULTS("480f07", MV_EXC_GP, 0);
}

TEST(syscall_from_compatibility_mode_by_vendor) {
  to_user();
  d->seg[MV_SEG_CS] = mv_desc_seg(UCS32, get64(GDT + 0x20));
  d->cstar = HANDLER + 0x100;
  d->sys->amd = false;
  FAULTS("0f05", MV_EXC_UD, 0);
  d->sys->amd = true;
  OK("0f05");
  EQ(d->rip, HANDLER + 0x100);
}

TEST(sysenter_and_sysexit_in_long_mode_by_vendor) {
  d->sys->amd = false;
  d->sysenter_cs = KCS;
  d->sysenter_eip = HANDLER;
  d->sysenter_esp = KSTACK - 64;
  to_user();
  OK("0f34");
  EQ(d->rip, HANDLER);
  EQ(d->gpr[MV_RSP], KSTACK - 64);
  EQ(d->cpl, 0);
  EQ(d->eflags & MV_FL_IF, 0);
  d->gpr[MV_RDX] = 0x7000;
  d->gpr[MV_RCX] = USTACK;
  OK("480f35");
  EQ(d->rip, 0x7000);
  EQ(d->gpr[MV_RSP], USTACK);
  EQ(d->seg[MV_SEG_CS].sel, KCS + 32 + 3);
  EQ(d->cpl, 3);
  d->sysenter_cs = 0;
  FAULTS("0f34", MV_EXC_GP, 0);
  d->sys->amd = true;
  FAULTS("0f34", MV_EXC_UD, 0);
}

TEST(swapgs_exchanges_bases) {
  d->seg[MV_SEG_GS].base = 0x1111;
  d->kernel_gs_base = 0xffff800000002222;
  OK("0f01f8");
  EQ(d->seg[MV_SEG_GS].base, 0xffff800000002222);
  EQ(d->kernel_gs_base, 0x1111);
  to_user();
  FAULTS("0f01f8", MV_EXC_GP, 0);
}

/* ---- privilege ------------------------------------------------------------------- */

TEST(privileged_instructions_at_cpl3_are_gp) {
  static const char *const insns[] = {
      "f4",     "0f09",   "0f08",   "0f22c0", "0f20c0", "0f22d8", "0f23c0",
      "0f21c0", "0f06",   "0f32",   "0f30",   "0f0117", "0f011f", "0f00d0",
      "0f00d8", "0f01f0", "0f013f", "fa",     "fb",     "480f07",
  };
  to_user();
  d->gpr[MV_RDI] = DATA;
  for (unsigned i = 0; i < sizeof(insns) / sizeof(insns[0]); i++)
    FAULTS(insns[i], MV_EXC_GP, 0);
}

TEST(cli_sti_at_cpl3_obey_iopl) {
  to_user();
  d->eflags |= MV_FL_IOPL;
  OK("fa");
  EQ(d->eflags & MV_FL_IF, 0);
  OK("fb");
  EQ(d->eflags & MV_FL_IF, MV_FL_IF);
  EQ(d->irq_shadow, true);
}

TEST(popf_in_user_keeps_if_and_iopl) {
  to_user();
  put64(USTACK, 0x3000 | 0x8d5);
  OK("9d");
  EQ(mv_dbt_rflags(d), 0x202 | 0x8d5);
  EQ(d->gpr[MV_RSP], USTACK + 8);
  OK("9c");
  EQ(get64(USTACK), 0x202 | 0x8d5);
}

TEST(popf_in_kernel_changes_if_iopl_ac) {
  put64(KSTACK, 0x43046);
  OK("9d");
  EQ(mv_dbt_rflags(d), 0x43046);
}

TEST(port_access_in_user_asks_the_bitmap) {
  to_user();
  put64(TSS + 102, 104);
  memset(ram + TSS + 104, 0xff, 8193);
  d->gpr[MV_RDX] = 0x600;
  FAULTS("ef", MV_EXC_GP, 0);
  ram[TSS + 104 + 0x600 / 8] = 0xf0;
  d->gpr[MV_RAX] = 0xaabbccdd;
  OK("ef");
  EQ(io_port, 0x600);
  EQ(io_len, 4);
  EQ(io_value, 0xaabbccdd);
  d->gpr[MV_RDX] = 0x601;
  FAULTS("ef", MV_EXC_GP, 0);
  OK("ec");
  EQ(d->gpr[MV_RAX], 0xaabbccdd);
  d->gpr[MV_RDX] = 0xffff;
  ram[TSS + 104 + 8191] = 0;
  ram[TSS + 104 + 8192] = 0xff;
  OK("ec");
  FAULTS("ed", MV_EXC_GP, 0);
  d->seg[MV_SEG_TR].limit = 104 + 8191;
  FAULTS("ec", MV_EXC_GP, 0);
  d->eflags |= MV_FL_IOPL;
  OK("e461");
  EQ(io_port, 0x61);
}

/* ---- control registers ----------------------------------------------------------- */

static void rax(uint64_t v) {
  d->gpr[MV_RAX] = v;
}

TEST(cr0_refuses_what_makes_no_sense) {
  rax(1ull << 32 | d->cr0);
  FAULTS("0f22c0", MV_EXC_GP, 0);
  rax(0x80050032);
  FAULTS("0f22c0", MV_EXC_GP, 0);
  rax(0xa0050033);
  FAULTS("0f22c0", MV_EXC_GP, 0);
  rax(0x00050033); /* paging off in 64-bit code */
  FAULTS("0f22c0", MV_EXC_GP, 0);
  rax(0x8005003b);
  flushes_all = 0;
  OK("0f22c0");
  EQ(d->cr0, 0x8005003b);
  EQ(flushes_all, 0);
  OK("0f06");
  EQ(d->cr0, 0x80050033);
  rax(0x80040033);
  OK("0f22c0");
  EQ(flushes_all, 1);
}

TEST(cr3_refuses_reserved_bits_and_flushes) {
  rax(1ull << 63);
  FAULTS("0f22d8", MV_EXC_GP, 0);
  rax(d->sys->phys_mask + 1);
  FAULTS("0f22d8", MV_EXC_GP, 0);
  rax(0x1018);
  OK("0f22d8");
  EQ(flushes_nonglobal, 1);
  rax(0);
  OK("0f20d8");
  EQ(d->gpr[MV_RAX], 0x1018);
}

TEST(cr4_refuses_what_is_not_offered) {
  rax(d->cr4 | MV_CR4_PCIDE);
  FAULTS("0f22e0", MV_EXC_GP, 0);
  rax(d->cr4 | 1 << 12);
  FAULTS("0f22e0", MV_EXC_GP, 0);
  rax(d->cr4 | MV_CR4_SMAP);
  FAULTS("0f22e0", MV_EXC_GP, 0);
  rax(d->cr4 & ~(uint64_t)MV_CR4_PAE);
  FAULTS("0f22e0", MV_EXC_GP, 0);
  rax(d->cr4 ^ MV_CR4_PGE);
  flushes_all = 0;
  OK("0f22e0");
  EQ(flushes_all, 1);
}

TEST(cr8_is_the_task_priority) {
  rax(16);
  FAULTS("440f22c0", MV_EXC_GP, 0);
  rax(5);
  OK("440f22c0");
  rax(0);
  OK("440f20c0");
  EQ(d->gpr[MV_RAX], 5);
  EQ(mv_lapic_mmio_read(d->lapic, 0x80, 4), 0x50);
}

TEST(undefined_control_registers_are_ud) {
  FAULTS("0f20c8", MV_EXC_UD, 0);
  FAULTS("0f22e8", MV_EXC_UD, 0);
}

TEST(invlpg_flushes_with_segment_base) {
  d->gpr[MV_RDI] = 0x5123;
  d->seg[MV_SEG_GS].base = 0x10000;
  OK("650f013f");
  EQ(flushed_page, 0x15123);
}

TEST(debug_registers_alias_and_general_detect) {
  rax(0xffff0ff0 | 1);
  OK("0f23e0"); /* dr4 is dr6 */
  EQ(d->dr[6], 0xffff0ff1);
  d->cr4 |= MV_CR4_DE;
  FAULTS("0f23e0", MV_EXC_UD, 0);
  rax(1ull << 32);
  FAULTS("0f23f8", MV_EXC_GP, 0);
  rax(0x2000);
  OK("0f23f8");
  FAULTS("0f21c0", MV_EXC_DB, 0);
  CHECK(d->dr[6] & 1 << 13);
}

TEST(xsetbv_checks_components) {
  d->gpr[MV_RCX] = d->gpr[MV_RDX] = 0;
  rax(7);
  FAULTS("0f01d1", MV_EXC_UD, 0);
  d->cr4 |= MV_CR4_OSXSAVE;
  d->sys->xcr0_allowed = 7;
  OK("0f01d1");
  EQ(d->xcr0, 7);
  rax(5);
  FAULTS("0f01d1", MV_EXC_GP, 0);
  rax(6);
  FAULTS("0f01d1", MV_EXC_GP, 0);
  rax(0xf);
  FAULTS("0f01d1", MV_EXC_GP, 0);
  OK("0f01d0");
  EQ(d->gpr[MV_RAX], 7);
  d->gpr[MV_RCX] = 2;
  FAULTS("0f01d0", MV_EXC_GP, 0);
}

/* ---- segments -------------------------------------------------------------------- */

TEST(mov_to_ss_shadows_interrupts) {
  rax(KSS);
  OK("8ed0");
  EQ(d->irq_shadow, true);
  OK("fa");
  EQ(d->irq_shadow, false);
}

TEST(segment_loads_check_descriptors) {
  rax(KCS);
  FAULTS("8ed0", MV_EXC_GP, KCS); /* code in SS */
  rax(0x200);
  FAULTS("8ed8", MV_EXC_GP, 0x200); /* beyond the GDT */
  rax(TR);
  FAULTS("8ed8", MV_EXC_GP, TR); /* system segment */
  rax(0);
  OK("8ed8");
  OK("8ed0"); /* null SS at CPL 0 in 64-bit mode */
  rax(3);
  FAULTS("8ed0", MV_EXC_GP, 0);
  to_user();
  rax(0);
  FAULTS("8ed0", MV_EXC_GP, 0);
  rax(KSS);
  FAULTS("8ed8", MV_EXC_GP, KSS);
  rax(USS);
  OK("8ed8");
  put64(GDT + 0x28, get64(GDT + 0x28) & ~(1ull << 47));
  FAULTS("8ed8", MV_EXC_NP, 0x28);
  FAULTS("8ed0", MV_EXC_SS, 0x28);
  FAULTS("8ec8", MV_EXC_UD, 0); /* MOV CS */
}

TEST(null_selector_in_fs_clears_base) {
  d->seg[MV_SEG_FS].base = 0x1234;
  rax(0);
  OK("8ee0");
  EQ(d->seg[MV_SEG_FS].base, 0);
  put64(GDT + 0x48, 0x12cff33456780fff);
  rax(0x4b);
  OK("8ee0");
  EQ(d->seg[MV_SEG_FS].base, 0x12345678);
}

TEST(push_and_pop_of_segments) {
  d->seg[MV_SEG_FS].sel = 0x2b;
  OK("0fa0");
  EQ(d->gpr[MV_RSP], KSTACK - 8);
  EQ(get64(KSTACK - 8), 0x2b);
  OK("0fa9");
  EQ(d->seg[MV_SEG_GS].sel, 0x2b);
  EQ(d->gpr[MV_RSP], KSTACK);
}

TEST(lss_loads_offset_and_selector) {
  put64(DATA, 0x1122334455667788);
  put64(DATA + 8, KSS);
  d->gpr[MV_RDI] = DATA;
  OK("480fb227");
  EQ(d->gpr[MV_RSP], 0x1122334455667788);
  EQ(d->seg[MV_SEG_SS].sel, KSS);
}

TEST(lgdt_sgdt_round_trip) {
  memcpy(ram + DATA, "\xff\x0f\x00\x10\x00\x00\x00\x80\xff\xff", 10);
  d->gpr[MV_RDI] = DATA;
  OK("0f0117");
  EQ(d->gdt.base, 0xffff800000001000);
  EQ(d->gdt.limit, 0xfff);
  d->gpr[MV_RDI] = DATA + 16;
  OK("0f0107");
  CHECK(memcmp(ram + DATA, ram + DATA + 16, 10) == 0);
  ram[DATA + 9] = 0x7f;
  d->gpr[MV_RDI] = DATA;
  FAULTS("0f0117", MV_EXC_GP, 0);
  d->gpr[MV_RDI] = DATA + 32;
  OK("0f010f");
  EQ(get64(DATA + 34), IDT);
}

TEST(ltr_marks_busy_and_refuses_twice) {
  put64(GDT + TR, get64(GDT + TR) & ~(2ull << 40));
  rax(TR);
  OK("0f00d8");
  EQ(ram[GDT + TR + 5], 0x8b);
  EQ(d->seg[MV_SEG_TR].base, TSS);
  FAULTS("0f00d8", MV_EXC_GP, TR);
  rax(0);
  FAULTS("0f00d8", MV_EXC_GP, 0);
  OK("0f00d0"); /* lldt 0 */
  rax(~0ull);
  OK("0f00c8"); /* str eax */
  EQ(d->gpr[MV_RAX], TR);
}

TEST(lar_lsl_verr_verw_tell_rights) {
  d->flags = 0;
  rax(USS);
  OK("0f02c8"); /* lar ecx, eax */
  EQ(d->flags, MV_F_ZF);
  EQ(d->gpr[MV_RCX], 0xcff300);
  OK("0f03c8");
  EQ(d->gpr[MV_RCX], 0xffffffff);
  OK("0f00e8"); /* verw */
  EQ(d->flags, MV_F_ZF);
  rax(UCS);
  OK("0f00e8");
  EQ(d->flags, 0);
  OK("0f00e0"); /* verr */
  EQ(d->flags, MV_F_ZF);
  to_user();
  rax(KSS);
  OK("0f00e0");
  EQ(d->flags, 0);
  rax(0x2000);
  OK("0f02c8");
  EQ(d->flags, 0);
}

/* ---- MSRs, CPUID, time ----------------------------------------------------------- */

static uint64_t rdmsr(uint32_t index) {
  d->gpr[MV_RCX] = index;
  OK("0f32");
  return d->gpr[MV_RDX] << 32 | d->gpr[MV_RAX];
}
static int wrmsr(uint32_t index, uint64_t v) {
  d->gpr[MV_RCX] = index;
  d->gpr[MV_RAX] = (uint32_t)v;
  d->gpr[MV_RDX] = v >> 32;
  return run("0f30");
}

TEST(msrs_round_trip) {
  static const struct {
    uint32_t index;
    uint64_t value;
  } cases[] = {
      {0x174, 0x10},
      {0x175, 0xffff800000001000},
      {0x176, 0xffffffff81000000},
      {0xc0000081, ~0ull},
      {0xc0000082, 0xffffffff81000000},
      {0xc0000083, 0x1000},
      {0xc0000084, 0x47700},
      {0xc0000100, 0x7f0000001000},
      {0xc0000101, 0xffff888000000000},
      {0xc0000102, 0x1},
      {0xc0000103, 0xffffffff},
      {0x277, 0x0407050600070106},
      {0x1a0, 0x1801},
      {0x2ff, 0xc06},
      {0x250, 0x0606060606060606},
      {0x26f, 0},
      {0x200, 0x6},
      {0x201, 0x800},
      {0x20f, 0x800},
      {0x48, 1},
  };
  for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
    EQ(wrmsr(cases[i].index, cases[i].value), 0);
    EQ(rdmsr(cases[i].index), cases[i].value);
  }
}

TEST(msrs_refuse_bad_values) {
  static const struct {
    uint32_t index;
    uint64_t value;
  } cases[] = {
      {0xc0000082, 1ull << 47},
      {0xc0000100, 1ull << 63},
      {0x175, 1ull << 62},
      {0x277, 0x0200000000000000},
      {0xc0000080, 1 << 12},
      {0xc0000080, 1 << 11},
      {0x2ff, 0x2},
      {0x200, 0x2},
      {0x250, 2},
      {0x1b, 0xfee00400},
      {0x1b, 1ull << 52},
      {0xfe, 0},
      {0x3a, 5},
      {0x12345, 0},
      {0xc0000103, 1ull << 32},
      {0x802, 0},
      {0x179, 1},
  };
  for (unsigned i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
    CHECK(wrmsr(cases[i].index, cases[i].value) == -1);
    EQ(d->exc_vector, MV_EXC_GP);
    EQ(d->exc_code, 0);
  }
}

TEST(msrs_that_linux_reads_at_boot_exist) {
  static const uint32_t both[] = {0x10,  0x17,  0x1b,  0x3a,  0x3b,  0x8b,
                                  0xce,  0xfe,  0x179, 0x17a, 0x198, 0x1a0,
                                  0x1d9, 0x277, 0x2ff, 0x6e0, 0x606, 0xc0000080};
  static const uint32_t amd[] = {0xc0010010, 0xc0010015, 0xc001001f, 0xc0010055, 0xc0010058,
                                 0xc0011020, 0xc0011021, 0xc0011029, 0xc001102a};
  for (unsigned i = 0; i < sizeof(both) / sizeof(both[0]); i++)
    rdmsr(both[i]);
  d->sys->amd = true;
  for (unsigned i = 0; i < sizeof(amd) / sizeof(amd[0]); i++)
    rdmsr(amd[i]);
  EQ(rdmsr(0xc0010015), 1u << 24);
  d->sys->amd = false;
  rdmsr(0x10a);
  d->gpr[MV_RCX] = 0xc0010015;
  FAULTS("0f32", MV_EXC_GP, 0);
}

TEST(efer_keeps_lma_and_forbids_lme_change) {
  EQ(wrmsr(0xc0000080, MV_EFER_LME | MV_EFER_SCE | MV_EFER_NXE), 0);
  EQ(rdmsr(0xc0000080), MV_EFER_LME | MV_EFER_LMA | MV_EFER_SCE | MV_EFER_NXE);
  CHECK(wrmsr(0xc0000080, MV_EFER_SCE) == -1);
  flushes_all = 0;
  EQ(wrmsr(0xc0000080, MV_EFER_LME), 0);
  EQ(flushes_all, 1);
}

TEST(tsc_write_moves_offset_and_adjust) {
  EQ(wrmsr(0x10, 1000), 0);
  uint64_t now = rdmsr(0x10);
  CHECK(now >= 1000 && now < 1000000000);
  uint64_t adjust = rdmsr(0x3b);
  EQ(wrmsr(0x3b, adjust + (1ull << 40)), 0);
  CHECK(rdmsr(0x10) >= 1ull << 40);
  OK("0f31");
  CHECK((d->gpr[MV_RDX] << 32 | d->gpr[MV_RAX]) >= 1ull << 40);
}

TEST(rdtsc_in_user_obeys_tsd) {
  to_user();
  OK("0f31");
  d->cr4 |= MV_CR4_TSD;
  FAULTS("0f31", MV_EXC_GP, 0);
}

TEST(fsgsbase_needs_cr4) {
  FAULTS("f3480faec0", MV_EXC_UD, 0);
  d->cr4 |= MV_CR4_FSGSBASE;
  rax(0x1234);
  OK("f3480faed0"); /* wrfsbase rax */
  EQ(d->seg[MV_SEG_FS].base, 0x1234);
  OK("f3480faecb"); /* rdgsbase rbx */
  rax(1ull << 47);
  FAULTS("f3480faed8", MV_EXC_GP, 0);
}

TEST(cpuid_says_what_is_on) {
  rax(1);
  OK("0fa2");
  EQ(d->gpr[MV_RCX] >> 27 & 1, 0);
  EQ(d->gpr[MV_RCX] >> 31 & 1, 1);
  d->cr4 |= MV_CR4_OSXSAVE;
  rax(1);
  OK("0fa2");
  EQ(d->gpr[MV_RCX] >> 27 & 1, 1);
  rax(0x40000010);
  OK("0fa2");
  uint64_t khz = mv_clock_hz() / 1000;
  EQ(d->gpr[MV_RAX], khz);
  EQ(d->gpr[MV_RBX], 1000000);
}

TEST(hypercalls_are_unknown) {
  OK("0f01c1");
  EQ(d->gpr[MV_RAX], (uint64_t)-1000);
  to_user();
  OK("0f01d9");
  EQ(d->gpr[MV_RAX], (uint64_t)-1);
}

static uint64_t realtime_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

/* The time that the page at DATA tells, as Linux computes it. */
static uint64_t page_time(uint64_t tsc) {
  uint64_t delta = tsc - get64(DATA + 8);
  int8_t shift = (int8_t)ram[DATA + 28];
  delta = shift < 0 ? delta >> -shift : delta << shift;
  return get64(DATA + 16) + (uint64_t)((unsigned __int128)delta * get32(DATA + 24) >> 32);
}

TEST(kvmclock_runs_with_the_host) {
  EQ(wrmsr(0x4b564d01, DATA | 1), 0);
  EQ(get32(DATA) & 1, 0);
  CHECK(get32(DATA) != 0);
  EQ(ram[DATA + 29], 1);
  uint64_t a = page_time(rdmsr(0x10)), ha = mv_clock_ns();
  nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
  uint64_t b = page_time(rdmsr(0x10)), hb = mv_clock_ns();
  int64_t error = (int64_t)((b - a) - (hb - ha));
  CHECK(error > -200000 && error < 200000);
  EQ(wrmsr(0x4b564d00, DATA + 64), 0);
  uint64_t wall = (uint64_t)get32(DATA + 68) * 1000000000 + get32(DATA + 72);
  error = (int64_t)(wall + page_time(rdmsr(0x10)) - realtime_ns());
  CHECK(error > -5000000 && error < 5000000);
}

TEST(kvmclock_page_outside_ram_is_ignored) {
  EQ(wrmsr(0x4b564d01, 0xfffffffffffff001), 0);
  EQ(wrmsr(0x4b564d01, (RAM_SIZE - 16) | 1), 0);
  EQ(wrmsr(0x4b564d00, 0xfffffffffffffff8), 0);
  EQ(wrmsr(0x4b564d01, (DATA + 2) | 1), 0);
  EQ(wrmsr(0x4b564d00, DATA + 1), 0);
  EQ(ram[RAM_SIZE - 1], 0);
  EQ(get64(DATA), 0);
}

/* ---- local APIC ------------------------------------------------------------------ */

static void lapic_write(unsigned off, uint32_t v) {
  mv_lapic_mmio_write(d->lapic, off, v, 4);
}
static uint32_t lapic_read(unsigned off) {
  return (uint32_t)mv_lapic_mmio_read(d->lapic, off, 4);
}
static void lapic_on(void) {
  lapic_write(0xf0, 0x1ff);
}
static uint32_t in_service(unsigned v) {
  return lapic_read(0x100 + (v >> 5) * 16) >> (v & 31) & 1;
}

TEST(apic_interrupts_come_by_priority) {
  lapic_on();
  pokes = 0;
  mv_lapic_deliver(d->lapic, 0x31, 0);
  mv_lapic_deliver(d->lapic, 0x51, 0);
  EQ(pokes, 2);
  d->eflags &= ~(uint32_t)MV_FL_IF;
  EQ(mv_system_irq_ready(d), false);
  d->eflags |= MV_FL_IF;
  d->irq_shadow = true;
  EQ(mv_system_irq_ready(d), false);
  d->irq_shadow = false;
  EQ(mv_system_irq_ready(d), true);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + 0x51 * 16);
  EQ(in_service(0x51), 1);
  d->eflags |= MV_FL_IF;
  EQ(mv_system_irq_ready(d), false);
  mv_lapic_deliver(d->lapic, 0x61, 0);
  EQ(mv_system_irq_ready(d), true);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + 0x61 * 16);
  lapic_write(0xb0, 0);
  EQ(in_service(0x61), 0);
  EQ(in_service(0x51), 1);
  lapic_write(0xb0, 0);
  d->eflags |= MV_FL_IF;
  EQ(mv_system_irq_ready(d), true);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + 0x31 * 16);
  EQ(vcpu.stats.irqs, 3);
}

TEST(apic_task_priority_holds_back) {
  lapic_on();
  lapic_write(0x80, 0x50);
  mv_lapic_deliver(d->lapic, 0x51, 0);
  EQ(mv_system_irq_ready(d), false);
  rax(4);
  OK("440f22c0");
  EQ(mv_system_irq_ready(d), true);
}

TEST(apic_disabled_takes_nothing) {
  mv_lapic_deliver(d->lapic, 0x51, 0);
  EQ(mv_system_irq_ready(d), false);
  lapic_on();
  mv_lapic_deliver(d->lapic, 5, 0);
  EQ(mv_system_irq_ready(d), false);
}

TEST(apic_interrupt_wakes_halt) {
  lapic_on();
  OK("f4");
  EQ(d->halted, true);
  EQ(d->rip, CODE + 1);
  EQ(mv_system_irq_ready(d), false);
  mv_lapic_deliver(d->lapic, 0x51, 0);
  EQ(mv_system_irq_ready(d), true);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->halted, false);
  EQ(get64(d->gpr[MV_RSP]), CODE + 1);
}

TEST(nmi_ignores_if_and_blocks_until_iret) {
  struct mv_apic_message nmi = {.mode = MV_APIC_NMI};
  d->eflags &= ~(uint32_t)MV_FL_IF;
  mv_lapic_accept_message(d->lapic, &nmi);
  EQ(mv_system_irq_ready(d), true);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + 2 * 16);
  mv_lapic_accept_message(d->lapic, &nmi);
  EQ(mv_system_irq_ready(d), false);
  OK("48cf");
  EQ(mv_system_irq_ready(d), true);
}

TEST(x2apic_mode_switches_and_registers) {
  d->gpr[MV_RCX] = 0x802;
  FAULTS("0f32", MV_EXC_GP, 0);
  EQ(mv_lapic_mmio_base(d->lapic), MV_LAPIC_GPA);
  EQ(wrmsr(0x1b, 0xfee00d00), 0);
  EQ(mv_lapic_mmio_base(d->lapic), UINT64_MAX);
  EQ(rdmsr(0x802), 0);
  EQ(rdmsr(0x80d), 1);
  EQ(rdmsr(0x803) & 0xff, 0x14);
  EQ(wrmsr(0x80f, 0x1ff), 0);
  EQ(wrmsr(0x808, 0x20), 0);
  EQ(rdmsr(0x808), 0x20);
  CHECK(wrmsr(0x80b, 1) == -1);
  CHECK(wrmsr(0x80e, 0) == -1);
  CHECK(wrmsr(0x808, 1ull << 32) == -1);
  CHECK(wrmsr(0x1b, 0xfee00900) == -1); /* x2APIC to xAPIC */
  EQ(wrmsr(0x83f, 0x77), 0);
  EQ(wrmsr(0x808, 0), 0);
  EQ(mv_system_irq_ready(d), true);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + 0x77 * 16);
  EQ(wrmsr(0x80b, 0), 0);
  EQ(wrmsr(0x830, 0x40000 | 0x78), 0);
  d->eflags |= MV_FL_IF;
  EQ(mv_system_irq_ready(d), true);
}

static void wait_ns(uint64_t ns) {
  for (uint64_t end = mv_clock_ns() + ns; mv_clock_ns() < end;)
    nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
}

/* Not ready before `when` (host ns), then poked, then ready: on a busy machine, too. */
static void expect_timer(uint64_t when) {
  d->eflags |= MV_FL_IF;
  for (;;) {
    bool ready = mv_system_irq_ready(d);
    if (mv_clock_ns() + 20000 >= when)
      break;
    EQ(ready, false);
    nanosleep(&(struct timespec){.tv_nsec = 200000}, NULL);
  }
  while (pokes == 0)
    CHECK(mv_clock_ns() < when + 10000000000);
  while (!mv_system_irq_ready(d))
    CHECK(mv_clock_ns() < when + 10000000000);
  CHECK(mv_clock_ns() + 20000 >= when);
}

TEST(apic_timer_oneshot_fires_once_in_time) {
  lapic_on();
  lapic_write(0x320, 0x40);
  lapic_write(0x3e0, 0xb); /* divide by 1: nanoseconds */
  pokes = 0;
  uint64_t start = mv_clock_ns();
  lapic_write(0x380, 20000000);
  uint32_t count = lapic_read(0x390);
  CHECK(count <= 20000000 && count + (mv_clock_ns() - start) + 20000 >= 20000000);
  uint64_t deadline = mv_lapic_deadline(d->lapic);
  CHECK(deadline + 20000 >= start + 20000000);
  expect_timer(start + 20000000);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + 0x40 * 16);
  EQ(lapic_read(0x390), 0);
  EQ(mv_lapic_deadline(d->lapic), UINT64_MAX);
}

TEST(apic_timer_periodic_fires_again) {
  lapic_on();
  lapic_write(0x3e0, 0xb);
  lapic_write(0x320, 0x20040);
  uint64_t start = mv_clock_ns();
  lapic_write(0x380, 3000000);
  for (unsigned i = 1; i <= 3; i++) {
    pokes = 0;
    expect_timer(start + i * 3000000);
    EQ(mv_system_take_irq(d), 0);
    lapic_write(0xb0, 0);
  }
  lapic_write(0x380, 0);
  EQ(mv_lapic_deadline(d->lapic), UINT64_MAX);
}

TEST(apic_timer_divide_scales) {
  lapic_on();
  lapic_write(0x320, 0x40);
  lapic_write(0x3e0, 0x3); /* by 16 */
  uint64_t before = mv_clock_ns();
  lapic_write(0x380, 1000000);
  uint64_t after = mv_clock_ns(), deadline = mv_lapic_deadline(d->lapic);
  CHECK(deadline + 20000 >= before + 16000000 && deadline <= after + 16020000);
}

TEST(tsc_deadline_fires_and_disarms) {
  lapic_on();
  EQ(wrmsr(0x6e0, 1), 0);
  EQ(rdmsr(0x6e0), 0); /* not in that mode: ignored */
  lapic_write(0x320, 0x40041);
  uint64_t start = mv_clock_ns(), when = rdmsr(0x10) + mv_clock_to_ticks(20000000);
  pokes = 0;
  EQ(wrmsr(0x6e0, when), 0);
  EQ(rdmsr(0x6e0), when);
  expect_timer(start + 20000000);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + 0x41 * 16);
  EQ(rdmsr(0x6e0), 0);
  lapic_write(0xb0, 0);
  d->eflags |= MV_FL_IF;
  EQ(wrmsr(0x6e0, 1), 0); /* in the past: at once */
  EQ(mv_system_irq_ready(d), true);
}

TEST(tsc_deadline_moved_back_rings_in_time) {
  lapic_on();
  lapic_write(0x320, 0x40041);
  EQ(wrmsr(0x6e0, rdmsr(0x10) + mv_clock_to_ticks(2000000)), 0);
  uint64_t start = mv_clock_ns();
  EQ(wrmsr(0x6e0, rdmsr(0x10) + mv_clock_to_ticks(30000000)), 0);
  wait_ns(5000000);
  pokes = 0;
  expect_timer(start + 30000000);
}

TEST(tsc_deadline_cleared_never_fires) {
  lapic_on();
  lapic_write(0x320, 0x40041);
  EQ(wrmsr(0x6e0, rdmsr(0x10) + mv_clock_to_ticks(2000000)), 0);
  EQ(wrmsr(0x6e0, 0), 0);
  wait_ns(6000000);
  EQ(mv_system_irq_ready(d), false);
}

/* ---- several CPUs ---------------------------------------------------------------- */

static struct mv_ioapic *two_cpus(void) {
  struct mv_ioapic *io = mv_ioapic_new(&vm);
  CHECK(io);
  dbt1.vm = &vm;
  dbt1.vcpu = &vcpu1;
  EQ(mv_system_init(&dbt1), 0);
  mv_ioapic_connect(io, d->lapic);
  mv_ioapic_connect(io, dbt1.lapic);
  return io;
}

TEST(second_cpu_waits_for_init_and_sipi) {
  two_cpus();
  lapic_on();
  EQ(dbt1.halted, true);
  EQ(mv_system_irq_ready(&dbt1), false);
  lapic_write(0x310, 1 << 24);
  lapic_write(0x300, 0x4500); /* INIT */
  EQ(mv_system_irq_ready(&dbt1), true);
  EQ(mv_system_take_irq(&dbt1), 0);
  EQ(dbt1.halted, true);
  lapic_write(0x300, 0x4600 | 0x9a); /* SIPI */
  EQ(mv_system_irq_ready(&dbt1), true);
  EQ(mv_system_take_irq(&dbt1), 0);
  EQ(dbt1.halted, false);
  EQ(dbt1.seg[MV_SEG_CS].base, 0x9a000);
  EQ(dbt1.seg[MV_SEG_CS].sel, 0x9a00);
  EQ(dbt1.rip, 0);
  EQ(dbt1.cr0 & 1, 0);
  lapic_write(0x300, 0x4600 | 0x77); /* the second SIPI changes nothing */
  EQ(mv_system_take_irq(&dbt1), 0);
  EQ(dbt1.seg[MV_SEG_CS].sel, 0x9a00);
  EQ(mv_system_irq_ready(d), false);
}

TEST(ipi_goes_to_whom_it_names) {
  two_cpus();
  lapic_on();
  mv_lapic_mmio_write(dbt1.lapic, 0xf0, 0x1ff, 4);
  go_long(&dbt1);
  dbt1.sys->mp_wait = 0;
  lapic_write(0x300, 0xc0000 | 0x55); /* all but self */
  EQ(mv_system_irq_ready(&dbt1), true);
  EQ(mv_system_irq_ready(d), false);
  EQ(mv_system_take_irq(&dbt1), 0);
  EQ(dbt1.rip, HANDLER + 0x55 * 16);
  lapic_write(0x300, 0x80000 | 0x56); /* all */
  EQ(mv_system_irq_ready(d), true);
  lapic_write(0xd0, 1 << 24); /* flat logical ids 1 and 2 */
  mv_lapic_mmio_write(dbt1.lapic, 0xd0, 2 << 24, 4);
  lapic_write(0x310, 2 << 24);
  lapic_write(0x300, 0x800 | 0x66);
  EQ(mv_lapic_mmio_read(dbt1.lapic, 0x230, 4) >> 6 & 1, 1);
  EQ(lapic_read(0x230) >> 6 & 1, 0);
}

/* ---- IOAPIC ---------------------------------------------------------------------- */

static void io_write(unsigned r, uint32_t v) {
  ioapic->write(ioapic_dev, 0, r, 4);
  ioapic->write(ioapic_dev, 0x10, v, 4);
}
static uint32_t io_read(unsigned r) {
  ioapic->write(ioapic_dev, 0, r, 4);
  return (uint32_t)ioapic->read(ioapic_dev, 0x10, 4);
}
static bool requested(unsigned v) {
  return lapic_read(0x200 + (v >> 5) * 16) >> (v & 31) & 1;
}
static void take(void) {
  d->eflags |= MV_FL_IF;
  EQ(mv_system_irq_ready(d), true);
  EQ(mv_system_take_irq(d), 0);
}

TEST(ioapic_registers) {
  two_cpus();
  EQ(io_read(1), 0x170011);
  io_write(0, 0xff000000);
  EQ(io_read(0), 0x0f000000);
  EQ(io_read(0x10), 0x10000);
  io_write(0x10, 0xffffffff);
  EQ(io_read(0x10), 0x1afff);
  io_write(0x11, 0xffffffff);
  EQ(io_read(0x11), 0xff000000);
  EQ(io_read(0x10 + 48), 0xffffffff);
  io_write(0x10 + 48, 0);
}

TEST(ioapic_edge_sends_once_a_rise) {
  struct mv_ioapic *io = two_cpus();
  lapic_on();
  mv_ioapic_set_level(io, 5, 1);
  mv_ioapic_set_level(io, 5, 0);
  EQ(requested(0x35), false); /* masked: lost */
  io_write(0x10 + 10, 0x35);
  EQ(requested(0x35), false);
  mv_ioapic_set_level(io, 5, 1);
  take();
  EQ(d->rip, HANDLER + 0x35 * 16);
  lapic_write(0xb0, 0);
  mv_ioapic_set_level(io, 5, 1);
  EQ(requested(0x35), false);
  mv_ioapic_set_level(io, 5, 0);
  mv_ioapic_set_level(io, 5, 1);
  EQ(requested(0x35), true);
  mv_ioapic_set_level(io, 99, 1);
}

TEST(ioapic_level_repeats_until_line_falls) {
  struct mv_ioapic *io = two_cpus();
  lapic_on();
  io_write(0x10 + 12, 0x8036);
  mv_ioapic_set_level(io, 6, 1);
  EQ(io_read(0x10 + 12), 0xc036);
  take();
  EQ(requested(0x36), false);
  lapic_write(0xb0, 0); /* still high */
  EQ(requested(0x36), true);
  take();
  mv_ioapic_set_level(io, 6, 0);
  lapic_write(0xb0, 0);
  EQ(requested(0x36), false);
  EQ(io_read(0x10 + 12), 0x8036);
}

TEST(ioapic_level_masked_comes_at_unmask) {
  struct mv_ioapic *io = two_cpus();
  lapic_on();
  io_write(0x10 + 12, 0x18036);
  mv_ioapic_set_level(io, 6, 1);
  EQ(requested(0x36), false);
  io_write(0x10 + 12, 0x8036);
  EQ(requested(0x36), true);
}

TEST(ioapic_entry_names_destination) {
  struct mv_ioapic *io = two_cpus();
  lapic_on();
  mv_lapic_mmio_write(dbt1.lapic, 0xf0, 0x1ff, 4);
  io_write(0x11 + 12, 1u << 24);
  io_write(0x10 + 12, 0x36);
  mv_ioapic_set_level(io, 6, 1);
  EQ(requested(0x36), false);
  EQ(mv_lapic_mmio_read(dbt1.lapic, 0x210, 4) >> 22 & 1, 1);
}

TEST(ioapic_state_round_trip) {
  struct mv_ioapic *io = two_cpus();
  struct kvm_ioapic_state a, b;
  lapic_on();
  io_write(0, 0x03000000);
  io_write(0x10 + 12, 0x8036);
  io_write(0x11 + 12, 1u << 24);
  mv_ioapic_set_level(io, 6, 1);
  mv_ioapic_get_state(io, &a);
  mv_ioapic_set_state(io, &a);
  mv_ioapic_get_state(io, &b);
  EQ(memcmp(&a, &b, sizeof(a)), 0);
  EQ(a.redirtbl[6].fields.remote_irr, 1);
}

/* ---- state ----------------------------------------------------------------------- */

static struct mv_vcpu_state one, two;

static void expect_identity(void) {
  mv_system_get_state(d, &one);
  EQ(mv_system_set_state(d, &one), 0);
  mv_system_get_state(d, &two);
  /* Only time may differ: the first was taken from a running clock. */
  EQ(mv_system_set_state(d, &two), 0);
  memset(&one, 0, sizeof(one));
  mv_system_get_state(d, &one);
  EQ(memcmp(&one, &two, sizeof(one)), 0);
}

TEST(state_round_trip_is_identical) {
  lapic_on();
  for (unsigned i = 0; i < 16; i++)
    d->gpr[i] = 0x1111111111111111ull * i;
  to_user();
  d->cr2 = 0x1234;
  d->cr3 = 0x5000;
  d->dr[0] = 0xdead;
  d->kernel_gs_base = 0xffff888000000000;
  lapic_write(0x320, 0x40041);
  EQ(wrmsr(0x6e0, 0), -1); /* at CPL 3 */
  mv_lapic_set_tsc_deadline(d->lapic, mv_system_tsc(d) + 1000000000000);
  mv_lapic_deliver(d->lapic, 0x55, 1);
  expect_identity();
  nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
  mv_system_get_state(d, &two);
  EQ(memcmp(&one, &two, sizeof(one)), 0);
  EQ(one.sregs.cs.selector, UCS);
  EQ(one.sregs.ss.dpl, 3);
  EQ(one.mp_state, KVM_MP_STATE_RUNNABLE);
}

TEST(state_with_oneshot_timer_and_halt) {
  lapic_on();
  lapic_write(0x320, 0x40);
  lapic_write(0x3e0, 0xb);
  lapic_write(0x380, 50000000);
  OK("f4");
  expect_identity();
  EQ(one.mp_state, KVM_MP_STATE_HALTED);
  CHECK(*(uint32_t *)(one.lapic.regs + 0x390) > 1000000);
  EQ(mv_system_irq_ready(d), false); /* runs on from here */
  uint64_t left = mv_lapic_deadline(d->lapic) - mv_clock_ns();
  CHECK(left > 1000000 && left <= 50000000);
}

TEST(state_with_events_delivers_them) {
  expect_identity();
  one.events.exception.injected = 1;
  one.events.exception.nr = MV_EXC_GP;
  one.events.exception.has_error_code = 1;
  one.events.exception.error_code = 0x18;
  one.events.nmi.pending = 1;
  one.sregs.interrupt_bitmap[1] = 1ull << 5; /* vector 69 */
  EQ(mv_system_set_state(d, &one), 0);
  expect_identity();
  EQ(one.events.exception.injected, 1);
  EQ(one.events.nmi.pending, 1);
  EQ(one.events.interrupt.nr, 69);
  EQ(one.sregs.interrupt_bitmap[1], 1ull << 5);
  EQ(mv_system_irq_ready(d), true);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + MV_EXC_GP * 16);
  EQ(get64(d->gpr[MV_RSP]), 0x18);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + 69 * 16);
  EQ(mv_system_take_irq(d), 0);
  EQ(d->rip, HANDLER + MV_EXC_NMI * 16);
}

TEST(state_unknown_msrs_are_kept) {
  mv_system_get_state(d, &one);
  one.msrs[one.nmsrs++] = (struct kvm_msr_entry){.index = 0xda0, .data = 0x1234};
  EQ(mv_system_set_state(d, &one), 0);
  mv_system_get_state(d, &two);
  EQ(two.nmsrs, one.nmsrs);
  EQ(two.msrs[two.nmsrs - 1].index, 0xda0);
  EQ(two.msrs[two.nmsrs - 1].data, 0x1234);
}

TEST(state_that_cannot_be_is_refused) {
  mv_system_get_state(d, &one);
  two = one;
  two.nmsrs = MV_MSRS_MAX + 1;
  EQ(mv_system_set_state(d, &two), (uint64_t)-22);
  two = one;
  two.xcr0 = 0;
  EQ(mv_system_set_state(d, &two), (uint64_t)-22);
  two = one;
  two.xcr0 |= 1ull << 18;
  EQ(mv_system_set_state(d, &two), (uint64_t)-22);
}

TEST(state_waiting_cpu_keeps_waiting) {
  two_cpus();
  mv_system_get_state(&dbt1, &one);
  EQ(one.mp_state, KVM_MP_STATE_UNINITIALIZED);
  EQ(mv_system_set_state(&dbt1, &one), 0);
  EQ(dbt1.halted, true);
  EQ(mv_system_irq_ready(&dbt1), false);
}

/* ---- CPUID ----------------------------------------------------------------------- */

static struct kvm_cpuid_entry2 entries[MV_CPUID_ENTRIES_MAX];
static unsigned nentries;
static uint32_t leaf(uint32_t l, uint32_t s, unsigned r) {
  uint32_t regs[4];
  mv_cpuid_query(entries, nentries, l, s, NULL, regs);
  return regs[r];
}

TEST(cpuid_offers_nothing_that_is_not_done) {
  nentries = mv_cpuid_build(entries, MV_CPUID_ENTRIES_MAX, MV_CPUID_DBT, 4, 2, NULL);
  CHECK(nentries > 0);
  uint32_t ecx = leaf(1, 0, MV_CPUID_ECX);
  EQ(ecx & (1u << 3 | 1u << 5 | 1u << 17), 0); /* MONITOR VMX PCID */
  EQ(ecx & (1u << 21 | 1u << 24 | 1u << 31), 1u << 21 | 1u << 24 | 1u << 31);
  uint32_t ebx7 = leaf(7, 0, MV_CPUID_EBX);
  EQ(ebx7 & (1u << 4 | 1u << 10 | 1u << 11 | 1u << 20 | 1u << 16 | 1u << 14), 0);
  EQ(leaf(7, 0, MV_CPUID_ECX) & (1u << 2 | 1u << 3 | 1u << 7 | 1u << 16), 0);
  EQ(leaf(0xa, 0, MV_CPUID_EAX), 0);
  EQ(leaf(5, 0, MV_CPUID_EAX), 0);
  EQ(leaf(0xd, 0, MV_CPUID_EAX) & ~7u, 0);
  EQ(leaf(0xd, 1, MV_CPUID_EAX) & 8, 0);
}

TEST(cpuid_topology_is_one_thread_a_core) {
  nentries = mv_cpuid_build(entries, MV_CPUID_ENTRIES_MAX, MV_CPUID_DBT, 6, 5, NULL);
  EQ(leaf(1, 0, MV_CPUID_EBX) >> 24, 5);
  EQ(leaf(1, 0, MV_CPUID_EBX) >> 16 & 0xff, 6);
  EQ(leaf(0xb, 0, MV_CPUID_EAX), 0);
  EQ(leaf(0xb, 0, MV_CPUID_EBX), 1);
  EQ(leaf(0xb, 1, MV_CPUID_EAX), 3);
  EQ(leaf(0xb, 1, MV_CPUID_EBX), 6);
  EQ(leaf(0xb, 1, MV_CPUID_EDX), 5);
  EQ(leaf(0xb, 2, MV_CPUID_ECX) >> 8, 0);
}

TEST(cpuid_xsave_leaf_agrees_with_itself) {
  nentries = mv_cpuid_build(entries, MV_CPUID_ENTRIES_MAX, MV_CPUID_DBT, 1, 0, NULL);
  uint64_t xcr0 = mv_cpuid_xcr0(entries, nentries);
  uint32_t regs[4];
  struct mv_cpuid_dynamic dyn = {.xcr0 = 3, .apic_base = 0x900};
  mv_cpuid_query(entries, nentries, 0xd, 0, &dyn, regs);
  EQ(regs[MV_CPUID_EBX], 576);
  dyn.xcr0 = xcr0;
  mv_cpuid_query(entries, nentries, 0xd, 0, &dyn, regs);
  EQ(regs[MV_CPUID_EBX], regs[MV_CPUID_ECX]);
  EQ(mv_cpuid_xsave_size(entries, nentries, xcr0), regs[MV_CPUID_ECX]);
  if (xcr0 & 4)
    EQ(regs[MV_CPUID_ECX], leaf(0xd, 2, MV_CPUID_EAX) + leaf(0xd, 2, MV_CPUID_EBX));
}

TEST(cpuid_hypervisor_is_kvm) {
  nentries = mv_cpuid_build(entries, MV_CPUID_ENTRIES_MAX, MV_CPUID_DBT, 1, 0, NULL);
  uint32_t name[3] = {leaf(0x40000000, 0, MV_CPUID_EBX), leaf(0x40000000, 0, MV_CPUID_ECX),
                      leaf(0x40000000, 0, MV_CPUID_EDX)};
  EQ(memcmp(name, "KVMKVMKVM\0\0\0", 12), 0);
  EQ(leaf(0x40000001, 0, MV_CPUID_EAX), 1u << 1 | 1u << 3 | 1u << 24);
}

TEST(cpuid_for_kvm_never_exceeds_what_it_supports) {
  static struct {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 e[4];
  } s = {.head.nent = 4,
         .e = {{.function = 0, .eax = 0xd, .ebx = 0x756e6547, .ecx = 0x6c65746e, .edx = 0x49656e69},
               {.function = 1, .ecx = 1, .edx = 0x10},
               {.function = 7, .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX, .ebx = 0x8},
               {.function = 0x40000001, .eax = 1u << 3}}};
  nentries = mv_cpuid_build(entries, MV_CPUID_ENTRIES_MAX, MV_CPUID_KVM, 1, 0, &s.head);
  CHECK(nentries > 0);
  EQ(leaf(1, 0, MV_CPUID_ECX), 1u | 1u << 21 | 1u << 24 | 1u << 31);
  EQ(leaf(1, 0, MV_CPUID_EDX), 0x10);
  EQ(leaf(7, 0, MV_CPUID_EBX), 8);
  EQ(leaf(0x40000001, 0, MV_CPUID_EAX), 1u << 3);
  EQ(leaf(0x40000000, 0, MV_CPUID_EAX), 0x40000001);
  EQ(mv_cpuid_has(entries, nentries, MV_FEAT_SSE3), true);
  EQ(mv_cpuid_has(entries, nentries, MV_FEAT_AVX), false);
  EQ(mv_cpuid_has(entries, nentries, MV_FEAT_BASE), true);
}

TEST(cpuid_for_hand_over_is_what_both_offer) {
  static struct {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 e[4];
  } s = {.head.nent = 4,
         .e = {{.function = 0, .eax = 0xd, .ebx = 0x756e6547, .ecx = 0x6c65746e, .edx = 0x49656e69},
               {.function = 1, .ecx = 1u | 1u << 17, .edx = 0x10},
               {.function = 7,
                .flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                .ebx = 1u << 3 | 1u << 10 | 1u << 16 | 1u << 20},
               {.function = 0x80000008, .eax = 0x3034}}};
  nentries = mv_cpuid_build(entries, MV_CPUID_ENTRIES_MAX, MV_CPUID_BOTH, 1, 0, &s.head);
  CHECK(nentries > 0);
  EQ(leaf(1, 0, MV_CPUID_ECX), 1u | 1u << 21 | 1u << 24 | 1u << 31); /* no PCID */
  EQ(leaf(7, 0, MV_CPUID_EBX), 8); /* no TSC_ADJUST, INVPCID, AVX-512, SMAP */
  EQ(leaf(0x80000008, 0, MV_CPUID_EAX), 0x302e);
}

TEST(cpuid_table_too_small_is_said) {
  EQ(mv_cpuid_build(entries, 5, MV_CPUID_DBT, 1, 0, NULL), 0);
}

/* ---- main ------------------------------------------------------------------------ */

#define ENTRY(name)                                                                                \
  { #name, name }
static const struct {
  const char *name;
  void (*run)(void);
} tests[] = {
#include "system_tests.inc"
};

int main(int argc, char **argv) {
  for (unsigned i = 0; i < sizeof(tests) / sizeof(tests[0]); i++) {
    if (argc == 2 && strcmp(argv[1], tests[i].name) == 0) {
      machine();
      tests[i].run();
      if (dbt1.sys)
        mv_system_destroy(&dbt1);
      mv_system_destroy(d);
      if (ioapic_dev)
        mv_ioapic_free(ioapic_dev);
      return 0;
    }
  }
  fprintf(stderr, "no test %s\n", argc == 2 ? argv[1] : "named");
  return 2;
}
