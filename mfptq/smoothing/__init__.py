"""Smoothing: powers of two that move the size of outlier channels from inputs into the weights that read them."""
