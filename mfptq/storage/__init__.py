"""Every system call that touches data."""
