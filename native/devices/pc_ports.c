/*
 * Ports with one meaning each, that a kernel or a test payload pokes:
 *
 *   0xf4         isa-debug-exit, as QEMU has it: exit status (v << 1) | 1
 *   0x64         i8042: command 0xfe pulses the reset line
 *   0x70, 0x71   CMOS clock (MC146818), read-only: the host's time, in UTC
 *   0x600        what the guest's init reports (enum mv_guest_event)
 *
 * There is no keyboard.  0x64 reads as output buffer full (bit 0, for ever)
 * and input buffer empty (bit 1): Linux's i8042 driver then gives up after 16
 * bytes, and its reboot code does not wait for the controller.
 *
 * The clock is never in the middle of an update (register A bit 7 clear):
 * Linux would wait for that up to a second.
 */
#include "mv/devices.h"

#include <time.h>

#include "mv/layout.h"

#define DEBUG_EXIT_PORTS 4
#define CMOS_INDEX_PORT  0x70
#define CMOS_PORTS       2
#define EVENT_PORTS      4
#define I8042_CMD_RESET  0xfe
#define I8042_STATUS     0xfd

enum { CMOS_A = 0x0a, CMOS_B, CMOS_C, CMOS_D, CMOS_CENTURY = 0x32 };
enum { CMOS_A_32KHZ_1024HZ = 0x26, CMOS_B_24H = 0x02, CMOS_D_VALID = 0x80 };

static void debug_exit_write(void *dev, uint64_t off, uint64_t value, unsigned len) {
  (void)off, (void)len;
  struct mv_pc_ports *ports = dev;
  if (ports->debug_exit)
    ports->debug_exit(ports->ctx, ((value << 1) | 1) & 0xff);
}

static uint64_t i8042_read(void *dev, uint64_t off, unsigned len) {
  (void)dev, (void)off, (void)len;
  return I8042_STATUS;
}

static void i8042_write(void *dev, uint64_t off, uint64_t value, unsigned len) {
  (void)off, (void)len;
  struct mv_pc_ports *ports = dev;
  if (value == I8042_CMD_RESET && ports->reset)
    ports->reset(ports->ctx);
}

static void event_write(void *dev, uint64_t off, uint64_t value, unsigned len) {
  struct mv_pc_ports *ports = dev;
  if (off == 0 && len == 4 && ports->event)
    ports->event(ports->ctx, value);
}

static uint8_t bcd(int v) {
  return (v / 10 % 10) << 4 | v % 10;
}

static uint8_t cmos_register(uint8_t index) {
  struct tm tm;
  time_t now = time(NULL);
  gmtime_r(&now, &tm);
  switch (index) {
  case 0x00:
    return bcd(tm.tm_sec);
  case 0x02:
    return bcd(tm.tm_min);
  case 0x04:
    return bcd(tm.tm_hour);
  case 0x06:
    return bcd(tm.tm_wday + 1);
  case 0x07:
    return bcd(tm.tm_mday);
  case 0x08:
    return bcd(tm.tm_mon + 1);
  case 0x09:
    return bcd(tm.tm_year % 100);
  case CMOS_CENTURY:
    return bcd(19 + tm.tm_year / 100);
  case CMOS_A:
    return CMOS_A_32KHZ_1024HZ;
  case CMOS_B:
    return CMOS_B_24H;
  case CMOS_D:
    return CMOS_D_VALID;
  default: /* alarms, register C, and memory that nobody filled */
    return 0;
  }
}

/* The index is one byte and racing vCPUs only mix up their own reads. */
static uint64_t cmos_read(void *dev, uint64_t off, unsigned len) {
  struct mv_pc_ports *ports = dev;
  if (off != 1 || len != 1)
    return ~0ULL;
  return cmos_register(__atomic_load_n(&ports->cmos_index, __ATOMIC_RELAXED));
}

static void cmos_write(void *dev, uint64_t off, uint64_t value, unsigned len) {
  (void)len;
  struct mv_pc_ports *ports = dev;
  if (off == 0) /* bit 7 masks NMIs, of which there are none */
    __atomic_store_n(&ports->cmos_index, value & 0x7f, __ATOMIC_RELAXED);
}

static const struct mv_io_ops debug_exit_ops = {.write = debug_exit_write};
static const struct mv_io_ops i8042_ops = {.read = i8042_read, .write = i8042_write};
static const struct mv_io_ops event_ops = {.write = event_write};
static const struct mv_io_ops cmos_ops = {.read = cmos_read, .write = cmos_write};

int mv_pc_ports_add(struct mv_pc_ports *ports, struct mv_bus *pio) {
  const struct {
    uint64_t base, size;
    const struct mv_io_ops *ops;
  } regions[] = {
      {MV_PORT_DEBUG_EXIT, DEBUG_EXIT_PORTS, &debug_exit_ops},
      {MV_PORT_RESET, 1, &i8042_ops},
      {CMOS_INDEX_PORT, CMOS_PORTS, &cmos_ops},
      {MV_PORT_EVENT, EVENT_PORTS, &event_ops},
  };
  for (unsigned i = 0; i < sizeof(regions) / sizeof(regions[0]); i++) {
    int rc = mv_bus_add(pio, regions[i].base, regions[i].size, regions[i].ops, ports);
    if (rc)
      return rc;
  }
  return 0;
}
