"""What is decided by a module's name alone."""
