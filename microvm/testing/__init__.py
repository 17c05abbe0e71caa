"""What tests use: the low-level vCPU API (`microvm.testing.vcpu`)."""
