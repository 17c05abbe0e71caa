/*
 * Tells the VMM where the guest is, by one 32-bit port write.
 *
 * Only a PID 1 that boots a guest enables this: the port of another machine is
 * not ours to write to.
 *
 * The right to use ports is inherited by children and survives exec, so it is
 * taken for the one instruction and given back. iopl is cheaper than ioperm,
 * which allocates and copies a bitmap. On a machine that is not ours nobody
 * answers at the port and nothing happens.
 */
#include <sys/io.h>

#include "agent.h"

static bool enabled;

void mv_event_enable(void) {
  enabled = true;
}

void mv_event_send(enum mv_guest_event event, uint32_t value) {
  if (!enabled || iopl(3) < 0)
    return;
  outl((uint32_t)event | value << 8, MV_PORT_EVENT);
  iopl(0);
}
