"""Decide what a module's name alone can tell: fused layers, patterns, the names that engines build."""

REGEX_PREFIX = "re:"  # of a pattern that is a regex, as in compressed-tensors; all others are literal names
