/*
 * The border between C and translated code.
 *
 * mv_dbt_enter(d, code) runs translated code until C asks to leave. Translated
 * code calls C by jumping through mv_dbt.tramp[] with an argument in T1 (R15):
 * all guest registers go to the struct, the stack becomes C's, the C function
 * returns where to go on, and registers come back. Vector registers stay.
 *
 * GS points at struct mv_dbt throughout. The offsets below are checked against
 * dbt.h in exec.c.
 */
#define GPR(n)   ((n)*8)
#define RIP      128
#define FLAGS    136

#include "enter_offsets.h"

#define HOST_FLAGS 0xcd5 /* MV_FL_HOST: arithmetic flags and DF             */

    .text

    .macro tramp name, fn
    .globl \name
    .hidden \name
    .type \name, @function
    .p2align 4
\name:
    mov %rax, %gs:GPR(0)
    mov %rcx, %gs:GPR(1)
    mov %rdx, %gs:GPR(2)
    mov %rbx, %gs:GPR(3)
    mov %rsp, %gs:GPR(4)
    mov %gs:MV_OFF_HOST_RSP, %rsp
    lea \fn(%rip), %rax
    jmp mv_tramp_common
    .endm

    .p2align 4
mv_tramp_common:
    pushfq
    mov %rbp, %gs:GPR(5)
    mov %rsi, %gs:GPR(6)
    mov %rdi, %gs:GPR(7)
    mov %r8, %gs:GPR(8)
    mov %r9, %gs:GPR(9)
    mov %r10, %gs:GPR(10)
    mov %r11, %gs:GPR(11)
    mov %r12, %gs:GPR(12)
    mov %r13, %gs:GPR(13)
    mov %r14, %gs:MV_OFF_T0
    pop %rdx
    and $HOST_FLAGS, %edx
    mov %rdx, %gs:FLAGS
    cld
    mov %gs:MV_OFF_SELF, %rdi
    mov %r15d, %esi
    call *%rax
mv_resume:
    mov %rax, %gs:MV_OFF_RESUME
    mov %gs:FLAGS, %ecx
    mov %ecx, %eax
    shl $8, %eax          /* AH: SF ZF AF PF CF for SAHF                     */
    bt $11, %ecx          /* OF                                             */
    setc %al
    test $0x400, %ecx
    jnz 2f
1:  add $0x7f, %al        /* overflows if AL is 1                           */
    sahf
    mov %gs:GPR(0), %rax
    mov %gs:GPR(1), %rcx
    mov %gs:GPR(2), %rdx
    mov %gs:GPR(3), %rbx
    mov %gs:GPR(4), %rsp
    mov %gs:GPR(5), %rbp
    mov %gs:GPR(6), %rsi
    mov %gs:GPR(7), %rdi
    mov %gs:GPR(8), %r8
    mov %gs:GPR(9), %r9
    mov %gs:GPR(10), %r10
    mov %gs:GPR(11), %r11
    mov %gs:GPR(12), %r12
    mov %gs:GPR(13), %r13
    jmp *%gs:MV_OFF_RESUME
2:  std
    jmp 1b

    tramp mv_tramp_mem, mv_slow_mem
    tramp mv_tramp_link, mv_slow_link
    tramp mv_tramp_indirect, mv_slow_indirect
    tramp mv_tramp_guard, mv_slow_guard
    tramp mv_tramp_insn, mv_slow_insn
    tramp mv_tramp_raise, mv_slow_raise
    tramp mv_tramp_bounce_in, mv_slow_bounce_in
    tramp mv_tramp_bounce_out, mv_slow_bounce_out
    tramp mv_tramp_signal, mv_slow_signal

/* C returns these to go on at mv_dbt.rip through the jump cache. */
    .macro jump name, jc
    .globl \name
    .hidden \name
    .type \name, @function
    .p2align 4
\name:
    mov %gs:RIP, %r14
    movzwl %r14w, %r15d
    jmp *%gs:\jc(,%r15,8)
    .endm

    jump mv_jump_kernel, MV_OFF_JC
    jump mv_jump_user, MV_OFF_JC+8*65536

    .globl mv_dbt_enter
    .hidden mv_dbt_enter
    .type mv_dbt_enter, @function
    .p2align 4
mv_dbt_enter:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    sub $8, %rsp
    mov %rsp, %gs:MV_OFF_HOST_RSP
    mov %rsi, %rax
    jmp mv_resume

/* C returns this address to end mv_dbt_enter; registers are in the struct. */
    .globl mv_dbt_leave
    .hidden mv_dbt_leave
    .type mv_dbt_leave, @function
    .p2align 4
mv_dbt_leave:
    mov %gs:MV_OFF_HOST_RSP, %rsp
    add $8, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    cld
    ret

    .section .note.GNU-stack,"",@progbits
