/*
 * Every fixed guest-physical address, port, interrupt line and limit.
 *
 * This is the only place for such numbers: C includes it, Python reads the
 * same names through microvm.layout.  Addresses below 1 MiB follow the PC
 * memory map that Linux expects when no firmware ran (Documentation/arch/x86/
 * boot.rst, "memory layout"); the rest is ours to choose.
 */
#ifndef MV_LAYOUT_H
#define MV_LAYOUT_H

/* ---- boot structures, all in the first 640 KiB ------------------------ */
#define MV_GDT_GPA         0x500ULL   /* boot GDT, 4 entries               */
#define MV_BOOT_PARAMS_GPA 0x7000ULL  /* struct boot_params, one page      */
#define MV_PML4_GPA        0x9000ULL  /* boot page tables: PML4, PDPT, PDs */
#define MV_CMDLINE_GPA     0x20000ULL /* NUL-terminated kernel command line*/
#define MV_CMDLINE_MAX     4096
#define MV_EBDA_GPA        0x9fc00ULL /* end of low RAM; MP table lives here*/
#define MV_ACPI_GPA        0xe0000ULL /* ACPI tables, for kernels that need them */
#define MV_HIGH_RAM_GPA    0x100000ULL

/* ---- the hole below 4 GiB: RAM continues at 4 GiB --------------------- */
#define MV_RAM_LOW_END        0xc0000000ULL /* RAM below 4 GiB ends at 3 GiB      */
#define MV_RAM_HIGH_GPA       0x100000000ULL
#define MV_VIRTIO_MMIO_GPA    0xd0000000ULL /* device i at + i * stride       */
#define MV_VIRTIO_MMIO_STRIDE 0x1000ULL
#define MV_VIRTIO_MMIO_MAX    16
#define MV_IOAPIC_GPA         0xfec00000ULL
#define MV_LAPIC_GPA          0xfee00000ULL

/* ---- interrupt lines (GSI = IOAPIC pin) ------------------------------- */
#define MV_GSI_SERIAL  4
#define MV_GSI_VIRTIO  5 /* device i uses MV_GSI_VIRTIO + i              */
#define MV_IOAPIC_PINS 24

/* ---- ports ------------------------------------------------------------ */
#define MV_PORT_SERIAL     0x3f8 /* 8250, 8 ports                          */
#define MV_PORT_DEBUG_EXIT 0xf4  /* isa-debug-exit: status (v << 1) | 1    */
#define MV_PORT_EVENT      0x600 /* 32-bit writes: enum mv_guest_event      */
#define MV_PORT_RESET      0x64  /* i8042: write 0xfe resets the machine    */

/* What the guest's init says on MV_PORT_EVENT (bits 0..7; bits 8..31 are a
 * value: POWEROFF's is the exit status, INIT's the age of the kernel's clock). */
enum mv_guest_event {
  MV_EVENT_INIT = 1,    /* first instruction of PID 1                     */
  MV_EVENT_AGENT = 2,   /* agent listens on vsock                         */
  MV_EVENT_COMMAND = 3, /* first session's program is about to be run     */
  MV_EVENT_POWEROFF = 4,
  MV_EVENT_REBOOT = 5,
};
#define MV_EVENT_UPTIME_UNIT 10000 /* ns, of INIT's value                    */

/* ---- vsock ------------------------------------------------------------ */
#define MV_VSOCK_HOST_CID   2
#define MV_VSOCK_GUEST_CID  3
#define MV_VSOCK_AGENT_PORT 1024

/* ---- limits ------------------------------------------------------------ */
#define MV_RAM_MIN   (64ULL << 20)
#define MV_RAM_MAX   (1ULL << 40)
#define MV_VCPUS_MAX 32

#endif
