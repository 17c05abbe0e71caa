/*
 * Input and output that never waits, on descriptors that are not ours.
 *
 * stdin and stdout belong to the user: O_NONBLOCK sits on the open file
 * description, so setting it would change the shell's terminal and the other
 * end of the user's pipe.  So, by kind:
 *
 *   socket            MSG_DONTWAIT on each call
 *   pipe, terminal    opened anew through /proc/self/fd, with O_NONBLOCK;
 *                     where that is refused: poll() before each call, and
 *                     no more than what poll() promised
 *   file, /dev/null   never waits (epoll refuses it: always ready)
 */
#ifndef MV_FDIO_H
#define MV_FDIO_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "mv/loop.h"

enum mv_fd_kind { MV_FD_NONE, MV_FD_NONBLOCK, MV_FD_SOCKET, MV_FD_FILE, MV_FD_POLL };

struct mv_fd {
  int fd; /* ours; may be another number than the one given; -1: none      */
  enum mv_fd_kind kind;
  bool writing;
  bool watched;      /* in the loop; false: always ready, or not added yet  */
  uint32_t poll_max; /* MV_FD_POLL: bytes that one write may carry          */
  struct mv_loop *loop;
};

/* Takes over `fd` (-1: none) for reading or for writing. 0 or -errno; then fd
 * is closed. */
int mv_fd_open(struct mv_fd *f, int fd, bool writing);
/* Has the loop call fn at each *change* to readable or writable (EPOLLET): go
 * on until -EAGAIN. Files are not watched: 0, and f->watched stays false. */
int mv_fd_watch(struct mv_fd *f, struct mv_loop *loop, mv_loop_fn fn, void *ctx);
/* Bytes, 0 at EOF (read), -EAGAIN, -EPIPE (write) or another -errno. */
ssize_t mv_fd_readv(struct mv_fd *f, const struct iovec *iov, unsigned n);
ssize_t mv_fd_writev(struct mv_fd *f, const struct iovec *iov, unsigned n);
/* Unwatches and closes. Loop's thread if watched. */
void mv_fd_close(struct mv_fd *f);

#endif
