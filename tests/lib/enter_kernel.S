# A firmware of 64 KiB for QEMU that does what our VMM does in software: it
# enters the guest in 64-bit mode on the page tables and the GDT that a boot
# image has placed, with the registers that it names (CR3, GDT, RIP, RSI, RSP:
# symbols given to the assembler). It runs at 0xf0000.
	.set BASE, 0xf0000
	.code16
start:
	cli
	lgdtl	%cs:gdtr - start
	movl	%cr0, %eax
	orl	$1, %eax		# PE
	movl	%eax, %cr0
	ljmpl	$0x08, $BASE + protected - start

	.code32
protected:
	movw	$0x18, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movl	$0x20, %eax		# PAE
	movl	%eax, %cr4
	movl	$CR3, %eax
	movl	%eax, %cr3
	movl	$0xc0000080, %ecx	# EFER
	movl	$0x100, %eax		# LME
	xorl	%edx, %edx
	wrmsr
	movl	%cr0, %eax
	orl	$0x80000000, %eax	# PG
	movl	%eax, %cr0
	lgdt	BASE + gdtr64 - start
	ljmp	$0x10, $BASE + long - start

	.code64
long:
	movw	$0x18, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movl	$RSP, %esp
	movl	$RSI, %esi
	movl	$RIP, %eax
	jmp	*%rax

	.balign	8
gdt:	.quad	0, 0x00cf9b000000ffff, 0, 0x00cf93000000ffff
gdtr:	.word	31
	.long	BASE + gdt - start
gdtr64:	.word	31
	.long	GDT

	.code16
	.org	0xfff0
	ljmp	$0xf000, $0
	.org	0x10000
