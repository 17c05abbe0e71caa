/*
 * The agent's loop: one epoll set, one process.
 *
 * New streams are strangers until their hello is complete; then they belong to
 * a session. Only the host is listened to: vsock also connects processes of
 * the guest with each other. All signals are blocked; those that mean something
 * come through a signalfd.
 */
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define STRANGERS_MAX 64
#define EVENTS_MAX    32
#define BACKLOG       64

/* linux/vm_sockets.h, which libc does not bring along. */
struct vsock_address {
  sa_family_t family;
  uint16_t reserved;
  uint32_t port;
  uint32_t cid;
  uint8_t flags;
  uint8_t zero[3];
};
_Static_assert(sizeof(struct vsock_address) == sizeof(struct sockaddr), "wire format");
#define VSOCK_ANY_CID            0xffffffffu
#define VSOCK_SO_BUFFER_SIZE     0 /* level AF_VSOCK, 64 bits, up to the next   */
#define VSOCK_SO_BUFFER_MAX_SIZE 2 /* the same                                  */
#define STREAM_BUFFER            (1u << 20)

struct stranger {
  struct mv_watch watch;
  int fd;
  uint32_t got;
  struct mv_hello hello;
};

static int epoll_fd = -1, listen_fd = -1, signal_fd = -1;
static unsigned nstrangers;
static bool ending;
static struct mv_shutdown ending_how;

uint64_t mv_agent_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ULL + now.tv_nsec;
}

static int watch_set(int op, int fd, struct mv_watch *watch) {
  struct epoll_event event = {
      .events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
      .data.ptr = watch,
  };
  return epoll_ctl(epoll_fd, op, fd, &event) < 0 ? -errno : 0;
}

int mv_agent_watch(int fd, struct mv_watch *watch) {
  return watch_set(EPOLL_CTL_ADD, fd, watch);
}

int mv_agent_rewatch(int fd, struct mv_watch *watch) {
  return watch_set(EPOLL_CTL_MOD, fd, watch);
}

void mv_agent_close(int fd) {
  epoll_ctl(epoll_fd, EPOLL_CTL_DEL, fd, NULL);
  close(fd);
}

void mv_agent_shutdown(const struct mv_shutdown *what) {
  ending = true;
  ending_how = *what;
}

/* Reads on in the hello. 1: whole and good, 0: not yet, -errno. */
static int hello_read(struct stranger *one) {
  while (one->got < sizeof(one->hello)) {
    ssize_t n = read(one->fd, (uint8_t *)&one->hello + one->got, sizeof(one->hello) - one->got);
    if (n < 0 && errno == EAGAIN)
      return 0;
    if (n <= 0)
      return n ? -errno : -EPIPE;
    one->got += n;
  }
  const struct mv_hello *hello = &one->hello;
  bool good = hello->magic == MV_HELLO_MAGIC &&
              (hello->kind == MV_STREAM_CONTROL || hello->kind == MV_STREAM_DATA);
  return good ? 1 : -EPROTO;
}

static void stranger_event(struct mv_watch *watch, uint32_t events) {
  struct stranger *one = (struct stranger *)watch;
  (void)events;
  int whole = hello_read(one);
  if (!whole)
    return;
  if (whole < 0 || mv_session_attach(&one->hello, one->fd, true) < 0)
    mv_agent_close(one->fd);
  nstrangers--;
  free(one);
}

/* Most streams have said hello by the time they are accepted. */
static void stream_accept(int fd) {
  struct stranger now = {.watch.fn = stranger_event, .fd = fd}, *later = NULL;
  int whole = hello_read(&now);
  if (whole > 0 && mv_session_attach(&now.hello, fd, false) == 0)
    return;
  if (!whole && nstrangers < STRANGERS_MAX && (later = malloc(sizeof(*later)))) {
    *later = now;
    if (mv_agent_watch(fd, &later->watch) == 0) {
      nstrangers++;
      return;
    }
  }
  free(later);
  mv_agent_close(fd);
}

static bool from_host(const struct vsock_address *from) {
  return from->family != AF_VSOCK || from->cid == MV_VSOCK_HOST_CID;
}

static void listener_event(struct mv_watch *watch, uint32_t events) {
  (void)watch;
  (void)events;
  for (;;) {
    struct vsock_address from = {0};
    socklen_t len = sizeof(from);
    int fd = accept4(listen_fd, (struct sockaddr *)&from, &len, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0 && from_host(&from))
      stream_accept(fd);
    else if (fd >= 0)
      close(fd);
    else if (errno != ECONNABORTED)
      return;
  }
}

static void children_reap(void) {
  int status;
  pid_t pid;
  while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
    mv_session_reaped(pid, status);
}

/* What busybox's poweroff, halt and reboot send, and Ctrl-Alt-Del. */
static void signal_obey(uint32_t signo) {
  struct mv_shutdown off = {MV_SHUTDOWN_POWEROFF, 0}, again = {MV_SHUTDOWN_REBOOT, 0};
  if (signo == SIGCHLD)
    children_reap();
  else
    mv_agent_shutdown(signo == SIGTERM || signo == SIGINT ? &again : &off);
}

static void signals_event(struct mv_watch *watch, uint32_t events) {
  struct signalfd_siginfo info;
  (void)watch;
  (void)events;
  while (read(signal_fd, &info, sizeof(info)) == sizeof(info))
    signal_obey(info.ssi_signo);
}

static int signals_open(void) {
  sigset_t all, ours;
  sigfillset(&all);
  sigemptyset(&ours);
  sigaddset(&ours, SIGCHLD);
  sigaddset(&ours, SIGTERM);
  sigaddset(&ours, SIGINT);
  sigaddset(&ours, SIGUSR1);
  sigaddset(&ours, SIGUSR2);
  if (sigprocmask(SIG_SETMASK, &all, NULL) < 0)
    return -errno;
  signal_fd = signalfd(-1, &ours, SFD_CLOEXEC | SFD_NONBLOCK);
  return signal_fd < 0 ? -errno : 0;
}

/* Bytes that may be under way on a stream; accepted sockets inherit it. With
 * the kernel's 256 KiB the two sides wait for each other four times as often. */
static void buffer_grow(int fd) {
  uint64_t size = STREAM_BUFFER;
  setsockopt(fd, AF_VSOCK, VSOCK_SO_BUFFER_MAX_SIZE, &size, sizeof(size));
  setsockopt(fd, AF_VSOCK, VSOCK_SO_BUFFER_SIZE, &size, sizeof(size));
}

int mv_agent_listen(void) {
  struct vsock_address address = {
      .family = AF_VSOCK, .port = MV_VSOCK_AGENT_PORT, .cid = VSOCK_ANY_CID};
  int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0)
    return -errno;
  buffer_grow(fd);
  if (bind(fd, (struct sockaddr *)&address, sizeof(address)) < 0 || listen(fd, BACKLOG) < 0) {
    int error = -errno;
    close(fd);
    return error;
  }
  return fd;
}

static void loop_run(void) {
  struct epoll_event events[EVENTS_MAX];
  bool more = false;
  while (!ending) {
    int timeout = mv_sessions_expire();
    int n = epoll_wait(epoll_fd, events, EVENTS_MAX, more ? 0 : timeout);
    for (int i = 0; i < n; i++) {
      struct mv_watch *watch = events[i].data.ptr;
      watch->fn(watch, events[i].events);
    }
    more = mv_sessions_continue();
  }
}

int mv_agent_serve(int listener, struct mv_shutdown *out) {
  static struct mv_watch listener_watch = {listener_event}, signals_watch = {signals_event};
  listen_fd = listener;
  int error = signals_open();
  if (error)
    return error;
  epoll_fd = epoll_create1(EPOLL_CLOEXEC);
  if (epoll_fd < 0)
    return -errno;
  error = mv_agent_watch(listen_fd, &listener_watch);
  if (!error)
    error = mv_agent_watch(signal_fd, &signals_watch);
  if (error)
    return error;
  loop_run();
  mv_sessions_hangup();
  *out = ending_how;
  return 0;
}
