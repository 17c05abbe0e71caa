"""From a kernel file to guest memory and an entry point; no firmware in between.

``kernel``   any vmlinux or bzImage -> :class:`Kernel`, a cached flat image that is mapped
``image``    kernel, initramfs, command line, RAM size -> :class:`BootImage`, what to put where

Everything else is used by these two: ``bzimage``, ``elf`` and ``flat`` only when a kernel is seen
for the first time; ``params``, ``tables``, ``mptable``, ``acpi``, ``cmdline`` on every boot.
"""
