"""Compare an output with the source it was made from, weight by weight, on all cores."""
