/*
 * Starts a session's program.
 *
 * vfork and not fork: the child borrows our memory until it execs, so that
 * nothing is copied and its failure comes back as a plain variable, before the
 * host is told that the program runs. In the child only system calls are made.
 *
 * Pipes and not the vsock sockets themselves become the program's stdio: a
 * script that opens /dev/stdout or /dev/stderr again would get ENXIO from a
 * socket. The agent carries the bytes between the two.
 */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "agent.h"

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#ifndef TIOCGPTPEER
#define TIOCGPTPEER 0x5441 /* asm-generic/ioctls.h */
#endif

/* All that the child needs, ready made. */
struct child {
  char *const *argv, *const *env;
  const char *file; /* to look for                                           */
  const char *path, *dir, *home;
  const struct mv_user *user;
  bool switch_user;
  int stdio[3]; /* -1: /dev/null                                             */
  bool pty;
  volatile int error;
  volatile enum mv_stage stage;
};

static _Noreturn void child_fail(struct child *child, enum mv_stage stage, int error) {
  child->stage = stage;
  child->error = error;
  _exit(127);
}

/* Makes the three descriptors 0, 1 and 2, and the terminal the controlling one. */
static void child_stdio(struct child *child) {
  if (setsid() < 0)
    child_fail(child, MV_STAGE_RESOURCES, errno);
  for (int i = 0; i < 3; i++) {
    int fd = child->stdio[i];
    if (fd < 0)
      fd = open("/dev/null", (i ? O_WRONLY : O_RDONLY) | O_CLOEXEC);
    if (fd < 0 || dup2(fd, i) < 0)
      child_fail(child, MV_STAGE_RESOURCES, errno);
  }
  if (child->pty && ioctl(0, TIOCSCTTY, 0) < 0)
    child_fail(child, MV_STAGE_RESOURCES, errno);
}

/* The bare system calls: libc's versions coordinate threads. */
static void child_user(struct child *child) {
  const struct mv_user *user = child->user;
  if (syscall(SYS_setgroups, user->ngroups, user->groups) < 0 ||
      syscall(SYS_setresgid, user->gid, user->gid, user->gid) < 0 ||
      syscall(SYS_setresuid, user->uid, user->uid, user->uid) < 0)
    child_fail(child, MV_STAGE_USER, errno);
}

static void child_directory(struct child *child) {
  if (*child->dir) {
    if (chdir(child->dir) < 0)
      child_fail(child, MV_STAGE_DIRECTORY, errno);
  } else if (chdir(child->home) < 0 && chdir("/") < 0) {
    child_fail(child, MV_STAGE_DIRECTORY, errno);
  }
}

/* Executes the file; one without a format that the kernel knows is a script. */
static void child_exec_file(struct child *child, const char *file) {
  execve(file, child->argv, child->env);
  if (errno != ENOEXEC)
    return;
  size_t argc = 0;
  while (child->argv[argc])
    argc++;
  char *argv[argc + 2];
  argv[0] = "/bin/sh";
  argv[1] = (char *)file;
  memcpy(argv + 2, child->argv + 1, argc * sizeof(*argv));
  execve(argv[0], argv, child->env);
  errno = ENOEXEC;
}

/* Looks in PATH with access(), since an execve that fails costs ten times as
 * much. "Found but not to be executed" wins over "not found". */
static void child_exec(struct child *child) {
  const char *name = child->file;
  char file[PATH_MAX];
  int error = ENOENT;
  if (!*name)
    child_fail(child, MV_STAGE_EXEC, ENOENT);
  if (strchr(name, '/')) {
    child_exec_file(child, name);
    child_fail(child, MV_STAGE_EXEC, errno);
  }
  size_t name_len = strlen(name);
  for (const char *dir = child->path, *end; dir; dir = *end ? end + 1 : NULL) {
    end = strchrnul(dir, ':');
    size_t dir_len = end - dir;
    if (dir_len + name_len + 2 > sizeof(file))
      continue;
    memcpy(file, dir, dir_len);
    file[dir_len] = '/';
    memcpy(file + dir_len + (dir_len > 0), name, name_len + 1);
    if (access(file, X_OK) == 0)
      child_exec_file(child, file);
    if (errno == EACCES)
      error = EACCES;
    else if (errno != ENOENT && errno != ENOTDIR)
      child_fail(child, MV_STAGE_EXEC, errno);
  }
  child_fail(child, MV_STAGE_EXEC, error);
}

static pid_t child_start(struct child *child) {
  pid_t pid = vfork();
  if (pid)
    return pid;
  sigset_t none;
  sigemptyset(&none);
  child_stdio(child);
  if (child->switch_user)
    child_user(child);
  child_directory(child);
  sigprocmask(SIG_SETMASK, &none, NULL);
  child_exec(child);
  _exit(127);
}

/* The value of NAME in an environment, or NULL. */
static const char *env_get(char *const *env, const char *name) {
  size_t len = strlen(name);
  for (; *env; env++)
    if (!strncmp(*env, name, len) && (*env)[len] == '=')
      return *env + len + 1;
  return NULL;
}

/* Appends NAME=VALUE unless NAME is there. `text` keeps it. */
static void env_default(char **env, const char *name, const char *value, char *text, size_t size) {
  if (env_get(env, name) || strlen(name) + strlen(value) + 2 > size)
    return;
  char *end = stpcpy(text, name);
  *end++ = '=';
  strcpy(end, value);
  while (*env)
    env++;
  env[0] = text;
  env[1] = NULL;
}

static void close_all(int *fd, int n) {
  for (int i = 0; i < n; i++)
    if (fd[i] >= 0 && (!i || fd[i] != fd[i - 1]))
      close(fd[i]);
}

/* What a login shell is called: its name after a dash. */
static char *login_name(const char *shell, char *buf, size_t size) {
  const char *slash = strrchr(shell, '/');
  const char *base = slash ? slash + 1 : shell;
  size_t len = strnlen(base, size - 2);
  buf[0] = '-';
  memcpy(buf + 1, base, len);
  buf[len + 1] = 0;
  return buf;
}

/* A terminal: our end once for input and once for output, three for the child. */
static int terminal_open(struct mv_spawn *spawn, const struct mv_user *user, int far[3]) {
  int unlocked = 0, error;
  struct winsize size = {spawn->winsize.rows, spawn->winsize.cols, spawn->winsize.xpixel,
                         spawn->winsize.ypixel};
  int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
  if (master < 0)
    return -errno;
  int slave = -1;
  if (ioctl(master, TIOCSPTLCK, &unlocked) < 0 ||
      (slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0 ||
      (size.ws_row && ioctl(master, TIOCSWINSZ, &size) < 0) ||
      (user->uid && fchown(slave, user->uid, (gid_t)-1) < 0)) {
    error = -errno;
    close(master);
    if (slave >= 0)
      close(slave);
    return error;
  }
  spawn->near[0] = spawn->near[1] = master;
  far[0] = far[1] = far[2] = slave;
  return 0;
}

/* A pipe for each channel that is asked for. */
static int pipes_open(struct mv_spawn *spawn, int far[3]) {
  for (int i = 0; i < 3; i++) {
    int fd[2];
    if (!(spawn->channels & 1u << i))
      continue;
    if (pipe2(fd, O_CLOEXEC) < 0)
      return -errno;
    spawn->near[i] = fd[i == 0];
    far[i] = fd[i != 0];
    if (fcntl(spawn->near[i], F_SETFL, O_NONBLOCK) < 0)
      return -errno;
  }
  return 0;
}

int mv_spawn(struct mv_spawn *spawn, enum mv_stage *stage) {
  static struct mv_user user; /* large; one program is started at a time */
  char home[300], name[100], logname[100], shell[300], path[100], term[16], argv0[64];
  int far[3] = {-1, -1, -1};
  spawn->near[0] = spawn->near[1] = spawn->near[2] = -1;

  *stage = MV_STAGE_USER;
  int error = mv_user_find(spawn->user, &user);
  if (error)
    return error;
  *stage = MV_STAGE_RESOURCES;
  error = spawn->pty ? terminal_open(spawn, &user, far) : pipes_open(spawn, far);
  if (!error) {
    env_default(spawn->env, "HOME", user.home, home, sizeof(home));
    env_default(spawn->env, "USER", user.name, name, sizeof(name));
    env_default(spawn->env, "LOGNAME", user.name, logname, sizeof(logname));
    env_default(spawn->env, "SHELL", user.shell, shell, sizeof(shell));
    env_default(spawn->env, "PATH", DEFAULT_PATH, path, sizeof(path));
    if (spawn->pty)
      env_default(spawn->env, "TERM", "linux", term, sizeof(term));
    char *const login[] = {login_name(user.shell, argv0, sizeof(argv0)), NULL};
    struct child child = {
        .argv = spawn->login ? login : spawn->argv,
        .env = spawn->env,
        .file = spawn->login ? user.shell : spawn->argv[0],
        .path = env_get(spawn->env, "PATH"),
        .dir = spawn->dir,
        .home = user.home,
        .user = &user,
        .switch_user = *spawn->user != 0,
        .stdio = {far[0], far[1], far[2]},
        .pty = spawn->pty,
    };
    spawn->pid = child_start(&child);
    error = spawn->pid < 0 ? -errno : -child.error;
    if (child.error)
      *stage = child.stage;
  }
  close_all(far, 3);
  if (error)
    close_all(spawn->near, 3);
  return error;
}
