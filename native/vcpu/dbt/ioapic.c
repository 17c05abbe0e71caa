/*
 * IOAPIC: 82093AA, 24 pins; Intel ICH10 datasheet §13.5.
 *
 * Devices set levels from any thread; a lock, held for some tens of
 * instructions, guards the redirection table. An edge-triggered pin sends one
 * message at a rising edge. A level-triggered pin sends one while its line is
 * high and no message is under way (remote IRR), and again after the local
 * APIC's EOI if the line is still high.
 */
#include <stdlib.h>

#include "apic.h"
#include "mv/layout.h"

#define PINS          MV_IOAPIC_PINS
#define WINDOW        0x1000
#define VERSION       (0x11u | (PINS - 1) << 16)
#define RT_MASKED     (1ULL << 16)
#define RT_LEVEL      (1ULL << 15)
#define RT_REMOTE_IRR (1ULL << 14)
#define RT_STATUS     (1ULL << 12) /* delivery status                          */
#define RT_LOGICAL    (1ULL << 11)

_Static_assert(PINS == KVM_IOAPIC_NUM_PINS, "the state format has 24 pins");

struct mv_ioapic {
  _Atomic bool lock;
  uint32_t select, id;
  uint32_t irr;  /* levels of level-triggered pins, edges on their way        */
  uint32_t high; /* lines as the devices set them                            */
  uint64_t rt[PINS];
  struct mv_lapic *lapic[MV_VCPUS_MAX];
};

/* Held so shortly that waiting spins; taken while the guest's vector registers
 * are live, so that it must not go through libc. */
static void lock(struct mv_ioapic *io) {
  while (atomic_exchange_explicit(&io->lock, true, memory_order_acquire))
    __builtin_ia32_pause();
}

static void unlock(struct mv_ioapic *io) {
  atomic_store_explicit(&io->lock, false, memory_order_release);
}

/* ---- messages ------------------------------------------------------------- */

void mv_apic_send(struct mv_ioapic *io, const struct mv_apic_message *m,
                  const struct mv_lapic *except) {
  for (unsigned i = 0; i < MV_VCPUS_MAX; i++) {
    struct mv_lapic *apic = io->lapic[i];
    if (!apic || apic == except || !mv_lapic_is_dest(apic, m))
      continue;
    mv_lapic_accept_message(apic, m);
    if (m->mode == MV_APIC_LOWEST)
      return;
  }
}

/* Sends pin's message if it is due. */
static void service(struct mv_ioapic *io, unsigned pin) {
  uint64_t rt = io->rt[pin];
  if ((rt & RT_MASKED) || !(io->irr >> pin & 1) || ((rt & RT_LEVEL) && (rt & RT_REMOTE_IRR)))
    return;
  struct mv_apic_message m = {
      .dest = rt >> 56,
      .vector = rt & 0xff,
      .mode = rt >> 8 & 7,
      .logical = rt & RT_LOGICAL,
      .level = rt & RT_LEVEL,
  };
  if (rt & RT_LEVEL)
    io->rt[pin] |= RT_REMOTE_IRR;
  else
    io->irr &= ~(1u << pin);
  mv_apic_send(io, &m, NULL);
}

void mv_ioapic_set_level(struct mv_ioapic *io, unsigned gsi, int level) {
  if (gsi >= PINS)
    return;
  uint32_t bit = 1u << gsi;
  lock(io);
  bool rose = level && !(io->high & bit);
  io->high = level ? io->high | bit : io->high & ~bit;
  if (io->rt[gsi] & RT_LEVEL)
    io->irr = level ? io->irr | bit : io->irr & ~bit;
  else if (rose && !(io->rt[gsi] & RT_MASKED))
    io->irr |= bit;
  service(io, gsi);
  unlock(io);
}

void mv_ioapic_eoi(struct mv_ioapic *io, uint8_t vector) {
  lock(io);
  for (unsigned pin = 0; pin < PINS; pin++) {
    if ((io->rt[pin] & 0xff) != vector || !(io->rt[pin] & RT_LEVEL))
      continue;
    io->rt[pin] &= ~RT_REMOTE_IRR;
    service(io, pin);
  }
  unlock(io);
}

/* ---- registers --------------------------------------------------------------- */

static uint32_t read_window(const struct mv_ioapic *io) {
  unsigned pin = (io->select - 0x10) >> 1;
  switch (io->select) {
  case 0:
  case 2: /* arbitration id                                                      */
    return io->id;
  case 1:
    return VERSION;
  default:
    if (io->select < 0x10 || pin >= PINS)
      return 0xffffffffu;
    return (uint32_t)(io->rt[pin] >> (io->select & 1) * 32);
  }
}

/* A pin that becomes level-triggered follows its line. Remote IRR and delivery
 * status are read-only; remote IRR has no meaning for edges. */
static void write_entry(struct mv_ioapic *io, unsigned pin, unsigned half, uint32_t v) {
  const uint64_t read_only = RT_REMOTE_IRR | RT_STATUS;
  uint64_t old = io->rt[pin], rt = old;
  if (half)
    rt = (rt & 0xffffffffu) | (uint64_t)v << 32;
  else
    rt = (rt & ~0xffffffffULL) | v;
  rt = (rt & ~read_only) | (old & read_only);
  if (!(rt & RT_LEVEL))
    rt &= ~RT_REMOTE_IRR;
  rt &= 0xff0000000001ffffULL;
  io->rt[pin] = rt;
  uint32_t bit = 1u << pin;
  if (rt & RT_LEVEL)
    io->irr = (io->irr & ~bit) | (io->high & bit);
  else if (old & RT_LEVEL)
    io->irr &= ~bit;
  service(io, pin);
}

static void write_window(struct mv_ioapic *io, uint32_t v) {
  unsigned pin = (io->select - 0x10) >> 1;
  if (io->select == 0)
    io->id = v & 0x0f000000;
  else if (io->select >= 0x10 && pin < PINS)
    write_entry(io, pin, io->select & 1, v);
}

static uint64_t ioapic_read(void *dev, uint64_t off, unsigned len) {
  struct mv_ioapic *io = dev;
  uint64_t v = 0;
  (void)len;
  lock(io);
  if (off == 0)
    v = io->select;
  else if (off == 0x10)
    v = read_window(io);
  unlock(io);
  return v;
}

static void ioapic_write(void *dev, uint64_t off, uint64_t value, unsigned len) {
  struct mv_ioapic *io = dev;
  (void)len;
  lock(io);
  if (off == 0)
    io->select = value & 0xff;
  else if (off == 0x10)
    write_window(io, (uint32_t)value);
  unlock(io);
}

static const struct mv_io_ops ioapic_ops = {.read = ioapic_read, .write = ioapic_write};

/* ---- state, life ---------------------------------------------------------------- */

void mv_ioapic_get_state(struct mv_ioapic *io, struct kvm_ioapic_state *out) {
  *out = (struct kvm_ioapic_state){.base_address = MV_IOAPIC_GPA};
  lock(io);
  out->ioregsel = io->select;
  out->id = io->id >> 24;
  out->irr = io->irr;
  for (unsigned pin = 0; pin < PINS; pin++)
    out->redirtbl[pin].bits = io->rt[pin];
  unlock(io);
}

void mv_ioapic_set_state(struct mv_ioapic *io, const struct kvm_ioapic_state *in) {
  lock(io);
  io->select = in->ioregsel;
  io->id = in->id << 24;
  io->irr = io->high = in->irr;
  for (unsigned pin = 0; pin < PINS; pin++)
    io->rt[pin] = in->redirtbl[pin].bits;
  for (unsigned pin = 0; pin < PINS; pin++)
    service(io, pin);
  unlock(io);
}

struct mv_ioapic *mv_ioapic_new(struct mv_vm *vm) {
  struct mv_ioapic *io = calloc(1, sizeof(*io));
  if (!io)
    return NULL;
  for (unsigned pin = 0; pin < PINS; pin++)
    io->rt[pin] = RT_MASKED;
  if (mv_bus_add(&vm->mmio, MV_IOAPIC_GPA, WINDOW, &ioapic_ops, io) < 0) {
    free(io);
    return NULL;
  }
  return io;
}

void mv_ioapic_free(struct mv_ioapic *io) {
  free(io);
}

void mv_ioapic_connect(struct mv_ioapic *io, struct mv_lapic *apic) {
  for (unsigned i = 0; i < MV_VCPUS_MAX; i++) {
    if (io->lapic[i])
      continue;
    io->lapic[i] = apic;
    mv_lapic_set_io(apic, io);
    return;
  }
}

void mv_ioapic_disconnect(struct mv_ioapic *io, struct mv_lapic *apic) {
  for (unsigned i = 0; i < MV_VCPUS_MAX; i++)
    if (io->lapic[i] == apic)
      io->lapic[i] = NULL;
  mv_lapic_set_io(apic, NULL);
}
