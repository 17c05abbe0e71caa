/* I/O that never waits (mv/fdio.h). */
#define _GNU_SOURCE
#include "mv/fdio.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* What poll() promises to a writer: a pipe has a free page; a terminal has
 * room for at least a few bytes (tty_poll, WAKEUP_CHARS). */
#define PIPE_PROMISE 4096
#define TTY_PROMISE  64

/* A pty's master opened anew would be another pty (/dev/ptmx). */
static bool reopenable(const struct stat *st, int fd) {
  return S_ISFIFO(st->st_mode) || (isatty(fd) && st->st_rdev != makedev(5, 2));
}

static int reopen_nonblock(int fd, bool writing) {
  char path[32];
  snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
  return open(path, (writing ? O_WRONLY : O_RDONLY) | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

int mv_fd_open(struct mv_fd *f, int fd, bool writing) {
  struct stat st;
  *f = (struct mv_fd){.fd = fd, .kind = MV_FD_NONE, .writing = writing};
  if (fd < 0)
    return 0;
  if (fstat(fd, &st) < 0) {
    int err = errno;
    mv_fd_close(f);
    return -err;
  }
  if (S_ISSOCK(st.st_mode)) {
    f->kind = MV_FD_SOCKET;
  } else if (S_ISREG(st.st_mode) || S_ISBLK(st.st_mode) || S_ISDIR(st.st_mode)) {
    f->kind = MV_FD_FILE;
  } else {
    int again = reopenable(&st, fd) ? reopen_nonblock(fd, writing) : -1;
    if (again >= 0) {
      close(fd);
      f->fd = again;
      f->kind = MV_FD_NONBLOCK;
    } else {
      f->kind = MV_FD_POLL;
      f->poll_max = S_ISFIFO(st.st_mode) ? PIPE_PROMISE : TTY_PROMISE;
    }
  }
  return 0;
}

int mv_fd_watch(struct mv_fd *f, struct mv_loop *loop, mv_loop_fn fn, void *ctx) {
  if (f->kind == MV_FD_NONE || f->kind == MV_FD_FILE)
    return 0;
  uint32_t events = f->writing ? EPOLLOUT : EPOLLIN | EPOLLRDHUP;
  int rc = mv_loop_add(loop, f->fd, events | EPOLLET, fn, ctx);
  if (rc == -EPERM) { /* /dev/null and its like: no poll, never waits */
    f->kind = MV_FD_FILE;
    return 0;
  }
  if (rc)
    return rc;
  f->watched = true;
  f->loop = loop;
  return 0;
}

/* -EAGAIN unless poll() says that a call returns at once. */
static int poll_ready(int fd, short events) {
  struct pollfd p = {.fd = fd, .events = events};
  int n = poll(&p, 1, 0);
  return n > 0 ? 0 : -EAGAIN;
}

/* The first `max` bytes of an iovec array; at most 16 entries of it. */
static unsigned iov_limit(struct iovec *out, const struct iovec *iov, unsigned n, size_t max) {
  unsigned i;
  for (i = 0; i < n && i < 16 && max; i++) {
    out[i] = iov[i];
    if (out[i].iov_len > max)
      out[i].iov_len = max;
    max -= out[i].iov_len;
  }
  return i;
}

ssize_t mv_fd_readv(struct mv_fd *f, const struct iovec *iov, unsigned n) {
  ssize_t got;
  if (n > IOV_MAX)
    n = IOV_MAX;
  if (f->kind == MV_FD_POLL && poll_ready(f->fd, POLLIN) < 0)
    return -EAGAIN;
  do {
    if (f->kind == MV_FD_SOCKET) {
      struct msghdr msg = {.msg_iov = (struct iovec *)iov, .msg_iovlen = n};
      got = recvmsg(f->fd, &msg, MSG_DONTWAIT);
    } else {
      got = readv(f->fd, iov, n);
    }
  } while (got < 0 && errno == EINTR);
  if (got < 0)
    return -errno;
  return got;
}

ssize_t mv_fd_writev(struct mv_fd *f, const struct iovec *iov, unsigned n) {
  struct iovec limited[16];
  ssize_t put;
  if (n > IOV_MAX)
    n = IOV_MAX;
  if (f->kind == MV_FD_POLL) {
    if (poll_ready(f->fd, POLLOUT) < 0)
      return -EAGAIN;
    n = iov_limit(limited, iov, n, f->poll_max);
    iov = limited;
  }
  do {
    if (f->kind == MV_FD_SOCKET) {
      struct msghdr msg = {.msg_iov = (struct iovec *)iov, .msg_iovlen = n};
      put = sendmsg(f->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    } else {
      put = writev(f->fd, iov, n);
    }
  } while (put < 0 && errno == EINTR);
  return put < 0 ? -errno : put;
}

void mv_fd_close(struct mv_fd *f) {
  if (f->fd < 0)
    return;
  if (f->watched)
    mv_loop_del(f->loop, f->fd);
  close(f->fd);
  *f = (struct mv_fd){.fd = -1, .kind = MV_FD_NONE};
}
