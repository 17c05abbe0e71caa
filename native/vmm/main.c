/*
 * mv-vmm: one process, one guest.
 *
 * Born with the control socket as descriptor MV_CTL_FD (see mv/control.h). It
 * does what the front says, until the guest ends or the front goes away.
 */
#define _GNU_SOURCE /* close_range */
#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <unistd.h>

#include "vmm.h"

/* Gives up what this process never needs. What the host does not know is not
 * an error: each of these only narrows. */
static void confine(void) {
  prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
  prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
  setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0});
  close_range(MV_CTL_FD + 1, ~0u, 0);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGINT, SIG_IGN); /* the terminal's are for the front */
  signal(SIGQUIT, SIG_IGN);
  signal(SIGHUP, SIG_IGN);
}

int main(void) {
  static struct mv_vmm vmm = {.control_fd = MV_CTL_FD};
  confine();
  pthread_mutex_init(&vmm.end_lock, NULL);
  mv_vmm_console_init(&vmm.console, &vmm);
  vmm.loop = mv_loop_new();
  if (!vmm.loop)
    return errno;
  int error = mv_vmm_guest_init(&vmm);
  if (!error)
    error = mv_vmm_control_init(&vmm);
  if (!error)
    error = mv_loop_run(vmm.loop);
  mv_vmm_guest_free(&vmm);
  return -error;
}
