/*
 * The control socket: how the front tells the VMM what to build, and how the
 * VMM tells the front what became of it.
 *
 * A SOCK_SEQPACKET pair; one packet is one message: struct mv_ctl_header, the
 * message's struct, then inline bytes where the message has them. Descriptors
 * travel beside it (SCM_RIGHTS). The front decides everything and sends a list:
 *
 *   OPTIONS RAM... DATA... FILE... DEVICE... ENTRY START
 *
 * Nothing is answered until START. The first message that fails ends the VMM
 * with an EXIT event of reason SETUP that names it. After START the front may
 * send the run-time messages; events come as they happen. EXIT is always the
 * last packet: end of file without it means that the VMM was killed. After it
 * the VMM goes on until all that the guest sent on streams has been written.
 * When the front's end closes, the VMM ends at once.
 *
 * Times are CLOCK_MONOTONIC nanoseconds. This file is read by C and, as it is,
 * by cffi in the tests that hold microvm/control.py equal to it: integers,
 * enums and naturally aligned structs, nothing else.
 */
#ifndef MV_CONTROL_H
#define MV_CONTROL_H

#include <stdint.h>

#define MV_CTL_VERSION     1
#define MV_CTL_FD          3      /* the descriptor that mv-vmm is born with      */
#define MV_CTL_PACKET_MAX  65536  /* bytes of one packet, header included        */
#define MV_CTL_FDS_MAX     4      /* descriptors beside one packet                */
#define MV_CTL_PREFIX_MAX  256    /* bytes the host says first on a vsock stream  */
#define MV_CTL_CONSOLE_MAX 262144 /* bytes of console that are kept            */

enum mv_ctl_type {
  /* front to VMM, before the start */
  MV_CTL_OPTIONS = 1, /* struct mv_ctl_options                               */
  MV_CTL_RAM = 2,     /* struct mv_ctl_ram                                   */
  MV_CTL_DATA = 3,    /* struct mv_ctl_data, bytes                           */
  MV_CTL_FILE = 4,    /* struct mv_ctl_file + fd                             */
  MV_CTL_DEVICE = 5,  /* struct mv_ctl_device (+ fd)                         */
  MV_CTL_ENTRY = 6,   /* struct mv_ctl_entry                                 */
  MV_CTL_START = 7,   /* nothing                                             */
  /* front to VMM, at run time */
  MV_CTL_CONNECT = 16, /* struct mv_ctl_connect, prefix + fds                */
  MV_CTL_STOP = 17,    /* nothing: pulls the plug, EXIT follows              */
  MV_CTL_QUERY = 18,   /* nothing: STATS, CONSOLE... and QUERY_END follow    */
  /* VMM to front */
  MV_CTL_STARTED = 32,   /* struct mv_ctl_started                            */
  MV_CTL_GUEST = 33,     /* struct mv_ctl_guest: its init tells where it is  */
  MV_CTL_CONSOLE = 34,   /* bytes, oldest first; all follow STATS                             */
  MV_CTL_STATS = 35,     /* struct mv_ctl_stats                              */
  MV_CTL_REGS = 36,      /* struct mv_ctl_regs: vCPU 0, before a bad EXIT    */
  MV_CTL_QUERY_END = 37, /* nothing                                          */
  MV_CTL_EXIT = 38,      /* struct mv_ctl_exit, text                         */
};

struct mv_ctl_header {
  uint32_t type;
  uint32_t size; /* of the whole packet, in bytes                            */
};

enum mv_ctl_accel { MV_CTL_KVM = 1, MV_CTL_DBT = 2 };

/* Switches of mv_ctl_options.flags. */
enum mv_ctl_flag {
  MV_CTL_COUNT = 1, /* count guest instructions                              */
  /* the translator's, see struct mv_dbt_options                             */
  MV_CTL_NO_CHAIN = 2,
  MV_CTL_NO_TLB = 4,
  MV_CTL_NO_COALESCE = 8,
  MV_CTL_NO_FLAGS_LIVE = 16,
};

/* The packet's remaining bytes: the file in which the translator keeps
 * translations between starts, or nothing.                                  */
#define MV_CTL_PATH_MAX 4095
struct mv_ctl_options {
  uint32_t version; /* MV_CTL_VERSION                                        */
  uint32_t accel;   /* enum mv_ctl_accel                                     */
  uint32_t ncpus;
  uint32_t flags;
  uint32_t max_insns; /* instructions a translated block; 0: default         */
  uint32_t reserved;
  uint64_t cache_bytes; /* the translator's code cache; 0: default           */
};

struct mv_ctl_ram {
  uint64_t gpa, size;
};

struct mv_ctl_data {
  uint64_t gpa; /* the packet's remaining bytes go here                      */
};

enum mv_ctl_file_how {
  MV_CTL_MAP = 1,  /* mapped copy-on-write: all page aligned                 */
  MV_CTL_READ = 2, /* read: any alignment                                    */
};

struct mv_ctl_file {
  uint64_t gpa, offset, len;
  uint32_t how; /* enum mv_ctl_file_how                                      */
  uint32_t reserved;
};

enum mv_ctl_device_kind {
  MV_CTL_SERIAL = 1, /* fd: output is copied there, if one is sent          */
  MV_CTL_HVC = 2,    /* virtio console; its output joins the console's ring */
  MV_CTL_RNG = 3,
  MV_CTL_BLK = 4, /* fd: raw image                                       */
  MV_CTL_VSOCK = 5,
};

enum mv_ctl_device_flag { MV_CTL_READ_ONLY = 1 };

/* Virtio devices take slots in the order in which they are sent. */
struct mv_ctl_device {
  uint32_t kind; /* enum mv_ctl_device_kind                                  */
  uint32_t flags;
};

/* vCPU 0 enters in 64-bit mode on page tables and GDT that DATA has placed;
 * the others wait for SIPI. */
struct mv_ctl_entry {
  uint64_t rip, rsi, rsp;
  uint64_t cr3, gdt;
};

/* Which descriptors come, in this order. */
enum mv_ctl_connect_fd {
  MV_CTL_FD_IN = 1,   /* bytes from it go to the guest, then end of file     */
  MV_CTL_FD_OUT = 2,  /* bytes from the guest go to it                       */
  MV_CTL_FD_BOTH = 4, /* a socket for both ways, instead of the two above    */
  MV_CTL_FD_DONE = 8, /* closed when the stream is over and FD_OUT drained   */
};

/* Opens a stream from the host to a port of the guest. The VMM owns what is
 * sent. A stream that cannot be opened closes its descriptors. */
struct mv_ctl_connect {
  uint32_t port;
  uint32_t fds; /* of enum mv_ctl_connect_fd                                 */
};

struct mv_ctl_started {
  uint64_t time; /* just before the vCPUs' threads begin                     */
};

/* Each code is told once; POWEROFF and REBOOT come as EXIT. */
struct mv_ctl_guest {
  uint64_t time;
  uint32_t code; /* enum mv_guest_event                                      */
  uint32_t value;
};

#define MV_CTL_EXIT_KINDS 9 /* MV_EXIT_COUNT                                 */

struct mv_ctl_stats {                /* sums over all vCPUs                                 */
  uint64_t exits[MV_CTL_EXIT_KINDS]; /* by enum mv_exit                      */
  uint64_t instructions, irqs;
  uint64_t translated_blocks, translated_insns, code_flushes, tlb_misses;
  uint64_t revived_blocks; /* kept from earlier starts                          */
};

struct mv_ctl_regs {
  uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
  uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
  uint64_t rip, rflags, cr0, cr2, cr3, cr4, efer;
};

enum mv_ctl_reason {
  MV_CTL_R_POWEROFF = 1, /* value: the guest's status                      */
  MV_CTL_R_REBOOT = 2,
  MV_CTL_R_PANIC = 3,      /* the kernel said so on its console              */
  MV_CTL_R_SHUTDOWN = 4,   /* triple fault                                   */
  MV_CTL_R_DEBUG_EXIT = 5, /* value: isa-debug-exit's status                 */
  MV_CTL_R_HALTED = 6,     /* HLT that nothing can end                       */
  MV_CTL_R_STOPPED = 7,    /* MV_CTL_STOP                                    */
  MV_CTL_R_BACKEND = 8,    /* KVM or the translator failed: value is -errno  */
  MV_CTL_R_SETUP = 9,      /* a message failed: value is -errno              */
};

struct mv_ctl_exit {
  uint64_t time;
  uint32_t reason; /* enum mv_ctl_reason                                    */
  int32_t value;
  uint32_t message; /* SETUP: enum mv_ctl_type of the message that failed    */
  uint32_t reserved;
};

#endif
