/*
 * PID 1 of the guest: who knows whom.
 *
 *   init.c     boots: events, mounts, modules, host name, then the agent
 *   mount.c    file systems, root switch
 *   modules.c  loads the kernel modules that boot needs
 *   applets.c  busybox's names
 *   agent.c    epoll loop, new streams, signals, timers
 *   session.c  one session: frames in and out, bytes between streams and program
 *   spawn.c    starts the program: terminal or pipes, user, directory, exec
 *   user.c     /etc/passwd and /etc/group
 *   power.c    ends everything, then the machine
 *   event.c    tells the VMM where we are
 *
 * The guest's instructions until the first command are what a user waits for,
 * so there is no thread, no exec and no system call here that is not needed.
 */
#ifndef MV_AGENT_H
#define MV_AGENT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "mv/layout.h"
#include "proto.h"

/* ---- event.c ----------------------------------------------------------- */
void mv_event_enable(void);
/* Tells the VMM, once enabled; nothing happens where there is none of ours. `value` is 24 bits. */
void mv_event_send(enum mv_guest_event event, uint32_t value);

/* ---- init.c ------------------------------------------------------------ */
/* What the kernel's command line asks of us (microvm.NAME=VALUE). */
struct mv_options {
  const char *root;     /* root=DEVICE: leave the initramfs for it; or NULL  */
  const char *rootfs;   /* rootfs=TYPE, default ext4                         */
  const char *rootmode; /* rootmode=rw|ro|overlay, default rw                */
  const char *hostname; /* hostname=NAME, default microvm                    */
};
/* Says "microvm: what: reason" on the console. */
void mv_console_say(const char *what, const char *subject, int error);
/* Reads a file up to size - 1 bytes, by one read: it is in memory, in /proc or on
 * a local disk. Ends it with NUL. Length or -errno. */
ssize_t mv_file_read(const char *path, char *buf, size_t size);

/* ---- mount.c ----------------------------------------------------------- */
int mv_mount_early(void);                            /* /proc: 0 or -errno     */
int mv_mount_root(const struct mv_options *options); /* 0 or -errno           */
void mv_mount_rest(const struct mv_options *options);

/* ---- modules.c --------------------------------------------------------- */
/* Loads what /lib/microvm/modules.list names; parameters are on its lines and
 * on the command line. */
void mv_modules_load(const char *cmdline);

/* ---- applets.c ----------------------------------------------------------- */
void mv_applets_link(void);

/* ---- agent.c ----------------------------------------------------------- */
struct mv_watch {
  void (*fn)(struct mv_watch *watch, uint32_t events); /* EPOLLIN...         */
};
/* Edge-triggered, for input and output: the callee goes on until EAGAIN. */
int mv_agent_watch(int fd, struct mv_watch *watch);
int mv_agent_rewatch(int fd, struct mv_watch *watch);
/* Closes a descriptor that may be watched. close() alone would leave it in the
 * epoll set for as long as a child that is about to exec or exit has a copy. */
void mv_agent_close(int fd);
/* Listens on the agent's vsock port: descriptor or -errno. */
int mv_agent_listen(void);
/* Serves sessions on the listening socket until the machine (as PID 1) or the
 * process is to end. Returns -errno, or what a SHUTDOWN frame asked for. */
int mv_agent_serve(int listener, struct mv_shutdown *out);
void mv_agent_shutdown(const struct mv_shutdown *what);
uint64_t mv_agent_now(void); /* ns, monotonic                                */

/* ---- session.c --------------------------------------------------------- */
/* Gives a stream that has said hello to its session, which then owns it. On
 * failure it is the caller's to close. `watched`: it is in the epoll set. */
int mv_session_attach(const struct mv_hello *hello, int fd, bool watched);
/* A child has ended: true if it was a session's program. */
bool mv_session_reaped(pid_t pid, int status);
/* Goes on with all sessions that had to yield; frees those that are over.
 * True: there is more to do at once. */
bool mv_sessions_continue(void);
/* Hangs all sessions up: a shell at a terminal does not heed SIGTERM. */
void mv_sessions_hangup(void);
/* Kills what did not heed its hang-up. Returns ms to the next such moment, -1. */
int mv_sessions_expire(void);

/* ---- user.c ------------------------------------------------------------ */
#define MV_GROUPS_MAX 64
struct mv_user {
  uid_t uid;
  gid_t gid;
  size_t ngroups;
  gid_t groups[MV_GROUPS_MAX];
  char name[64], home[256], shell[256];
};
/* Looks up "NAME|UID[:GROUP|GID]" ("" is root). 0, -ENOENT, -EINVAL. */
int mv_user_find(const char *spec, struct mv_user *out);

/* ---- spawn.c ----------------------------------------------------------- */
struct mv_spawn {
  const char *dir, *user; /* as in struct mv_exec                            */
  char **argv;            /* NULL-terminated                                 */
  char **env;             /* NULL-terminated, with room for MV_ENV_ADDED more */
  uint32_t channels;
  bool pty, login;
  struct mv_winsize winsize;
  /* filled: */
  pid_t pid;
  int near[3]; /* our ends, non-blocking, by channel; one descriptor twice
                  for a terminal; -1                                         */
};
#define MV_ENV_ADDED 6
/* 0, or -errno with *stage saying what failed. */
int mv_spawn(struct mv_spawn *spawn, enum mv_stage *stage);

/* ---- power.c ----------------------------------------------------------- */
/* Ends all processes, writes everything to disk, ends the machine. */
_Noreturn void mv_power_off(const struct mv_shutdown *what);

#endif
