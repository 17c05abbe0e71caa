/*
 * The session protocol, as it is on the wire between the host and the agent in
 * the guest. Little endian, naturally aligned. microvm/session.py speaks it
 * too; a test holds its numbers equal to these.
 *
 * The host connects byte streams (vsock) to the agent's port. Every stream
 * begins with a struct mv_hello that says what it is:
 *
 *   CONTROL   frames in both directions; one control stream is one session,
 *             named by a number that the host chose. Its end hangs up the
 *             session.
 *   DATA      after the hello, the bytes of the session's channels and nothing
 *             else. A stream may carry stdin and stdout at once (one a
 *             direction), stderr alone, or the terminal (as STDIN | STDOUT).
 *
 * A session is one program:
 *
 *   host                            agent
 *   EXEC                       ->         streams and EXEC may come in any
 *   (data streams)             ->         order; it starts when all are there
 *                              <-   STARTED pid, or ERROR (last frame)
 *   SIGNAL, WINSIZE, HANGUP    ->
 *                              <-   EXIT code, signal (last frame)
 *
 * EXIT is sent when all that the program wrote has been sent and its data
 * streams are closed. What its children write later is lost, as it is when a
 * terminal closes. The host trusts nothing that the agent says: frames have a
 * small bound and every other value is a number.
 */
#ifndef MV_PROTO_H
#define MV_PROTO_H

#include <stdint.h>

#define MV_HELLO_MAGIC    0x3153564dU /* "MVS1"                             */
#define MV_FRAME_SEND_MAX (1U << 20)  /* payload, host to agent             */
#define MV_FRAME_RECV_MAX 64U         /* payload, agent to host             */

enum mv_stream_kind { MV_STREAM_CONTROL = 1, MV_STREAM_DATA = 2 };

/* Channels, a bit each: those that a data stream carries, those that a session
 * waits for. A channel that a session does not ask for is /dev/null. */
enum mv_channel { MV_CH_STDIN = 1, MV_CH_STDOUT = 2, MV_CH_STDERR = 4 };

struct mv_hello {
  uint32_t magic;
  uint32_t session;  /* the host's number for it                            */
  uint32_t kind;     /* enum mv_stream_kind                                 */
  uint32_t channels; /* DATA: mask of enum mv_channel; CONTROL: 0           */
};
_Static_assert(sizeof(struct mv_hello) == 16, "wire format");

struct mv_frame {
  uint32_t type;
  uint32_t len; /* of the payload that follows                              */
};
_Static_assert(sizeof(struct mv_frame) == 8, "wire format");

enum mv_frame_type {
  /* host to agent */
  MV_F_EXEC = 1,     /* struct mv_exec, strings                             */
  MV_F_SIGNAL = 2,   /* struct mv_signal                                    */
  MV_F_WINSIZE = 3,  /* struct mv_winsize                                   */
  MV_F_HANGUP = 4,   /* nothing: as if the stream ended, but EXIT still comes */
  MV_F_SHUTDOWN = 5, /* struct mv_shutdown: ends the guest, not the session */
  /* agent to host */
  MV_F_STARTED = 129, /* struct mv_started                                  */
  MV_F_ERROR = 130,   /* struct mv_error                                    */
  MV_F_EXIT = 131,    /* struct mv_exit_status                              */
};

/* Terminal size in characters and, if known, in pixels. */
struct mv_winsize {
  uint16_t rows, cols, xpixel, ypixel;
};
_Static_assert(sizeof(struct mv_winsize) == 8, "wire format");

enum mv_exec_flag {
  MV_EXEC_PTY = 1,   /* a terminal instead of pipes                          */
  MV_EXEC_LOGIN = 2, /* the user's shell as a login shell; argc is 0         */
};

/* Followed by NUL-terminated strings: directory, user, argc arguments, envc
 * environment entries "K=V"; they fill the payload exactly.
 * Directory "": the user's home. User "": root; else NAME or UID, each
 * optionally followed by ":GROUP" or ":GID". */
struct mv_exec {
  uint32_t flags;    /* enum mv_exec_flag                                   */
  uint32_t channels; /* mask of enum mv_channel                             */
  uint32_t argc, envc;
  uint64_t realtime; /* host's clock, ns since 1970; 0: leave the guest's   */
  struct mv_winsize winsize;
};
_Static_assert(sizeof(struct mv_exec) == 32, "wire format");

/* To the program's process group; with a terminal, to its foreground one. */
struct mv_signal {
  uint32_t signo;
};

enum mv_shutdown_action { MV_SHUTDOWN_POWEROFF = 1, MV_SHUTDOWN_REBOOT = 2 };

struct mv_shutdown {
  uint32_t action;
  uint32_t status; /* 0..255, told to the VMM                               */
};

struct mv_started {
  uint32_t pid;
};

/* What could not be done; `error` is Linux's errno. */
enum mv_stage {
  MV_STAGE_PROTOCOL = 1, /* the host's bytes made no sense                  */
  MV_STAGE_RESOURCES,    /* no memory, descriptor, process, terminal        */
  MV_STAGE_USER,         /* ENOENT: no such user or group                   */
  MV_STAGE_DIRECTORY,    /* cannot be entered                               */
  MV_STAGE_EXEC,         /* ENOENT: not found, EACCES...: not executable    */
};

struct mv_error {
  uint32_t stage; /* enum mv_stage                                          */
  uint32_t error;
};

/* One of the two is 0. */
struct mv_exit_status {
  uint32_t code;
  uint32_t signo;
};
_Static_assert(sizeof(struct mv_exit_status) == 8, "wire format");

#endif
