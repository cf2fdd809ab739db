"""Decide everything before a byte is written: checkpoint and settings become a plan."""
