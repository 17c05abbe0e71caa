/*
 * The end of the guest: processes are asked, then killed; disks are written;
 * the VMM is told, and pulls the plug at that instruction. On a machine that is
 * not ours the kernel does it.
 */
#include <errno.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define GRACE_NS 3000000000ULL

/* Waits for the last child, at most until the deadline. */
static void children_wait(uint64_t deadline) {
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  for (;;) {
    pid_t pid = waitpid(-1, NULL, WNOHANG);
    if (pid > 0)
      continue;
    if (pid < 0)
      return;
    uint64_t now = mv_agent_now();
    if (now >= deadline)
      return;
    struct timespec left = {(deadline - now) / 1000000000, (deadline - now) % 1000000000};
    sigtimedwait(&child, NULL, &left);
  }
}

static void processes_end(void) {
  if (kill(-1, SIGTERM) < 0)
    return; /* there are none */
  kill(-1, SIGCONT);
  children_wait(mv_agent_now() + GRACE_NS);
  if (kill(-1, SIGKILL) == 0)
    children_wait(mv_agent_now() + GRACE_NS);
}

_Noreturn void mv_power_off(const struct mv_shutdown *what) {
  bool again = what->action == MV_SHUTDOWN_REBOOT;
  processes_end();
  sync();
  mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
  mv_event_send(again ? MV_EVENT_REBOOT : MV_EVENT_POWEROFF, what->status & 0xff);
  reboot(again ? RB_AUTOBOOT : RB_POWER_OFF);
  for (;;)
    pause();
}
