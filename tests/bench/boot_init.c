/*
 * PID 1 of a guest that QEMU boots from microvm's own initramfs: it lets
 * microvm's init do all that it does in a guest of ours, runs one command then,
 * and ends the machine with its status. Nothing is left out but the session:
 * there is no vsock through which somebody could ask for it.
 *
 * A child waits in front of the host name in /proc, which init sets as the last
 * but two of its steps; its parent becomes init. The proc that it looks into is
 * mounted aside, so that init finds an untouched system.
 */
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define DEBUG_EXIT_PORT 0xf4
#define ASIDE           "/bench"
#define FAILED          125

static void command_run(int hostname) {
  struct pollfd change = {.fd = hostname, .events = POLLPRI};
  int status = FAILED << 8;
  if (hostname < 0 || iopl(3))
    return;
  poll(&change, 1, -1);
  pid_t child = vfork();
  if (child == 0) {
    execl("/bin/busybox", "true", (char *)NULL);
    _exit(FAILED);
  }
  waitpid(child, &status, 0);
  outl((unsigned)WEXITSTATUS(status), DEBUG_EXIT_PORT);
}

int main(void) {
  char byte;
  if (mount("proc", ASIDE, "proc", 0, NULL))
    return FAILED;
  int hostname = open(ASIDE "/sys/kernel/hostname", O_RDONLY | O_CLOEXEC);
  (void)!read(hostname, &byte, 1); /* what poll compares with */
  umount2(ASIDE, MNT_DETACH);
  if (fork() == 0) {
    command_run(hostname);
    return FAILED;
  }
  close(hostname);
  execl("/init", "/init", (char *)NULL);
  return FAILED;
}
