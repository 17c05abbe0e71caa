/*
 * File systems. The initramfs itself is memory, so /run and /tmp need mounts
 * of their own only on a root that is not; devtmpfs is memory too, and /dev/shm
 * a plain directory on it.
 */
#include <errno.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define ROOT_WAIT_MS 2000
#define NEW_ROOT     "/mnt"
#define OVERLAY      "/overlay"

#define SAFE (MS_NOSUID | MS_NODEV | MS_NOEXEC)

int mv_mount_early(void) {
  return mount("proc", "/proc", "proc", SAFE, NULL) < 0 ? -errno : 0;
}

/* A device may appear a moment after its driver has been loaded. */
static int device_mount(const char *device, const char *where, const char *type, bool readonly) {
  const struct timespec ms = {0, 1000000};
  for (int waited = 0; access(device, F_OK) < 0 && waited < ROOT_WAIT_MS; waited++)
    nanosleep(&ms, NULL);
  return mount(device, where, type, readonly ? MS_RDONLY : 0, NULL) < 0 ? -errno : 0;
}

/* The device below, memory above: writes go to memory and end with the guest. */
static int overlay_mount(const char *device, const char *type) {
  mkdir(OVERLAY, 0700);
  if (mount("overlay", OVERLAY, "tmpfs", 0, "mode=755") < 0)
    return -errno;
  mkdir(OVERLAY "/lower", 0755);
  mkdir(OVERLAY "/upper", 0755);
  mkdir(OVERLAY "/work", 0755);
  int error = device_mount(device, OVERLAY "/lower", type, true);
  if (error)
    return error;
  return mount("overlay", NEW_ROOT, "overlay", 0,
               "lowerdir=" OVERLAY "/lower,upperdir=" OVERLAY "/upper,workdir=" OVERLAY "/work") < 0
             ? -errno
             : 0;
}

/* Takes /dev and /proc along and makes NEW_ROOT the root. */
static int root_switch(void) {
  static const char *const kept[] = {"/dev", "/proc"};
  for (size_t i = 0; i < sizeof(kept) / sizeof(*kept); i++) {
    char to[16] = NEW_ROOT;
    strcat(to, kept[i]);
    mkdir(to, 0755);
    if (mount(kept[i], to, NULL, MS_MOVE, NULL) < 0)
      return -errno;
  }
  if (chdir(NEW_ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 ||
      chdir("/") < 0)
    return -errno;
  return 0;
}

int mv_mount_root(const struct mv_options *options) {
  const char *mode = options->rootmode;
  if (mount("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=755") < 0)
    return -errno;
  if (!options->root)
    return 0;
  mkdir(NEW_ROOT, 0755);
  int error = !strcmp(mode, "overlay")
                  ? overlay_mount(options->root, options->rootfs)
                  : device_mount(options->root, NEW_ROOT, options->rootfs, !strcmp(mode, "ro"));
  return error ?: root_switch();
}

void mv_mount_rest(const struct mv_options *options) {
  mkdir("/dev/pts", 0755);
  mkdir("/dev/shm", 01777);
  symlink("/proc/self/fd", "/dev/fd");
  symlink("fd/0", "/dev/stdin");
  symlink("fd/1", "/dev/stdout");
  symlink("fd/2", "/dev/stderr");
  mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
  mount("sysfs", "/sys", "sysfs", SAFE, NULL);
  mount("cgroup2", "/sys/fs/cgroup", "cgroup2", SAFE, "nsdelegate");
  if (options->root) {
    mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755");
    mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
  }
}
