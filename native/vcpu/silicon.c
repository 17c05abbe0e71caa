/*
 * Test oracle: user-level instructions on the host's own silicon and on a vCPU. See mv/silicon.h.
 *
 * Natively, a forked child enters and leaves each case by signals alone. It sends itself SIGUSR1;
 * the handler keeps the interrupted context, writes the case's registers into it and returns into
 * the case. The case's exception raises a signal whose handler takes the registers out of the
 * context and puts the kept one back. All handlers run on an alternate stack, since RSP is the
 * case's.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <asm/prctl.h>

#include "mv/cpuid.h"
#include "mv/silicon.h"

enum { INT3 = 0xcc, CHILD_SECONDS = 20, CHILD_CPU_SECONDS = 1 };

/* XSAVE standard format, SDM 1 §13.4: offsets in bytes. */
enum {
  FX_FCW = 0,
  FX_FOP = 6,
  FX_MXCSR = 24,
  FX_MXCSR_MASK = 28,
  FX_ST = 32,
  FX_XMM = 160,
  FX_SOFTWARE = 464,
  XSAVE_HEADER = 512,
  XSAVE_AREAS = 576,
};
static const struct {
  unsigned bit, offset, size;
} components[] = {
    {0, FX_ST, 128}, {1, FX_XMM, 256}, {2, 576, 256},
    {5, 1088, 64},   {6, 1152, 512},   {7, 1664, 1024},
};
#define COMPONENTS 0xe7ULL /* x87, SSE, AVX, opmask, ZMM_Hi256, Hi16_ZMM          */

void mv_si_normalise(uint8_t xsave[MV_SI_XSAVE]) {
  static const uint8_t x87_init[6] = {0x7f, 0x03};
  uint64_t present;
  memcpy(&present, xsave + XSAVE_HEADER, sizeof present);
  for (size_t i = 0; i < sizeof components / sizeof *components; i++)
    if (!(present >> components[i].bit & 1))
      memset(xsave + components[i].offset, 0, components[i].size);
  if (!(present & 1))
    memcpy(xsave, x87_init, sizeof x87_init);
  memset(xsave + FX_FOP, 0, FX_MXCSR - FX_FOP);
  memset(xsave + FX_MXCSR_MASK, 0, 4);
  memset(xsave + FX_SOFTWARE, 0, XSAVE_AREAS - FX_SOFTWARE);
  /* ST registers have 10 bytes in slots of 16. */
  for (unsigned i = 0; i < 8; i++)
    memset(xsave + FX_ST + 16 * i + 10, 0, 6);
}

int mv_si_feature_offered(uint32_t feature) {
  struct kvm_cpuid_entry2 entries[MV_CPUID_ENTRIES_MAX];
  unsigned n = mv_cpuid_build(entries, MV_CPUID_ENTRIES_MAX, MV_CPUID_DBT, 1, 0, NULL);
  return mv_cpuid_has(entries, n, feature);
}

static void place_code(uint8_t *code_pages, const struct mv_si_case *c) {
  memset(code_pages, INT3, MV_SI_CODE_SIZE);
  memcpy(code_pages + (c->in.rip - MV_SI_CODE), c->code, c->code_len);
}

static bool case_is_sane(const struct mv_si_case *c) {
  return c->code_len <= MV_SI_CODE_MAX && c->in.rip >= MV_SI_CODE &&
         c->in.rip - MV_SI_CODE <= MV_SI_CODE_SIZE - c->code_len;
}

/* ---- natively ----------------------------------------------------------- */

/* Index in gregset_t of register number i. */
static const uint8_t greg_of[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                    REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                    REG_R12, REG_R13, REG_R14, REG_R15};

/* The child's: which case runs, and where to go back to. */
static struct {
  const struct mv_si_case *c;
  struct mv_si_result *result;
  gregset_t home;
  uint8_t home_fp[MV_SI_XSAVE];
} native;

/* Loads the components of an XSAVE image into a signal frame, whose software bytes and further
 * components stay as they are. */
static void frame_load(uint8_t *frame, const uint8_t *xsave) {
  uint64_t present, others;
  memcpy(&present, xsave + XSAVE_HEADER, sizeof present);
  memcpy(&others, frame + XSAVE_HEADER, sizeof others);
  present = (present & COMPONENTS) | (others & ~COMPONENTS);
  memcpy(frame, xsave, FX_SOFTWARE);
  memcpy(frame + XSAVE_HEADER, &present, sizeof present);
  memcpy(frame + XSAVE_AREAS, xsave + XSAVE_AREAS, MV_SI_XSAVE - XSAVE_AREAS);
}

static void on_enter(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)info;
  mcontext_t *m = &((ucontext_t *)context)->uc_mcontext;
  const struct mv_si_state *in = &native.c->in;
  memcpy(native.home, m->gregs, sizeof native.home);
  memcpy(native.home_fp, m->fpregs, sizeof native.home_fp);
  for (unsigned i = 0; i < 16; i++)
    m->gregs[greg_of[i]] = in->gpr[i];
  m->gregs[REG_RIP] = in->rip;
  m->gregs[REG_EFL] = in->rflags;
  frame_load((uint8_t *)m->fpregs, in->xsave);
}

static void on_leave(int signal, siginfo_t *info, void *context) {
  (void)signal, (void)info;
  mcontext_t *m = &((ucontext_t *)context)->uc_mcontext;
  struct mv_si_result *r = native.result;
  for (unsigned i = 0; i < 16; i++)
    r->out.gpr[i] = m->gregs[greg_of[i]];
  r->out.rip = m->gregs[REG_RIP];
  r->out.rflags = m->gregs[REG_EFL];
  memcpy(r->out.xsave, m->fpregs, MV_SI_XSAVE);
  mv_si_normalise(r->out.xsave);
  r->vector = m->gregs[REG_TRAPNO];
  r->error = m->gregs[REG_ERR];
  r->cr2 = r->vector == 14 ? m->gregs[REG_CR2] : 0;
  r->ran = 1;
  memcpy(m->gregs, native.home, sizeof native.home);
  frame_load((uint8_t *)m->fpregs, native.home_fp);
}

static bool map_at(uint64_t at, uint64_t size, int prot, int fd) {
  int flags =
      MAP_FIXED_NOREPLACE | (fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE : MAP_SHARED);
  return mmap((void *)at, size, prot, flags, fd, 0) == (void *)at;
}

static void catch (int signal, void (*handler)(int, siginfo_t *, void *)) {
  struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK};
  sigaction(signal, &action, NULL);
}

/* The world of the cases; returns where the code pages can be written, or NULL. */
static uint8_t *native_world(void) {
  static uint8_t handler_stack[64 << 10];
  static const int traps[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGTRAP};
  stack_t stack = {.ss_sp = handler_stack, .ss_size = sizeof handler_stack};
  sigaltstack(&stack, NULL);
  catch (SIGUSR1, on_enter);
  for (size_t i = 0; i < sizeof traps / sizeof *traps; i++)
    catch (traps[i], on_leave);
  int fd = memfd_create("microvm-silicon", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, MV_SI_CODE_SIZE))
    return NULL;
  void *code = mmap(NULL, MV_SI_CODE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (code == MAP_FAILED || !map_at(MV_SI_CODE, MV_SI_CODE_SIZE, PROT_READ | PROT_EXEC, fd) ||
      !map_at(MV_SI_DATA, MV_SI_DATA_SIZE, PROT_READ | PROT_WRITE, -1) ||
      !map_at(MV_SI_RO, MV_SI_RO_SIZE, PROT_READ | PROT_WRITE, -1) ||
      !map_at(MV_SI_STACK, MV_SI_STACK_SIZE, PROT_READ | PROT_WRITE, -1))
    return NULL;
  /* Touched, so that the page is present and a write to it is a violation, not a miss. */
  memset((void *)MV_SI_RO, INT3, MV_SI_RO_SIZE);
  mprotect((void *)MV_SI_RO, MV_SI_RO_SIZE, PROT_READ);
  syscall(SYS_arch_prctl, ARCH_SET_GS, MV_SI_DATA);
  return code;
}

static void child(const struct mv_si_case *cases, unsigned n, struct mv_si_result *results) {
  struct itimerval cpu = {.it_value.tv_sec = CHILD_CPU_SECONDS};
  alarm(CHILD_SECONDS);
  setitimer(ITIMER_VIRTUAL, &cpu, NULL); /* ends an endless loop soon, a busy host late */
  uint8_t *code = native_world();
  for (unsigned i = 0; code && i < n; i++) {
    native.c = &cases[i];
    native.result = &results[i];
    place_code(code, native.c);
    memcpy((void *)MV_SI_DATA, native.c->in.data, MV_SI_DATA_SIZE);
    memcpy((void *)MV_SI_STACK, native.c->in.stack, MV_SI_STACK_SIZE);
    raise(SIGUSR1);
    memcpy(results[i].out.data, (void *)MV_SI_DATA, MV_SI_DATA_SIZE);
    memcpy(results[i].out.stack, (void *)MV_SI_STACK, MV_SI_STACK_SIZE);
  }
  _exit(code ? 0 : 1);
}

int mv_si_native(const struct mv_si_case *cases, unsigned n, struct mv_si_result *results) {
  for (unsigned i = 0; i < n; i++)
    if (!case_is_sane(&cases[i]))
      return -EINVAL;
  size_t size = n * sizeof *results;
  struct mv_si_result *shared =
      mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (shared == MAP_FAILED)
    return -errno;
  pid_t pid = fork();
  if (!pid)
    child(cases, n, shared);
  int err = pid < 0 ? -errno : 0, status = 0;
  if (!err && waitpid(pid, &status, 0) < 0)
    err = -errno;
  if (!err && WIFEXITED(status) && WEXITSTATUS(status))
    err = -ENOMEM; /* the world could not be made */
  memcpy(results, shared, size);
  munmap(shared, size);
  return err;
}

/* ---- on a vCPU ---------------------------------------------------------- */

static void guest_load(struct mv_vcpu_state *s, const struct mv_si_state *in) {
  const uint64_t *g = in->gpr;
  s->regs = (struct kvm_regs){
      .rax = g[0],
      .rcx = g[1],
      .rdx = g[2],
      .rbx = g[3],
      .rsp = g[4],
      .rbp = g[5],
      .rsi = g[6],
      .rdi = g[7],
      .r8 = g[8],
      .r9 = g[9],
      .r10 = g[10],
      .r11 = g[11],
      .r12 = g[12],
      .r13 = g[13],
      .r14 = g[14],
      .r15 = g[15],
      .rip = in->rip,
      .rflags = in->rflags,
  };
  uint64_t present;
  memcpy(&present, in->xsave + XSAVE_HEADER, sizeof present);
  memset(s->xsave, 0, sizeof s->xsave);
  memcpy(s->xsave, in->xsave, MV_SI_XSAVE);
  present &= s->xcr0;
  memcpy(s->xsave + XSAVE_HEADER, &present, sizeof present);
}

static void guest_take(struct mv_si_result *r, const struct mv_vcpu_state *s, const uint8_t *ram) {
  const struct kvm_regs *k = &s->regs;
  const uint64_t gpr[16] = {k->rax, k->rcx, k->rdx, k->rbx, k->rsp, k->rbp, k->rsi, k->rdi,
                            k->r8,  k->r9,  k->r10, k->r11, k->r12, k->r13, k->r14, k->r15};
  struct {
    uint64_t vector, error, rip, cs, rflags, rsp, ss;
  } frame;
  memcpy(&frame, ram + k->rsp, sizeof frame);
  memcpy(r->out.gpr, gpr, sizeof gpr);
  r->out.gpr[4] = frame.rsp;
  r->out.rip = frame.rip;
  r->out.rflags = frame.rflags;
  memcpy(r->out.xsave, s->xsave, MV_SI_XSAVE);
  mv_si_normalise(r->out.xsave);
  memcpy(r->out.data, ram + MV_SI_DATA - MV_SI_BASE + MV_SI_GPA, MV_SI_DATA_SIZE);
  memcpy(r->out.stack, ram + MV_SI_STACK - MV_SI_BASE + MV_SI_GPA, MV_SI_STACK_SIZE);
  r->vector = frame.vector;
  r->error = frame.error;
  r->cr2 = r->vector == 14 ? s->sregs.cr2 : 0;
  r->ran = 1;
}

int mv_si_guest(struct mv_test *t, const struct mv_si_case *cases, unsigned n,
                struct mv_si_result *results) {
  enum { TIMEOUT_MS = 10000 };
  uint8_t *ram = mv_test_ram(t), *world = ram + MV_SI_GPA;
  struct mv_vcpu_state template, state;
  int err = mv_test_get_state(t, &template);
  memset(results, 0, n * sizeof *results);
  memset(world + MV_SI_RO - MV_SI_BASE, INT3, MV_SI_RO_SIZE);
  for (unsigned i = 0; !err && i < n; i++) {
    const struct mv_si_case *c = &cases[i];
    if (!case_is_sane(c))
      return -EINVAL;
    place_code(world + MV_SI_CODE - MV_SI_BASE, c);
    mv_test_ram_written(t, MV_SI_GPA + MV_SI_CODE - MV_SI_BASE, MV_SI_CODE_SIZE);
    memcpy(world + MV_SI_DATA - MV_SI_BASE, c->in.data, MV_SI_DATA_SIZE);
    memcpy(world + MV_SI_STACK - MV_SI_BASE, c->in.stack, MV_SI_STACK_SIZE);
    state = template;
    guest_load(&state, &c->in);
    err = mv_test_set_state(t, &state);
    struct mv_exit_info exit;
    if (err || mv_test_run(t, TIMEOUT_MS, &exit) != MV_TEST_DONE)
      continue;
    err = mv_test_get_state(t, &state);
    if (!err && state.regs.rsp < MV_SI_GPA)
      guest_take(&results[i], &state, ram);
  }
  return err;
}
