"""Fixed guest-physical addresses, interrupt lines and limits.

The truth is ``native/include/mv/layout.h``, which says what each one means. These are the names
that Python needs, as plain integers, because parsing a header costs more than a boot may take;
``tests/unit/test_layout.py`` holds every one of them equal to the header.
"""

from __future__ import annotations

GDT_GPA = 0x500
BOOT_PARAMS_GPA = 0x7000
PML4_GPA = 0x9000
CMDLINE_GPA = 0x20000
CMDLINE_MAX = 4096
EBDA_GPA = 0x9FC00
ACPI_GPA = 0xE0000
HIGH_RAM_GPA = 0x100000

RAM_LOW_END = 0xC0000000
RAM_HIGH_GPA = 0x100000000
VIRTIO_MMIO_GPA = 0xD0000000
VIRTIO_MMIO_STRIDE = 0x1000
VIRTIO_MMIO_MAX = 16
IOAPIC_GPA = 0xFEC00000
LAPIC_GPA = 0xFEE00000

GSI_SERIAL = 4
GSI_VIRTIO = 5
IOAPIC_PINS = 24

PORT_SERIAL = 0x3F8
PORT_RESET = 0x64
PORT_EVENT = 0x600

EVENT_INIT = 1
EVENT_AGENT = 2
EVENT_COMMAND = 3
EVENT_POWEROFF = 4
EVENT_REBOOT = 5
EVENT_UPTIME_UNIT = 10000

VSOCK_HOST_CID = 2
VSOCK_GUEST_CID = 3
VSOCK_AGENT_PORT = 1024

RAM_MIN = 64 << 20
RAM_MAX = 1 << 40
VCPUS_MAX = 32
