/*
 * Host signals in translated code.
 *
 * While guest code runs the stack pointer is the guest's, so all handlers run
 * on an alternate stack (SS_AUTODISARM: the guest cannot make it look as if it
 * were in use). A fault inside the code cache is turned into a call of
 * mv_slow_signal(); any other goes to whoever handled it before us.
 */
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "exec.h"

#ifndef SS_AUTODISARM
#define SS_AUTODISARM (1u << 31)
#endif
#define ALT_STACK_BYTES (256u << 10) /* XSAVE frames reach 11 KiB with AMX     */

static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
#define NSIGNALS (sizeof signals / sizeof *signals)

static struct sigaction before[NSIGNALS];
static pthread_once_t once = PTHREAD_ONCE_INIT;
static void *guard_page;
static __thread struct mv_dbt *bound;
static __thread sigset_t mask_before;
static __thread stack_t stack_before;

const void *mv_signal_guard(void) {
  return guard_page;
}
static void forward(int sig, siginfo_t *info, void *uc) {
  for (unsigned i = 0; i < NSIGNALS; i++) {
    if (signals[i] != sig)
      continue;
    if (before[i].sa_flags & SA_SIGINFO)
      before[i].sa_sigaction(sig, info, uc);
    else if (before[i].sa_handler == SIG_DFL || before[i].sa_handler == SIG_IGN)
      sigaction(sig, &before[i], NULL); /* happens again, as without us        */
    else
      before[i].sa_handler(sig);
  }
}

static void handler(int sig, siginfo_t *info, void *ctx) {
  ucontext_t *uc = ctx;
  greg_t *regs = uc->uc_mcontext.gregs;
  struct mv_dbt *d = bound;
  uint64_t rip = (uint64_t)regs[REG_RIP];
  if (!d || rip - (uint64_t)(uintptr_t)d->exec->rx >= d->exec->size) {
    forward(sig, info, ctx);
    return;
  }
  d->exec->sig = (struct mv_dbt_signal){.code = rip,
                                        .addr = (uint64_t)(uintptr_t)info->si_addr,
                                        .trap = (int)regs[REG_TRAPNO],
                                        .signal = sig};
  regs[REG_RIP] = (greg_t)(uintptr_t)mv_tramp_signal;
}

static void install(void) {
  void *p = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  guard_page = p == MAP_FAILED ? NULL : p;
  struct sigaction sa = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
  sigemptyset(&sa.sa_mask);
  for (unsigned i = 0; i < NSIGNALS; i++)
    sigaction(signals[i], &sa, &before[i]);
}

int mv_signal_init(void) {
  pthread_once(&once, install);
  return guard_page ? 0 : -ENOMEM;
}

int mv_signal_stack_new(void **out) {
  void *p = mmap(NULL, ALT_STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    return -ENOMEM;
  *out = p;
  return 0;
}

void mv_signal_stack_free(void *stack) {
  if (stack)
    munmap(stack, ALT_STACK_BYTES);
}

int mv_signal_bind(struct mv_dbt *d) {
  stack_t ss = {
      .ss_sp = d->exec->alt_stack, .ss_size = ALT_STACK_BYTES, .ss_flags = (int)SS_AUTODISARM};
  if (sigaltstack(&ss, &stack_before))
    return -errno;
  if (syscall(SYS_arch_prctl, ARCH_SET_GS, d))
    return -errno;
  /* Other handlers may not run on an alternate stack: they wait.             */
  sigset_t others;
  sigfillset(&others);
  for (unsigned i = 0; i < NSIGNALS; i++)
    sigdelset(&others, signals[i]);
  pthread_sigmask(SIG_SETMASK, &others, &mask_before);
  bound = d;
  return 0;
}

void mv_signal_unbind(struct mv_dbt *d) {
  (void)d;
  bound = NULL;
  sigaltstack(&stack_before, NULL);
  pthread_sigmask(SIG_SETMASK, &mask_before, NULL);
}
