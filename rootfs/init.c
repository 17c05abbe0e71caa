/*
 * PID 1 of the guest.
 *
 *   init             boots the guest (as PID 1): file systems, modules, host
 *                    name, then the agent, then power-off
 *   init agent FD    the agent alone, on a listening stream socket that it is
 *                    handed: under another init, or in a test
 *
 * Order: the host hears of the agent as soon as the boot cannot fail any more,
 * so that its connections are made while the rest is set up.
 */
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include "agent.h"

#define CMDLINE_SIZE 4096
#define FILES_SOFT   1024
#define FILES_HARD   1048576

void mv_console_say(const char *what, const char *subject, int error) {
  const char *part[] = {"microvm: ", what, " ", subject, ": ", strerror(error), "\n"};
  struct iovec iov[sizeof(part) / sizeof(*part)];
  for (size_t i = 0; i < sizeof(part) / sizeof(*part); i++)
    iov[i] = (struct iovec){(char *)part[i], strlen(part[i])};
  (void)!writev(STDERR_FILENO, iov, sizeof(part) / sizeof(*part));
}

ssize_t mv_file_read(const char *path, char *buf, size_t size) {
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return -errno;
  ssize_t len = read(fd, buf, size - 1);
  close(fd);
  buf[len > 0 ? len : 0] = 0;
  return len;
}

/* Finds our words in a copy of the command line, which it cuts up. */
static void options_parse(char *text, struct mv_options *out) {
  static const char prefix[] = "microvm.";
  for (char *word = text; *word;) {
    char *end = word + strcspn(word, " \n");
    char *next = end + strspn(end, " \n");
    *end = 0;
    if (!strncmp(word, prefix, sizeof(prefix) - 1)) {
      const char *name = word + sizeof(prefix) - 1;
      if (!strncmp(name, "root=", 5))
        out->root = name + 5;
      else if (!strncmp(name, "rootfs=", 7))
        out->rootfs = name + 7;
      else if (!strncmp(name, "rootmode=", 9))
        out->rootmode = name + 9;
      else if (!strncmp(name, "hostname=", 9))
        out->hostname = name + 9;
    }
    word = next;
  }
}

static void loopback_up(void) {
  struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
  int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0)
    return;
  ioctl(fd, SIOCSIFFLAGS, &request);
  close(fd);
}

static _Noreturn void boot_fail(const char *what, const char *subject, int error) {
  mv_console_say(what, subject, -error);
  mv_power_off(&(struct mv_shutdown){MV_SHUTDOWN_POWEROFF, 125});
}

static _Noreturn void boot(void) {
  static char cmdline[CMDLINE_SIZE], words[CMDLINE_SIZE];
  struct mv_options options = {.rootfs = "ext4", .rootmode = "rw", .hostname = "microvm"};
  const struct rlimit files = {FILES_SOFT, FILES_HARD};
  struct mv_shutdown how;

  umask(0);
  int error = mv_mount_early();
  if (error)
    boot_fail("cannot mount", "/proc", error);
  if (mv_file_read("/proc/cmdline", cmdline, sizeof(cmdline)) > 0) {
    memcpy(words, cmdline, sizeof(words));
    options_parse(words, &options);
  }
  mv_modules_load(cmdline);
  int listener = mv_agent_listen();
  if (listener < 0)
    boot_fail("the kernel lacks", "vsock", listener);
  error = mv_mount_root(&options);
  if (error)
    boot_fail("cannot mount root", options.root ? options.root : "devtmpfs", error);
  mv_event_send(MV_EVENT_AGENT, 0); /* from here on nothing ends the boot */
  mv_mount_rest(&options);
  if (!options.root)
    mv_applets_link();
  umask(022);
  sethostname(options.hostname, strlen(options.hostname));
  loopback_up();
  setrlimit(RLIMIT_NOFILE, &files);
  error = mv_agent_serve(listener, &how);
  if (error)
    boot_fail("cannot serve", "vsock", error);
  mv_power_off(&how);
}

/* Orphans of a session come to us here too, as they do to PID 1. */
static int serve(int listener) {
  struct mv_shutdown how = {0};
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  if (fcntl(listener, F_SETFL, fcntl(listener, F_GETFL) | O_NONBLOCK) < 0 ||
      fcntl(listener, F_SETFD, FD_CLOEXEC) < 0) {
    mv_console_say("cannot use", "the listening socket", errno);
    return 125;
  }
  int error = mv_agent_serve(listener, &how);
  if (error)
    mv_console_say("cannot serve", "the listening socket", -error);
  return error ? 125 : (int)(how.status & 0xff);
}

int main(int argc, char **argv) {
  if (argc == 3 && !strcmp(argv[1], "agent"))
    return serve(atoi(argv[2]));
  if (getpid() != 1) {
    mv_console_say("start as PID 1, or as", "init agent FD", EINVAL);
    return 125;
  }
  mv_event_enable();
  mv_event_send(MV_EVENT_INIT, (uint32_t)(mv_agent_now() / MV_EVENT_UPTIME_UNIT));
  boot();
}
