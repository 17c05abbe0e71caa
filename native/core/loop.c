/*
 * The I/O loop (mv/loop.h): epoll, and an eventfd for posts and stop.
 *
 * A watched descriptor is one heap node, found by number in a table and by
 * address in epoll's event.  Deleting marks the node dead and keeps it until
 * the batch of events that may still name it is over; that is what makes a
 * delete inside any callback safe.  add, mod and del belong to the loop's
 * thread (or to the time before it runs); post and stop to any thread.
 */
#define _GNU_SOURCE
#include "mv/loop.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#define BATCH 64

struct watch {
  int fd;
  bool dead;
  mv_loop_fn fn;
  void *ctx;
  struct watch *next; /* in the graveyard */
};

struct post {
  void (*fn)(void *ctx);
  void *ctx;
  struct post *next;
};

struct mv_loop {
  int epoll_fd, wake_fd;
  struct watch **table; /* by descriptor */
  int table_len;
  struct watch *graveyard;
  pthread_mutex_t lock; /* guards the posts */
  struct post *first, **last;
  bool stop;
};

static void loop_wake(struct mv_loop *loop) {
  uint64_t one = 1;
  /* Fails only when the counter is full: then the loop is awake anyway. */
  if (write(loop->wake_fd, &one, sizeof(one)) < 0)
    return;
}

/* Takes one post, or NULL. */
static struct post *post_take(struct mv_loop *loop) {
  pthread_mutex_lock(&loop->lock);
  struct post *post = loop->first;
  if (post) {
    loop->first = post->next;
    if (!loop->first)
      loop->last = &loop->first;
  }
  pthread_mutex_unlock(&loop->lock);
  return post;
}

/* Runs what was posted before this call; what a post posts waits its turn. */
static void posts_run(void *ctx, uint32_t events) {
  (void)events;
  struct mv_loop *loop = ctx;
  uint64_t count;
  if (read(loop->wake_fd, &count, sizeof(count)) < 0 && errno != EAGAIN)
    return;
  pthread_mutex_lock(&loop->lock);
  struct post *post = loop->first;
  loop->first = NULL;
  loop->last = &loop->first;
  pthread_mutex_unlock(&loop->lock);
  while (post) {
    struct post *next = post->next;
    post->fn(post->ctx);
    free(post);
    post = next;
  }
}

struct mv_loop *mv_loop_new(void) {
  struct mv_loop *loop = calloc(1, sizeof(*loop));
  if (!loop)
    return NULL;
  loop->last = &loop->first;
  pthread_mutex_init(&loop->lock, NULL);
  loop->epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  loop->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  int err = errno;
  if (loop->epoll_fd >= 0 && loop->wake_fd >= 0) {
    err = -mv_loop_add(loop, loop->wake_fd, EPOLLIN, posts_run, loop);
    if (!err)
      return loop;
  }
  mv_loop_free(loop);
  errno = err;
  return NULL;
}

static void graveyard_clear(struct mv_loop *loop) {
  while (loop->graveyard) {
    struct watch *watch = loop->graveyard;
    loop->graveyard = watch->next;
    free(watch);
  }
}

void mv_loop_free(struct mv_loop *loop) {
  if (!loop)
    return;
  for (int fd = 0; fd < loop->table_len; fd++)
    free(loop->table[fd]);
  free(loop->table);
  graveyard_clear(loop);
  for (struct post *post; (post = post_take(loop));)
    free(post);
  if (loop->epoll_fd >= 0)
    close(loop->epoll_fd);
  if (loop->wake_fd >= 0)
    close(loop->wake_fd);
  pthread_mutex_destroy(&loop->lock);
  free(loop);
}

static int table_fit(struct mv_loop *loop, int fd) {
  if (fd < loop->table_len)
    return 0;
  int len = loop->table_len ? loop->table_len : 64;
  while (len <= fd)
    len *= 2;
  struct watch **table = realloc(loop->table, len * sizeof(*table));
  if (!table)
    return -ENOMEM;
  for (int i = loop->table_len; i < len; i++)
    table[i] = NULL;
  loop->table = table;
  loop->table_len = len;
  return 0;
}

int mv_loop_add(struct mv_loop *loop, int fd, uint32_t events, mv_loop_fn fn, void *ctx) {
  if (fd < 0)
    return -EBADF;
  if (fd < loop->table_len && loop->table[fd])
    return -EEXIST;
  int rc = table_fit(loop, fd);
  struct watch *watch = rc ? NULL : calloc(1, sizeof(*watch));
  if (!watch)
    return -ENOMEM;
  *watch = (struct watch){.fd = fd, .fn = fn, .ctx = ctx};
  struct epoll_event event = {.events = events, .data.ptr = watch};
  if (epoll_ctl(loop->epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0) {
    rc = -errno;
    free(watch);
    return rc;
  }
  loop->table[fd] = watch;
  return 0;
}

int mv_loop_mod(struct mv_loop *loop, int fd, uint32_t events) {
  if (fd < 0 || fd >= loop->table_len || !loop->table[fd])
    return -ENOENT;
  struct epoll_event event = {.events = events, .data.ptr = loop->table[fd]};
  return epoll_ctl(loop->epoll_fd, EPOLL_CTL_MOD, fd, &event) < 0 ? -errno : 0;
}

void mv_loop_del(struct mv_loop *loop, int fd) {
  if (fd < 0 || fd >= loop->table_len || !loop->table[fd])
    return;
  struct watch *watch = loop->table[fd];
  loop->table[fd] = NULL;
  epoll_ctl(loop->epoll_fd, EPOLL_CTL_DEL, fd, NULL);
  watch->dead = true;
  watch->next = loop->graveyard;
  loop->graveyard = watch;
}

int mv_loop_post(struct mv_loop *loop, void (*fn)(void *ctx), void *ctx) {
  struct post *post = malloc(sizeof(*post));
  if (!post)
    return -ENOMEM;
  *post = (struct post){.fn = fn, .ctx = ctx};
  pthread_mutex_lock(&loop->lock);
  *loop->last = post;
  loop->last = &post->next;
  pthread_mutex_unlock(&loop->lock);
  loop_wake(loop);
  return 0;
}

int mv_loop_run(struct mv_loop *loop) {
  struct epoll_event events[BATCH];
  while (!__atomic_load_n(&loop->stop, __ATOMIC_ACQUIRE)) {
    int n = epoll_wait(loop->epoll_fd, events, BATCH, -1);
    if (n < 0 && errno != EINTR)
      return -errno;
    for (int i = 0; i < n; i++) {
      struct watch *watch = events[i].data.ptr;
      if (!watch->dead)
        watch->fn(watch->ctx, events[i].events);
    }
    graveyard_clear(loop);
  }
  __atomic_store_n(&loop->stop, false, __ATOMIC_RELEASE); /* may be run again */
  return 0;
}

void mv_loop_stop(struct mv_loop *loop) {
  __atomic_store_n(&loop->stop, true, __ATOMIC_RELEASE);
  loop_wake(loop);
}
