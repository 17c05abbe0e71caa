/*
 * 8250 / 16550A serial port, for early console output and panics.
 *
 * Registers, by offset (DLAB is bit 7 of LCR):
 *   0 RBR/THR (DLAB: DLL)   1 IER (DLAB: DLM)   2 IIR/FCR   3 LCR
 *   4 MCR                   5 LSR               6 MSR       7 SCR
 *
 * The transmitter is infinitely fast: THR is empty again when the write
 * returns, so LSR.THRE and LSR.TEMT are always set and no driver ever polls
 * for them twice.  The THRE interrupt (PC16550D data sheet, table IV) becomes
 * pending when THR empties or when IER.THRI goes from 0 to 1, and is cleared
 * by the read of IIR that reports it.
 *
 * Input is never lost: what does not fit in the FIFO stays with the sender.
 * The interrupt line is level high while an enabled cause is pending.
 */
#include "mv/devices.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>

#include "mv/fdio.h"

#define PORTS     8
#define FIFO_SIZE 256 /* power of two; deeper than the 16 that are reported */

enum { REG_DATA, REG_IER, REG_IIR_FCR, REG_LCR, REG_MCR, REG_LSR, REG_MSR, REG_SCR };
enum { IER_RDI = 0x01, IER_THRI = 0x02, IER_MASK = 0x0f };
enum { IIR_NONE = 0x01, IIR_THRI = 0x02, IIR_RDI = 0x04, IIR_FIFO = 0xc0 };
enum { FCR_ENABLE = 0x01, FCR_CLEAR_RX = 0x02 };
enum { LCR_DLAB = 0x80 };
enum { MCR_RTS = 0x02, MCR_DTR = 0x01, MCR_OUT1 = 0x04, MCR_OUT2 = 0x08, MCR_LOOP = 0x10 };
enum { MCR_MASK = 0x1f };
enum { LSR_DR = 0x01, LSR_IDLE = 0x60 /* THRE | TEMT */ };
enum { MSR_CTS = 0x10, MSR_DSR = 0x20, MSR_RI = 0x40, MSR_DCD = 0x80 };

struct mv_serial {
  struct mv_serial_config config;
  pthread_mutex_t lock;
  uint8_t ier, lcr, mcr, scr, dll, dlm;
  bool fifo_enabled, thre_pending, line;
  uint8_t fifo[FIFO_SIZE];
  unsigned fifo_head, fifo_len;
  struct mv_fd in;
  bool in_ready;
};

static void irq_update(struct mv_serial *s) {
  bool level = ((s->ier & IER_RDI) && s->fifo_len) || ((s->ier & IER_THRI) && s->thre_pending);
  if (level == s->line)
    return;
  s->line = level;
  if (s->config.irq.chip)
    mv_irq_set(&s->config.irq, level);
}

static void fifo_put(struct mv_serial *s, uint8_t byte) {
  s->fifo[(s->fifo_head + s->fifo_len++) % FIFO_SIZE] = byte;
}

/* Takes what the descriptor has, as far as it fits, into an empty FIFO. At
 * EOF and after errors the descriptor just stays silent. */
static void fifo_refill(struct mv_serial *s) {
  if (s->fifo_len || !s->in_ready || (s->mcr & MCR_LOOP))
    return;
  s->fifo_head = 0;
  struct iovec iov = {.iov_base = s->fifo, .iov_len = FIFO_SIZE};
  ssize_t got = mv_fd_readv(&s->in, &iov, 1);
  if (got > 0)
    s->fifo_len = got;
  else
    s->in_ready = false;
}

static uint8_t data_read(struct mv_serial *s) {
  if (!s->fifo_len)
    return 0;
  uint8_t byte = s->fifo[s->fifo_head];
  s->fifo_head = (s->fifo_head + 1) % FIFO_SIZE;
  s->fifo_len--;
  fifo_refill(s);
  return byte;
}

static void data_write(struct mv_serial *s, uint8_t byte) {
  if (s->mcr & MCR_LOOP) {
    if (s->fifo_len < FIFO_SIZE)
      fifo_put(s, byte);
  } else if (s->config.sink) {
    s->config.sink(s->config.sink_ctx, &byte, 1);
  }
  s->thre_pending = true;
}

static uint8_t iir_read(struct mv_serial *s) {
  uint8_t high = s->fifo_enabled ? IIR_FIFO : 0;
  if ((s->ier & IER_RDI) && s->fifo_len)
    return high | IIR_RDI;
  if ((s->ier & IER_THRI) && s->thre_pending) {
    s->thre_pending = false;
    return high | IIR_THRI;
  }
  return high | IIR_NONE;
}

/* In loopback the modem outputs come back as inputs (drivers probe by this). */
static uint8_t msr_read(const struct mv_serial *s) {
  if (!(s->mcr & MCR_LOOP))
    return MSR_DCD | MSR_DSR | MSR_CTS;
  return (s->mcr & MCR_RTS ? MSR_CTS : 0) | (s->mcr & MCR_DTR ? MSR_DSR : 0) |
         (s->mcr & MCR_OUT1 ? MSR_RI : 0) | (s->mcr & MCR_OUT2 ? MSR_DCD : 0);
}

static uint8_t reg_read(struct mv_serial *s, unsigned reg) {
  bool dlab = s->lcr & LCR_DLAB;
  switch (reg) {
  case REG_DATA:
    return dlab ? s->dll : data_read(s);
  case REG_IER:
    return dlab ? s->dlm : s->ier;
  case REG_IIR_FCR:
    return iir_read(s);
  case REG_LCR:
    return s->lcr;
  case REG_MCR:
    return s->mcr;
  case REG_LSR:
    return LSR_IDLE | (s->fifo_len ? LSR_DR : 0);
  case REG_MSR:
    return msr_read(s);
  default:
    return s->scr;
  }
}

static void ier_write(struct mv_serial *s, uint8_t value) {
  value &= IER_MASK;
  if ((value & IER_THRI) && !(s->ier & IER_THRI))
    s->thre_pending = true;
  s->ier = value;
}

static void fcr_write(struct mv_serial *s, uint8_t value) {
  s->fifo_enabled = value & FCR_ENABLE;
  if (value & FCR_CLEAR_RX)
    s->fifo_len = 0;
}

static void reg_write(struct mv_serial *s, unsigned reg, uint8_t value) {
  bool dlab = s->lcr & LCR_DLAB;
  switch (reg) {
  case REG_DATA:
    if (dlab)
      s->dll = value;
    else
      data_write(s, value);
    break;
  case REG_IER:
    if (dlab)
      s->dlm = value;
    else
      ier_write(s, value);
    break;
  case REG_IIR_FCR:
    fcr_write(s, value);
    break;
  case REG_LCR:
    s->lcr = value;
    break;
  case REG_MCR:
    s->mcr = value & MCR_MASK;
    break;
  case REG_SCR:
    s->scr = value;
    break;
  default: /* LSR and MSR are read-only */
    break;
  }
}

/* The ISA bus splits wider accesses into bytes. */
static uint64_t serial_read(void *dev, uint64_t off, unsigned len) {
  struct mv_serial *s = dev;
  uint64_t value = 0;
  pthread_mutex_lock(&s->lock);
  for (unsigned i = 0; i < len; i++)
    value |= (uint64_t)reg_read(s, off + i) << (8 * i);
  irq_update(s);
  pthread_mutex_unlock(&s->lock);
  return value;
}

static void serial_write(void *dev, uint64_t off, uint64_t value, unsigned len) {
  struct mv_serial *s = dev;
  pthread_mutex_lock(&s->lock);
  for (unsigned i = 0; i < len; i++)
    reg_write(s, off + i, value >> (8 * i));
  fifo_refill(s);
  irq_update(s);
  pthread_mutex_unlock(&s->lock);
}

static const struct mv_io_ops serial_ops = {.read = serial_read, .write = serial_write};

static void serial_in_event(void *ctx, uint32_t events) {
  (void)events;
  struct mv_serial *s = ctx;
  pthread_mutex_lock(&s->lock);
  s->in_ready = true;
  fifo_refill(s);
  irq_update(s);
  pthread_mutex_unlock(&s->lock);
}

size_t mv_serial_input(struct mv_serial *s, const void *data, size_t len) {
  const uint8_t *bytes = data;
  size_t n = 0;
  pthread_mutex_lock(&s->lock);
  if (!(s->mcr & MCR_LOOP)) {
    while (n < len && s->fifo_len < FIFO_SIZE)
      fifo_put(s, bytes[n++]);
  }
  irq_update(s);
  pthread_mutex_unlock(&s->lock);
  return n;
}

int mv_serial_new(struct mv_serial **out, struct mv_bus *pio,
                  const struct mv_serial_config *config) {
  struct mv_serial *s = calloc(1, sizeof(*s));
  struct mv_fd in;
  int rc = mv_fd_open(&in, config->in_fd, false);
  if (!s || rc) {
    mv_fd_close(&in);
    free(s);
    return rc ? rc : -ENOMEM;
  }
  s->config = *config;
  s->in = in;
  pthread_mutex_init(&s->lock, NULL);
  rc = mv_bus_add(pio, config->port, PORTS, &serial_ops, s);
  if (!rc && s->in.fd >= 0) {
    rc = mv_fd_watch(&s->in, config->loop, serial_in_event, s);
    s->in_ready = !s->in.watched;
  }
  if (rc) {
    mv_serial_free(s);
    return rc;
  }
  *out = s;
  return 0;
}

void mv_serial_free(struct mv_serial *s) {
  if (!s)
    return;
  mv_fd_close(&s->in);
  pthread_mutex_destroy(&s->lock);
  free(s);
}
