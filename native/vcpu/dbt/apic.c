/*
 * Local APIC: SDM 3A §10 (xAPIC §10.4, x2APIC §10.12).
 *
 * Theory of operation. All registers live in a page laid out as the xAPIC's,
 * which is KVM's state format, too. The vCPU's own thread reads and writes
 * them; other threads only set bits in IRR and TMR and in `events`, atomically,
 * then raise `attention` and poke the vCPU. `attention` says "look": it is
 * cleared before the look and set again if something stays undelivered, so
 * that nothing is lost and the common question costs one load.
 *
 * The timer is no thread's business but the vCPU's: its expiry is a value of
 * the host's TSC, and the vCPU compares when it looks. The alarm (alarm.c) only
 * makes it look in time.
 *
 * The APIC timer's clock runs at 1 GHz before the divider (MV_LAPIC_TIMER_KHZ).
 */
#include "apic.h"

#include <stdlib.h>

#include "alarm.h"
#include "clock.h"
#include "mv/layout.h"
#include "system.h"

enum {
  R_ID = 0x20,
  R_VERSION = 0x30,
  R_TPR = 0x80,
  R_APR = 0x90,
  R_PPR = 0xa0,
  R_EOI = 0xb0,
  R_RRD = 0xc0,
  R_LDR = 0xd0,
  R_DFR = 0xe0,
  R_SVR = 0xf0,
  R_ISR = 0x100,
  R_TMR = 0x180,
  R_IRR = 0x200,
  R_ESR = 0x280,
  R_CMCI = 0x2f0,
  R_ICR = 0x300,
  R_ICR2 = 0x310,
  R_LVTT = 0x320,
  R_LVTTHERM = 0x330,
  R_LVTPC = 0x340,
  R_LVT0 = 0x350,
  R_LVT1 = 0x360,
  R_LVTERR = 0x370,
  R_TMICT = 0x380,
  R_TMCCT = 0x390,
  R_TDCR = 0x3e0,
  R_SELF = 0x3f0,
};
#define PAGE_REGS   (KVM_APIC_REG_SIZE / 4)
#define VERSION     0x50014u /* integrated APIC, 6 LVT entries                    */
#define LVT_MASKED  (1u << 16)
#define SVR_ENABLED (1u << 8)

enum { TIMER_ONESHOT, TIMER_PERIODIC, TIMER_DEADLINE };

#define BASE_BSP     (1ULL << 8)
#define BASE_EXTD    (1ULL << 10)
#define BASE_ENABLED (1ULL << 11)

struct mv_lapic {
  struct mv_dbt *d;
  struct mv_ioapic *io;
  uint64_t base; /* IA32_APIC_BASE                                             */
  uint32_t regs[PAGE_REGS];
  _Atomic bool attention;
  _Atomic uint32_t events; /* MV_LAPIC_NMI, _INIT, _SIPI                       */
  _Atomic uint8_t sipi_vector;
  uint64_t expiry;   /* host TSC, UINT64_MAX: timer not running                */
  uint64_t period;   /* ticks, periodic mode                                   */
  uint64_t deadline; /* IA32_TSC_DEADLINE                                      */
  bool stopped;      /* restored, not run yet: regs[TMCCT] holds the count     */
  struct mv_alarm alarm;
};
_Static_assert(sizeof(((struct mv_lapic *)0)->regs) == sizeof(struct kvm_lapic_state),
               "one layout");

static inline uint32_t *reg(struct mv_lapic *apic, unsigned off) {
  return &apic->regs[off / 4];
}
static inline uint32_t get(const struct mv_lapic *apic, unsigned off) {
  return apic->regs[off / 4];
}
static inline bool is_x2apic(const struct mv_lapic *apic) {
  return (apic->base & (BASE_ENABLED | BASE_EXTD)) == (BASE_ENABLED | BASE_EXTD);
}
static inline bool is_on(const struct mv_lapic *apic) {
  return (apic->base & BASE_ENABLED) && (get(apic, R_SVR) & SVR_ENABLED);
}

/* ---- 256-bit sets: IRR, ISR, TMR ----------------------------------------------- */

static inline uint32_t *set_word(struct mv_lapic *apic, unsigned set, unsigned vector) {
  return reg(apic, set + (vector >> 5) * 16);
}

static int highest(struct mv_lapic *apic, unsigned set) {
  for (int i = 7; i >= 0; i--) {
    uint32_t word = __atomic_load_n(reg(apic, set + (unsigned)i * 16), __ATOMIC_ACQUIRE);
    if (word)
      return i * 32 + 31 - __builtin_clz(word);
  }
  return -1;
}

/* Processor priority, §10.8.3.1. */
static unsigned update_ppr(struct mv_lapic *apic) {
  int isr = highest(apic, R_ISR);
  unsigned tpr = get(apic, R_TPR), in_service = isr < 0 ? 0 : (unsigned)isr & 0xf0;
  unsigned ppr = (tpr & 0xf0) >= in_service ? tpr : in_service;
  *reg(apic, R_PPR) = ppr;
  return ppr;
}

static inline void look(struct mv_lapic *apic) {
  atomic_store(&apic->attention, true);
}

static void request(struct mv_lapic *apic, unsigned vector, bool level) {
  uint32_t bit = 1u << (vector & 31), *tmr = set_word(apic, R_TMR, vector);
  if (level)
    __atomic_fetch_or(tmr, bit, __ATOMIC_SEQ_CST);
  else if (__atomic_load_n(tmr, __ATOMIC_RELAXED) & bit)
    __atomic_fetch_and(tmr, ~bit, __ATOMIC_SEQ_CST);
  __atomic_fetch_or(set_word(apic, R_IRR, vector), bit, __ATOMIC_SEQ_CST);
  look(apic);
}

void mv_lapic_deliver(struct mv_lapic *apic, unsigned vector, unsigned trigger_level) {
  if (!is_on(apic) || vector < 16 || vector > 255)
    return;
  request(apic, vector, trigger_level);
  mv_dbt_poke(apic->d);
}

/* ---- timer ---------------------------------------------------------------------- */

static inline unsigned timer_mode(const struct mv_lapic *apic) {
  return get(apic, R_LVTT) >> 17 & 3;
}

/* Bits 0, 1, 3 of the divide register: 2, 4, ... 128, 1. §10.5.4 */
static inline unsigned divide_shift(const struct mv_lapic *apic) {
  uint32_t v = get(apic, R_TDCR);
  return (((v & 3) | (v >> 1 & 4)) + 1) & 7;
}

static void set_alarm(struct mv_lapic *apic) {
  mv_alarm_set(&apic->alarm, mv_lapic_deadline(apic));
}

static void arm(struct mv_lapic *apic, uint64_t expiry) {
  apic->expiry = expiry;
  if (expiry > mv_clock_tsc())
    set_alarm(apic);
  else
    look(apic);
}

static void start_count(struct mv_lapic *apic, uint32_t count) {
  unsigned shift = divide_shift(apic);
  apic->period = mv_clock_to_ticks((uint64_t)get(apic, R_TMICT) << shift);
  arm(apic, count ? mv_clock_tsc() + mv_clock_to_ticks((uint64_t)count << shift) : UINT64_MAX);
}

static uint32_t current_count(const struct mv_lapic *apic) {
  if (apic->stopped)
    return get(apic, R_TMCCT);
  if (timer_mode(apic) == TIMER_DEADLINE || apic->expiry == UINT64_MAX)
    return 0;
  uint64_t now = mv_clock_tsc();
  if (apic->expiry <= now)
    return 0;
  return (uint32_t)(mv_clock_to_ns(apic->expiry - now) >> divide_shift(apic));
}

/* Fires the timer if it is due. */
static void poll_timer(struct mv_lapic *apic) {
  if (apic->expiry == UINT64_MAX)
    return;
  uint64_t now = mv_clock_tsc();
  if (now < apic->expiry) {
    if (!mv_alarm_is_set(&apic->alarm)) /* it rang early                        */
      set_alarm(apic);
    return;
  }
  uint32_t lvt = get(apic, R_LVTT);
  if (timer_mode(apic) == TIMER_PERIODIC && apic->period) {
    /* Ticks that were missed are gone: a backlog would storm the guest. */
    uint64_t next = apic->expiry + apic->period;
    arm(apic, next > now ? next : now + apic->period);
  } else {
    apic->expiry = UINT64_MAX;
    apic->deadline = 0;
  }
  if (!(lvt & LVT_MASKED) && is_on(apic) && (lvt & 0xff) >= 16)
    request(apic, lvt & 0xff, false);
}

uint64_t mv_lapic_deadline(struct mv_lapic *apic) {
  if (apic->expiry == UINT64_MAX || (get(apic, R_LVTT) & LVT_MASKED))
    return UINT64_MAX;
  uint64_t tsc = mv_clock_tsc(), now = mv_clock_ns();
  uint64_t left = apic->expiry > tsc ? mv_clock_to_ns(apic->expiry - tsc) : 0;
  return left < UINT64_MAX / 4 ? now + left : UINT64_MAX;
}

uint64_t mv_lapic_tsc_deadline(const struct mv_lapic *apic) {
  return timer_mode(apic) == TIMER_DEADLINE ? apic->deadline : 0;
}

void mv_lapic_set_tsc_deadline(struct mv_lapic *apic, uint64_t value) {
  if (timer_mode(apic) != TIMER_DEADLINE)
    return;
  apic->deadline = value;
  if (!apic->stopped)
    arm(apic, value ? value - apic->d->tsc_offset : UINT64_MAX);
}

/* The alarm's thread: the vCPU shall look. */
static void alarm_rang(void *ctx) {
  struct mv_lapic *apic = ctx;
  look(apic);
  mv_dbt_poke(apic->d);
}

/* ---- what the vCPU asks ------------------------------------------------------------ */

unsigned mv_lapic_attention(struct mv_lapic *apic, bool look_at_timer) {
  if (!atomic_load_explicit(&apic->attention, memory_order_relaxed) && !look_at_timer)
    return 0;
  atomic_store(&apic->attention, false);
  poll_timer(apic);
  unsigned waiting = atomic_load(&apic->events);
  int irr = highest(apic, R_IRR);
  if (irr >= 0 && ((unsigned)irr >> 4) > (get(apic, R_PPR) >> 4))
    waiting |= MV_LAPIC_INTR;
  if (waiting)
    look(apic);
  return waiting;
}

void mv_lapic_clear(struct mv_lapic *apic, unsigned what) {
  atomic_fetch_and(&apic->events, ~what);
}

void mv_lapic_set_nmi(struct mv_lapic *apic) {
  atomic_fetch_or(&apic->events, MV_LAPIC_NMI);
  look(apic);
}

bool mv_lapic_nmi_pending(const struct mv_lapic *apic) {
  return atomic_load(&apic->events) & MV_LAPIC_NMI;
}

uint8_t mv_lapic_take_sipi(struct mv_lapic *apic) {
  uint8_t vector = atomic_load(&apic->sipi_vector);
  mv_lapic_clear(apic, MV_LAPIC_SIPI);
  return vector;
}

uint8_t mv_lapic_accept(struct mv_lapic *apic) {
  int vector = highest(apic, R_IRR);
  if (vector < 0 || ((unsigned)vector >> 4) <= (get(apic, R_PPR) >> 4))
    return get(apic, R_SVR) & 0xff; /* spurious                                 */
  uint32_t bit = 1u << (vector & 31);
  __atomic_fetch_and(set_word(apic, R_IRR, (unsigned)vector), ~bit, __ATOMIC_SEQ_CST);
  *set_word(apic, R_ISR, (unsigned)vector) |= bit;
  update_ppr(apic);
  return (uint8_t)vector;
}

static void end_of_interrupt(struct mv_lapic *apic) {
  int vector = highest(apic, R_ISR);
  if (vector < 0)
    return;
  uint32_t bit = 1u << (vector & 31);
  *set_word(apic, R_ISR, (unsigned)vector) &= ~bit;
  update_ppr(apic);
  look(apic);
  if (apic->io &&
      (__atomic_load_n(set_word(apic, R_TMR, (unsigned)vector), __ATOMIC_SEQ_CST) & bit))
    mv_ioapic_eoi(apic->io, (uint8_t)vector);
}

uint64_t mv_lapic_tpr(const struct mv_lapic *apic) {
  return get(apic, R_TPR);
}

void mv_lapic_set_tpr(struct mv_lapic *apic, uint64_t tpr) {
  *reg(apic, R_TPR) = tpr & 0xff;
  apic->d->cr8 = tpr >> 4 & 15;
  update_ppr(apic);
  look(apic);
}

/* ---- messages between APICs ----------------------------------------------------------- */

static uint32_t apic_id(const struct mv_lapic *apic) {
  uint32_t id = get(apic, R_ID);
  return id >> 24;
}

/* §10.6.2: who is meant by a message. */
bool mv_lapic_is_dest(const struct mv_lapic *apic, const struct mv_apic_message *m) {
  uint32_t all = m->x2apic ? 0xffffffffu : 0xffu, ldr = get(apic, R_LDR);
  if (!(apic->base & BASE_ENABLED))
    return false;
  if (m->dest == all)
    return true;
  if (!m->logical)
    return m->dest == apic_id(apic);
  if (is_x2apic(apic))
    return m->dest >> 16 == ldr >> 16 && (m->dest & ldr & 0xffff);
  if (m->x2apic)
    return false;
  ldr >>= 24;
  if (get(apic, R_DFR) >> 28 == 0xf)
    return m->dest & ldr;
  return m->dest >> 4 == ldr >> 4 && (m->dest & ldr & 15);
}

void mv_lapic_accept_message(struct mv_lapic *apic, const struct mv_apic_message *m) {
  switch (m->mode) {
  case MV_APIC_FIXED:
  case MV_APIC_LOWEST:
    mv_lapic_deliver(apic, m->vector, m->level);
    return;
  case MV_APIC_NMI:
    atomic_fetch_or(&apic->events, MV_LAPIC_NMI);
    break;
  case MV_APIC_INIT:
    atomic_fetch_and(&apic->events, ~(uint32_t)MV_LAPIC_SIPI);
    atomic_fetch_or(&apic->events, MV_LAPIC_INIT);
    break;
  case MV_APIC_SIPI:
    atomic_store(&apic->sipi_vector, m->vector);
    atomic_fetch_or(&apic->events, MV_LAPIC_SIPI);
    break;
  default: /* SMI, ExtINT: there is no SMM and no 8259                          */
    return;
  }
  look(apic);
  mv_dbt_poke(apic->d);
}

/* Interrupt command register, §10.6.1. */
static void send_ipi(struct mv_lapic *apic, uint32_t low, uint32_t dest) {
  struct mv_apic_message m = {
      .dest = dest,
      .vector = low & 0xff,
      .mode = low >> 8 & 7,
      .logical = low >> 11 & 1,
      .level = (low >> 15 & 1) && (low >> 14 & 1),
      .x2apic = is_x2apic(apic),
  };
  unsigned shorthand = low >> 18 & 3;
  bool deassert = (low >> 15 & 1) && !(low >> 14 & 1);
  if (m.mode == MV_APIC_INIT && deassert)
    return;
  if (shorthand == 1) {
    if (m.mode == MV_APIC_FIXED && is_on(apic) && m.vector >= 16)
      request(apic, m.vector, false);
    return;
  }
  if (shorthand)
    m.dest = m.x2apic ? 0xffffffffu : 0xff;
  if (apic->io)
    mv_apic_send(apic->io, &m, shorthand == 3 ? apic : NULL);
  else if (shorthand != 3 && mv_lapic_is_dest(apic, &m))
    mv_lapic_accept_message(apic, &m);
}

/* ---- registers ---------------------------------------------------------------------------- */

/* Writable bits of the LVT entries, R_LVTT .. R_LVTERR. */
static const uint32_t lvt_bits[] = {0x700ff, 0x107ff, 0x107ff, 0x1a7ff, 0x1a7ff, 0x100ff};

static void write_lvt(struct mv_lapic *apic, unsigned off, uint32_t v) {
  v &= lvt_bits[(off - R_LVTT) / 16];
  if (!(get(apic, R_SVR) & SVR_ENABLED))
    v |= LVT_MASKED;
  uint32_t changed = v ^ get(apic, off);
  *reg(apic, off) = v;
  if (off != R_LVTT)
    return;
  if (changed >> 17 & 3) { /* another mode: the timer stops                       */
    *reg(apic, R_TMICT) = 0;
    apic->deadline = 0;
    apic->expiry = UINT64_MAX;
  }
  set_alarm(apic);
}

static void write_svr(struct mv_lapic *apic, uint32_t v) {
  *reg(apic, R_SVR) = v & 0x1ff;
  if (v & SVR_ENABLED)
    return;
  for (unsigned off = R_LVTT; off <= R_LVTERR; off += 16)
    *reg(apic, off) |= LVT_MASKED;
  set_alarm(apic);
}

static void write_divide(struct mv_lapic *apic, uint32_t v) {
  uint32_t left = current_count(apic);
  *reg(apic, R_TDCR) = v & 0xb;
  if (apic->expiry != UINT64_MAX && timer_mode(apic) != TIMER_DEADLINE)
    start_count(apic, left);
}

/* A register by its xAPIC offset. -1: there is none. */
static int read_reg(struct mv_lapic *apic, unsigned off, uint32_t *v) {
  switch (off) {
  case R_ID:
  case R_VERSION:
  case R_TPR:
  case R_LDR:
  case R_SVR:
  case R_ESR:
  case R_ICR:
  case R_ICR2:
  case R_LVTT:
  case R_LVTTHERM:
  case R_LVTPC:
  case R_LVT0:
  case R_LVT1:
  case R_LVTERR:
  case R_TMICT:
  case R_TDCR:
  case R_DFR:
  case R_APR:
  case R_RRD:
    *v = get(apic, off);
    return 0;
  case R_PPR:
    *v = update_ppr(apic);
    return 0;
  case R_TMCCT:
    *v = current_count(apic);
    return 0;
  default:
    if (off < R_ISR || off >= R_ESR)
      return -1;
    *v = __atomic_load_n(reg(apic, off), __ATOMIC_RELAXED);
    return 0;
  }
}

static int write_reg(struct mv_lapic *apic, unsigned off, uint32_t v) {
  switch (off) {
  case R_TPR:
    mv_lapic_set_tpr(apic, v);
    return 0;
  case R_EOI:
    end_of_interrupt(apic);
    return 0;
  case R_LDR:
    *reg(apic, off) = v & 0xff000000u;
    return 0;
  case R_DFR:
    *reg(apic, off) = v | 0x0fffffff;
    return 0;
  case R_SVR:
    write_svr(apic, v);
    return 0;
  case R_ESR:
    *reg(apic, off) = 0;
    return 0;
  case R_ICR:
    *reg(apic, off) = v & ~(1u << 12);
    send_ipi(apic, v, is_x2apic(apic) ? get(apic, R_ICR2) : get(apic, R_ICR2) >> 24);
    return 0;
  case R_ICR2:
    *reg(apic, off) = v & 0xff000000u;
    return 0;
  case R_LVTT:
  case R_LVTTHERM:
  case R_LVTPC:
  case R_LVT0:
  case R_LVT1:
  case R_LVTERR:
    write_lvt(apic, off, v);
    return 0;
  case R_TMICT:
    if (timer_mode(apic) == TIMER_DEADLINE)
      return 0;
    *reg(apic, off) = v;
    start_count(apic, v);
    return 0;
  case R_TDCR:
    write_divide(apic, v);
    return 0;
  default:
    return -1;
  }
}

/* Registers are 32 bits wide, 16 bytes apart; parts of one can be read. */
uint64_t mv_lapic_mmio_read(struct mv_lapic *apic, unsigned off, unsigned len) {
  uint32_t v = 0;
  if ((off & 15) + len > 4 || off >= KVM_APIC_REG_SIZE || read_reg(apic, off & ~15u, &v) < 0)
    return 0;
  return v >> (off & 15) * 8;
}

void mv_lapic_mmio_write(struct mv_lapic *apic, unsigned off, uint64_t value, unsigned len) {
  if ((off & 15) == 0 && len == 4)
    write_reg(apic, off, (uint32_t)value);
}

uint64_t mv_lapic_mmio_base(const struct mv_lapic *apic) {
  if ((apic->base & (BASE_ENABLED | BASE_EXTD)) != BASE_ENABLED)
    return UINT64_MAX;
  return apic->base & ~0xfffULL;
}

/* x2APIC MSRs 0x800..0x83f, §10.12.1.2: ICR is one register of 64 bits, DFR and
 * ICR2 are gone, SELF IPI is new. */
int mv_lapic_msr_read(struct mv_lapic *apic, uint32_t index, uint64_t *value) {
  unsigned off = (index - 0x800) * 16;
  uint32_t v;
  if (!is_x2apic(apic) || off >= KVM_APIC_REG_SIZE || off == R_DFR || off == R_ICR2 ||
      off == R_APR || off == R_RRD || read_reg(apic, off, &v) < 0)
    return -1;
  *value = v;
  if (off == R_ID)
    *value = apic_id(apic);
  else if (off == R_ICR)
    *value |= (uint64_t)get(apic, R_ICR2) << 32;
  return 0;
}

int mv_lapic_msr_write(struct mv_lapic *apic, uint32_t index, uint64_t value) {
  unsigned off = (index - 0x800) * 16;
  if (!is_x2apic(apic) || off >= KVM_APIC_REG_SIZE)
    return -1;
  if (off == R_ICR) {
    *reg(apic, R_ICR2) = value >> 32;
    return write_reg(apic, off, (uint32_t)value);
  }
  if (value >> 32)
    return -1;
  if (off == R_SELF) {
    send_ipi(apic, 1u << 18 | (value & 0xff), 0);
    return 0;
  }
  if (off == R_DFR || off == R_ICR2 || off == R_LDR ||
      ((off == R_EOI || off == R_ESR) && value != 0))
    return -1;
  return write_reg(apic, off, (uint32_t)value);
}

/* ---- IA32_APIC_BASE, reset, state ------------------------------------------------------------ */

uint64_t mv_lapic_base(const struct mv_lapic *apic) {
  return apic->base;
}

/* Legal changes of mode: §10.12.5, figure 10-28. */
static bool mode_change_good(uint64_t from, uint64_t to) {
  uint64_t bits = BASE_ENABLED | BASE_EXTD;
  from &= bits;
  to &= bits;
  if (to == BASE_EXTD)
    return false;
  if (from == bits && to == BASE_ENABLED)
    return false;
  return !(from == 0 && to == bits);
}

int mv_lapic_set_base(struct mv_lapic *apic, uint64_t value, bool host) {
  uint64_t bits = (apic->d->sys->phys_mask & ~0xfffULL) | BASE_BSP | BASE_EXTD | BASE_ENABLED;
  if (value & ~bits)
    return -1;
  if (!host && !mode_change_good(apic->base, value))
    return -1;
  bool was_x2apic = is_x2apic(apic);
  apic->base = value;
  if (!host && is_x2apic(apic) && !was_x2apic) {
    uint32_t id = apic_id(apic);
    *reg(apic, R_LDR) = id >> 4 << 16 | 1u << (id & 15);
  }
  look(apic);
  return 0;
}

void mv_lapic_reset(struct mv_lapic *apic, bool init) {
  uint32_t id = apic->d->vcpu->id;
  for (unsigned off = 0; off < KVM_APIC_REG_SIZE; off += 4)
    *reg(apic, off) = 0;
  *reg(apic, R_ID) = id << 24;
  *reg(apic, R_VERSION) = VERSION;
  *reg(apic, R_DFR) = 0xffffffffu;
  *reg(apic, R_SVR) = 0xff;
  for (unsigned off = R_LVTT; off <= R_LVTERR; off += 16)
    *reg(apic, off) = LVT_MASKED;
  if (!init)
    apic->base = MV_LAPIC_GPA | BASE_ENABLED | (id == 0 ? BASE_BSP : 0);
  if (is_x2apic(apic))
    *reg(apic, R_LDR) = id >> 4 << 16 | 1u << (id & 15);
  apic->period = apic->deadline = 0;
  apic->stopped = false;
  arm(apic, UINT64_MAX);
  mv_lapic_set_tpr(apic, 0);
}

void mv_lapic_get_state(struct mv_lapic *apic, struct kvm_lapic_state *out) {
  update_ppr(apic);
  *reg(apic, R_TMCCT) = current_count(apic);
  __builtin_memcpy(out->regs, apic->regs, sizeof(out->regs));
}

void mv_lapic_set_state(struct mv_lapic *apic, const struct kvm_lapic_state *in) {
  __builtin_memcpy(apic->regs, in->regs, sizeof(apic->regs));
  apic->expiry = UINT64_MAX;
  apic->deadline = 0;
  apic->stopped = true;
  mv_lapic_set_tpr(apic, get(apic, R_TPR));
}

void mv_lapic_resume(struct mv_lapic *apic) {
  if (!apic->stopped)
    return;
  apic->stopped = false;
  if (timer_mode(apic) == TIMER_DEADLINE)
    mv_lapic_set_tsc_deadline(apic, apic->deadline);
  else
    start_count(apic, get(apic, R_TMCCT));
}

struct mv_lapic *mv_lapic_new(struct mv_dbt *d) {
  struct mv_lapic *apic = calloc(1, sizeof(*apic));
  if (!apic)
    return NULL;
  apic->d = d;
  apic->expiry = UINT64_MAX;
  if (mv_alarm_start(&apic->alarm, alarm_rang, apic) < 0) {
    free(apic);
    return NULL;
  }
  return apic;
}

void mv_lapic_free(struct mv_lapic *apic) {
  if (!apic)
    return;
  mv_alarm_stop(&apic->alarm);
  if (apic->io)
    mv_ioapic_disconnect(apic->io, apic);
  free(apic);
}

void mv_lapic_set_io(struct mv_lapic *apic, struct mv_ioapic *io) {
  apic->io = io;
}
