"""Real kernels in qemu: the machine of the tests that need what the host lacks."""
