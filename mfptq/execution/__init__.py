"""Run a plan: bytes in, bytes out, on threads."""
