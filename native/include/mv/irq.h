/*
 * An interrupt line as a device sees it: level in, nothing out.  Behind it
 * stands KVM's irqchip (irqfd / KVM_IRQ_LINE) or the translator's IOAPIC.
 */
#ifndef MV_IRQ_H
#define MV_IRQ_H

#include <stdint.h>

struct mv_irqchip {
  /* Sets the level of a GSI (IOAPIC pin). Any thread. Edge-triggered pins
   * see a 0->1 transition as one interrupt. */
  void (*set_level)(void *ctx, unsigned gsi, int level);
  void *ctx;
};

struct mv_irqline {
  const struct mv_irqchip *chip;
  unsigned gsi;
};

static inline void mv_irq_set(const struct mv_irqline *line, int level) {
  line->chip->set_level(line->chip->ctx, line->gsi, level);
}
/* One edge-triggered interrupt. */
static inline void mv_irq_pulse(const struct mv_irqline *line) {
  mv_irq_set(line, 1);
  mv_irq_set(line, 0);
}

#endif
