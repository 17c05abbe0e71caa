/*
 * One session: a program, the host's control stream, and the data streams.
 *
 *   waiting   until the control stream has brought EXEC and a data stream is
 *             there for each channel; they may come in any order
 *   running   bytes go between streams and program; frames are obeyed
 *   draining  the program has ended: what it left in its pipes is sent
 *   over      EXIT or ERROR has been sent, all is closed
 *
 * A pump carries one channel in one direction through one bounded buffer; it
 * reads only when the buffer is empty, so that a slow reader stops its writer.
 * Everything is non-blocking and edge-triggered: whatever happens, the session
 * is run until nothing more can be done, and yields after a while to others.
 *
 * When the control stream ends, or on HANGUP, the program loses its terminal or
 * stdin and gets SIGHUP, and SIGKILL if it is still there after a moment.
 */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define SESSIONS_MAX  128 /* six descriptors each: within the usual limit of 1024   */
#define PUMP_SIZE     (128u << 10)
#define PUMP_ROUNDS   16
#define PIPE_GROW_AT  (64 << 10) /* a read of this size: the pipe was full  */
#define PIPE_SIZE     (1 << 20)
#define KILL_AFTER_NS 2000000000ULL
#define CLOCK_OFF_NS  1000000000LL
#define EXEC_STRINGS  2 /* directory, user; then arguments, environment        */
#define EXEC_FLAGS    (MV_EXEC_PTY | MV_EXEC_LOGIN)
#define TERMINAL_EOF  "\4"

enum { IN, OUT, ERR, CHANNELS };

enum phase { WAITING, RUNNING, OVER };

/* What stopped a pump. */
enum pumped { PUMP_DONE, PUMP_NO_INPUT, PUMP_BLOCKED, PUMP_YIELDED };

struct pump {
  uint8_t *buf;
  uint32_t head, tail; /* bytes not yet written                              */
  bool grown;
};

struct session {
  struct session *next;
  struct mv_watch watch;       /* streams, terminal, output pipes            */
  struct mv_watch watch_stdin; /* the program's stdin: is it closed?         */
  uint32_t id;
  enum phase phase;
  bool pty, exited, told, yielded;
  uint32_t early_signal; /* came before the program; 0: none                 */
  uint64_t kill_at;      /* 0: nobody to kill                                     */

  int control;          /* -1: not yet, or gone                              */
  struct mv_frame head; /* the frame that is being received                  */
  uint32_t got;         /* bytes of it, head included                        */
  uint8_t *payload;
  struct mv_exec *exec; /* EXEC's payload; freed when the program runs       */
  uint32_t exec_len;
  uint8_t reply[48]; /* frames not yet sent                                  */
  uint32_t reply_len;

  uint32_t channels;    /* that EXEC asked for                               */
  int stream[CHANNELS]; /* the host's side; one may serve IN and OUT         */
  int near[CHANNELS];   /* the program's side; a terminal is IN and OUT      */
  struct pump pump[CHANNELS];
  pid_t pid;
  int status;
};

static struct session *sessions;
static unsigned nsessions;
static uint8_t *spare; /* one pump buffer, kept between uses                 */

static void session_run(struct session *s);

/* ---- descriptors --------------------------------------------------------- */

/* Lets go of one channel of a stream or of the program's side. A descriptor
 * that serves the other direction too stays open; `how` shuts this one down. */
static void channel_drop(int fd[CHANNELS], int ch, int how) {
  int old = fd[ch];
  fd[ch] = -1;
  if (old < 0)
    return;
  if (old != fd[IN] && old != fd[OUT])
    mv_agent_close(old);
  else if (how >= 0)
    shutdown(old, how);
}

static void pump_reset(struct pump *pump) {
  pump->head = pump->tail = 0;
  if (!pump->buf)
    return;
  if (spare)
    munmap(pump->buf, PUMP_SIZE);
  else
    spare = pump->buf;
  pump->buf = NULL;
}

static bool pump_buffer(struct pump *pump) {
  if (pump->buf)
    return true;
  pump->buf = spare;
  spare = NULL;
  if (!pump->buf) {
    pump->buf = mmap(NULL, PUMP_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pump->buf == MAP_FAILED)
      pump->buf = NULL;
  }
  return pump->buf != NULL;
}

static void data_close(struct session *s) {
  for (int ch = 0; ch < CHANNELS; ch++) {
    channel_drop(s->near, ch, -1);
    channel_drop(s->stream, ch, -1);
    pump_reset(&s->pump[ch]);
  }
}

static void session_end(struct session *s) {
  data_close(s);
  if (s->control >= 0)
    mv_agent_close(s->control);
  free(s->payload);
  free(s->exec);
  s->control = -1;
  s->payload = NULL;
  s->exec = NULL;
  s->phase = OVER;
}

/* ---- frames to the host -------------------------------------------------- */

static void reply_flush(struct session *s) {
  while (s->reply_len && s->control >= 0) {
    ssize_t n = send(s->control, s->reply, s->reply_len, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0)
      return;
    s->reply_len -= n;
    memmove(s->reply, s->reply + n, s->reply_len);
  }
}

/* A session sends at most two frames, for which there is room. */
static void reply_add(struct session *s, uint32_t type, const void *payload, uint32_t len) {
  struct mv_frame head = {type, len};
  if (s->reply_len + sizeof(head) + len > sizeof(s->reply))
    return;
  memcpy(s->reply + s->reply_len, &head, sizeof(head));
  memcpy(s->reply + s->reply_len + sizeof(head), payload, len);
  s->reply_len += sizeof(head) + len;
}

static void session_fail(struct session *s, enum mv_stage stage, int error) {
  struct mv_error payload = {stage, error};
  reply_add(s, MV_F_ERROR, &payload, sizeof(payload));
  reply_flush(s);
  session_end(s);
}

/* ---- frames from the host ------------------------------------------------ */

/* To the terminal's foreground group, or to the program's own. */
static void session_signal(struct session *s, uint32_t signo) {
  pid_t group = 0;
  if (s->phase == WAITING)
    s->early_signal = signo;
  if (!s->pid || s->exited)
    return;
  if (!s->pty || s->near[OUT] < 0 || ioctl(s->near[OUT], TIOCGPGRP, &group) < 0 || group <= 0)
    group = s->pid;
  kill(-group, signo);
}

/* The other side is gone: so are the terminal or stdin. Output pipes stay and
 * are emptied into nothing, lest SIGPIPE ends a program that is cleaning up. */
static void session_hangup(struct session *s) {
  if (s->phase == WAITING)
    session_fail(s, MV_STAGE_RESOURCES, ECANCELED);
  if (s->phase != RUNNING)
    return;
  for (int ch = 0; ch < CHANNELS; ch++)
    channel_drop(s->stream, ch, -1);
  channel_drop(s->near, IN, -1);
  if (s->pty)
    channel_drop(s->near, OUT, -1);
  if (s->exited || s->kill_at)
    return;
  kill(-s->pid, SIGHUP);
  kill(-s->pid, SIGCONT);
  s->kill_at = mv_agent_now() + KILL_AFTER_NS;
}

static void control_lost(struct session *s) {
  mv_agent_close(s->control);
  s->control = -1;
  session_hangup(s);
}

static void session_resize(struct session *s, const struct mv_winsize *size) {
  struct winsize ws = {size->rows, size->cols, size->xpixel, size->ypixel};
  if (s->pty && s->near[OUT] >= 0)
    ioctl(s->near[OUT], TIOCSWINSZ, &ws);
}

/* The strings are looked at when the program starts. */
static bool exec_valid(const struct mv_exec *exec, uint32_t len) {
  return len >= sizeof(*exec) && !(exec->flags & ~(uint32_t)EXEC_FLAGS) &&
         !(exec->channels >> CHANNELS) && !exec->argc == !!(exec->flags & MV_EXEC_LOGIN) &&
         (uint64_t)EXEC_STRINGS + exec->argc + exec->envc <= len;
}

/* Obeys one whole frame. 0 or -EPROTO. */
static int frame_obey(struct session *s) {
  uint32_t type = s->head.type, len = s->head.len;
  const void *payload = s->payload;
  if (type == MV_F_EXEC && s->phase == WAITING && !s->exec && exec_valid(payload, len)) {
    s->exec = (struct mv_exec *)s->payload;
    s->exec_len = len;
    s->payload = NULL;
  } else if (type == MV_F_SIGNAL && len == sizeof(struct mv_signal)) {
    session_signal(s, ((const struct mv_signal *)payload)->signo);
  } else if (type == MV_F_WINSIZE && len == sizeof(struct mv_winsize)) {
    session_resize(s, payload);
  } else if (type == MV_F_HANGUP && !len) {
    session_hangup(s);
  } else if (type == MV_F_SHUTDOWN && len == sizeof(struct mv_shutdown)) {
    mv_agent_shutdown(payload);
  } else {
    return -EPROTO;
  }
  return 0;
}

/* Reads towards the end of the current frame. 1: it is whole, 0: not yet,
 * -errno: the stream is over. */
static int frame_read(struct session *s) {
  for (;;) {
    uint8_t *into;
    size_t want;
    if (s->got < sizeof(s->head)) {
      into = (uint8_t *)&s->head + s->got;
      want = sizeof(s->head) - s->got;
    } else {
      if (s->head.len > MV_FRAME_SEND_MAX)
        return -EPROTO;
      if (!s->payload && !(s->payload = malloc(s->head.len + 1)))
        return -ENOMEM;
      into = s->payload + (s->got - sizeof(s->head));
      want = s->head.len + sizeof(s->head) - s->got;
      if (!want)
        return 1;
    }
    ssize_t n = read(s->control, into, want);
    if (n < 0 && errno == EAGAIN)
      return 0;
    if (n <= 0)
      return n ? -errno : -EPIPE;
    s->got += n;
  }
}

static void control_run(struct session *s) {
  while (s->control >= 0 && s->phase != OVER) {
    int whole = frame_read(s);
    if (!whole)
      return;
    int error = whole < 0 ? whole : frame_obey(s);
    free(s->payload);
    s->payload = NULL;
    s->got = 0;
    if (error == -EPROTO && s->phase == WAITING)
      session_fail(s, MV_STAGE_PROTOCOL, EPROTO);
    else if (error)
      control_lost(s);
  }
}

/* ---- start --------------------------------------------------------------- */

/* Points at the n strings after the struct, checks that they fill it exactly. */
static bool strings_split(struct session *s, char **out, uint32_t n) {
  char *at = (char *)(s->exec + 1), *end = (char *)s->exec + s->exec_len;
  for (uint32_t i = 0; i < n; i++) {
    char *nul = memchr(at, 0, end - at);
    if (!nul)
      return false;
    out[i] = at;
    at = nul + 1;
  }
  return at == end;
}

/* A guest that was stopped, or has no clock, learns the time from the host. */
static void clock_correct(uint64_t realtime) {
  struct timespec now, host = {realtime / 1000000000, realtime % 1000000000};
  if (!realtime || clock_gettime(CLOCK_REALTIME, &now) < 0)
    return;
  int64_t off = (int64_t)(now.tv_sec * 1000000000ULL + now.tv_nsec - realtime);
  if (off > CLOCK_OFF_NS || off < -CLOCK_OFF_NS)
    clock_settime(CLOCK_REALTIME, &host);
}

static bool streams_ready(const struct session *s) {
  for (int ch = 0; ch < CHANNELS; ch++)
    if (s->exec->channels & 1u << ch && s->stream[ch] < 0)
      return false;
  return true;
}

static void stdin_event(struct mv_watch *watch, uint32_t events);

/* Watches the program's side; a stream that was sent but not asked for ends. */
static int near_watch(struct session *s, const int near[CHANNELS]) {
  int error = 0;
  for (int ch = 0; ch < CHANNELS; ch++) {
    s->near[ch] = near[ch];
    if (near[ch] < 0)
      channel_drop(s->stream, ch, -1);
    else if (ch == IN || near[ch] != near[IN])
      error = mv_agent_watch(near[ch], ch == IN && !s->pty ? &s->watch_stdin : &s->watch) ?: error;
  }
  return error;
}

static int program_spawn(struct session *s, char **strings, enum mv_stage *stage) {
  const struct mv_exec *exec = s->exec;
  /* argv ends where the environment begins, so it moves down to make room for NULL */
  char **argv = strings + EXEC_STRINGS - 1, **env = strings + EXEC_STRINGS + exec->argc;
  const char *dir = strings[0], *user = strings[1];
  memmove(argv, argv + 1, exec->argc * sizeof(*argv));
  argv[exec->argc] = NULL;
  env[exec->envc] = NULL;
  struct mv_spawn spawn = {
      .dir = dir,
      .user = user,
      .argv = argv,
      .env = env,
      .channels = exec->channels,
      .pty = s->pty,
      .login = exec->flags & MV_EXEC_LOGIN,
      .winsize = exec->winsize,
  };
  int error = mv_spawn(&spawn, stage);
  if (error)
    return error;
  s->pid = spawn.pid;
  s->phase = RUNNING;
  return near_watch(s, spawn.near);
}

static int session_spawn(struct session *s, enum mv_stage *stage) {
  const struct mv_exec *exec = s->exec;
  *stage = MV_STAGE_PROTOCOL;
  uint32_t n = EXEC_STRINGS + exec->argc + exec->envc;
  char **strings = malloc((n + MV_ENV_ADDED + 1) * sizeof(*strings));
  if (!strings)
    return -ENOMEM;
  int error = -EINVAL;
  if (strings_split(s, strings, n)) {
    s->pty = exec->flags & MV_EXEC_PTY;
    clock_correct(exec->realtime);
    error = program_spawn(s, strings, stage);
  }
  free(strings);
  return error;
}

static void session_start(struct session *s) {
  static bool told;
  enum mv_stage stage;
  if (s->phase != WAITING || !s->exec || !streams_ready(s))
    return;
  if (!told)
    mv_event_send(MV_EVENT_COMMAND, 0);
  told = true;
  int error = session_spawn(s, &stage);
  free(s->exec);
  s->exec = NULL;
  if (s->phase == RUNNING) {
    struct mv_started payload = {s->pid};
    reply_add(s, MV_F_STARTED, &payload, sizeof(payload));
    if (s->early_signal)
      session_signal(s, s->early_signal);
    if (error) /* a stream that cannot be watched cannot be served */
      session_hangup(s);
  } else {
    session_fail(s, stage, -error);
  }
}

/* ---- data ---------------------------------------------------------------- */

/* The source has ended, or the sink takes no more (`broken`). */
static void pump_end(struct session *s, int ch, bool broken) {
  pump_reset(&s->pump[ch]);
  if (ch == IN) {
    if (s->pty && !broken && s->near[IN] >= 0)
      (void)!write(s->near[IN], TERMINAL_EOF, 1);
    channel_drop(s->stream, IN, broken ? SHUT_RD : -1);
    channel_drop(s->near, IN, -1);
  } else {
    channel_drop(s->stream, ch, SHUT_WR);
    if (s->pty && broken)
      session_hangup(s); /* a terminal that nobody sees */
    else
      channel_drop(s->near, ch, -1);
  }
}

static enum pumped pump_run(struct session *s, int ch) {
  struct pump *pump = &s->pump[ch];
  for (int round = 0; round < PUMP_ROUNDS; round++) {
    int src = ch == IN ? s->stream[ch] : s->near[ch];
    int dst = ch == IN ? s->near[ch] : s->stream[ch];
    if (src < 0)
      return PUMP_DONE;
    if (pump->head == pump->tail) {
      if (!pump_buffer(pump))
        return PUMP_BLOCKED;
      ssize_t n = read(src, pump->buf, PUMP_SIZE);
      /* EIO: no process has the terminal open; until the program has ended,
       * one may open it again */
      if (n < 0 && (errno == EAGAIN || (errno == EIO && !s->exited))) {
        pump_reset(pump);
        return PUMP_NO_INPUT;
      }
      if (n <= 0) {
        pump_end(s, ch, false);
        return PUMP_DONE;
      }
      pump->head = 0;
      pump->tail = n;
      if (n >= PIPE_GROW_AT && !pump->grown) {
        pump->grown = true;
        fcntl(ch == IN ? dst : src, F_SETPIPE_SZ, PIPE_SIZE);
      }
    }
    ssize_t n = pump->tail - pump->head;
    if (dst >= 0)
      n = write(dst, pump->buf + pump->head, n);
    if (n < 0 && errno == EAGAIN)
      return PUMP_BLOCKED;
    if (n < 0) {
      pump_end(s, ch, true);
      return PUMP_DONE;
    }
    pump->head += n;
  }
  return PUMP_YIELDED;
}

/* The program is gone and so is all that it wrote: tells the host. */
static void session_finish(struct session *s) {
  struct mv_exit_status payload = {0};
  if (WIFSIGNALED(s->status))
    payload.signo = WTERMSIG(s->status);
  else
    payload.code = WEXITSTATUS(s->status);
  data_close(s);
  if (!s->told)
    reply_add(s, MV_F_EXIT, &payload, sizeof(payload));
  s->told = true;
  reply_flush(s);
  if (!s->reply_len || s->control < 0)
    session_end(s);
}

static void data_run(struct session *s) {
  bool drained = true;
  for (int ch = 0; ch < CHANNELS; ch++) {
    enum pumped why = pump_run(s, ch);
    s->yielded |= why == PUMP_YIELDED;
    drained &= ch == IN || why == PUMP_DONE || why == PUMP_NO_INPUT;
  }
  if (s->exited && drained)
    session_finish(s);
}

/* ---- events -------------------------------------------------------------- */

static void session_run(struct session *s) {
  s->yielded = false;
  control_run(s);
  session_start(s);
  reply_flush(s);
  if (s->phase == RUNNING)
    data_run(s);
}

static void session_event(struct mv_watch *watch, uint32_t events) {
  struct session *s = (struct session *)((char *)watch - offsetof(struct session, watch));
  if (events & EPOLLHUP && s->phase == WAITING && s->control < 0)
    session_end(s); /* the host gave up before it had begun */
  session_run(s);
}

/* The program may close its stdin while nothing is on its way to it. */
static void stdin_event(struct mv_watch *watch, uint32_t events) {
  struct session *s = (struct session *)((char *)watch - offsetof(struct session, watch_stdin));
  if (events & EPOLLERR && s->near[IN] >= 0)
    pump_end(s, IN, true);
  session_run(s);
}

static struct session *session_get(uint32_t id) {
  struct session *s;
  for (s = sessions; s; s = s->next)
    if (s->id == id && s->phase != OVER)
      return s;
  if (nsessions >= SESSIONS_MAX || !(s = calloc(1, sizeof(*s))))
    return NULL;
  s->id = id;
  s->watch.fn = session_event;
  s->watch_stdin.fn = stdin_event;
  s->control = -1;
  for (int ch = 0; ch < CHANNELS; ch++)
    s->stream[ch] = s->near[ch] = -1;
  s->next = sessions;
  sessions = s;
  nsessions++;
  return s;
}

/* A session that was made for a stream that it cannot take goes away again. */
static int session_refuse(struct session *s, int error) {
  bool empty = s->control < 0;
  for (int ch = 0; ch < CHANNELS; ch++)
    empty &= s->stream[ch] < 0;
  if (empty)
    s->phase = OVER;
  return error;
}

/* A stream has one direction for each of its channels, and no two for one. */
static bool channels_free(const struct session *s, uint32_t channels) {
  for (int ch = 0; ch < CHANNELS; ch++)
    if (channels & 1u << ch && s->stream[ch] >= 0)
      return false;
  return channels == MV_CH_STDERR || (channels && !(channels & ~(MV_CH_STDIN | MV_CH_STDOUT)));
}

int mv_session_attach(const struct mv_hello *hello, int fd, bool watched) {
  bool control = hello->kind == MV_STREAM_CONTROL;
  struct session *s = session_get(hello->session);
  if (!s)
    return -ENOMEM;
  if (s->phase != WAITING || (control ? s->control >= 0 : !channels_free(s, hello->channels)))
    return session_refuse(s, -EINVAL);
  int error = watched ? mv_agent_rewatch(fd, &s->watch) : mv_agent_watch(fd, &s->watch);
  if (error)
    return session_refuse(s, error);
  if (control)
    s->control = fd;
  for (int ch = 0; ch < CHANNELS; ch++)
    if (!control && hello->channels & 1u << ch)
      s->stream[ch] = fd;
  session_run(s);
  return 0;
}

bool mv_session_reaped(pid_t pid, int status) {
  for (struct session *s = sessions; s; s = s->next)
    if (s->pid == pid && s->phase == RUNNING && !s->exited) {
      s->exited = true;
      s->kill_at = 0;
      s->status = status;
      session_run(s);
      return true;
    }
  return false;
}

bool mv_sessions_continue(void) {
  bool more = false;
  for (struct session **link = &sessions, *s; (s = *link);) {
    if (s->yielded && s->phase == RUNNING)
      session_run(s);
    if (s->phase == OVER) {
      *link = s->next;
      nsessions--;
      free(s);
      continue;
    }
    more |= s->yielded;
    link = &s->next;
  }
  return more;
}

void mv_sessions_hangup(void) {
  for (struct session *s = sessions; s; s = s->next)
    if (s->phase == RUNNING)
      session_hangup(s);
}

int mv_sessions_expire(void) {
  uint64_t now = 0, next = UINT64_MAX;
  for (struct session *s = sessions; s; s = s->next) {
    if (!s->kill_at)
      continue;
    now = now ?: mv_agent_now();
    if (s->kill_at <= now) {
      kill(-s->pid, SIGKILL);
      s->kill_at = 0;
    } else if (s->kill_at < next) {
      next = s->kill_at;
    }
  }
  return next == UINT64_MAX ? -1 : (int)((next - now) / 1000000 + 1);
}
