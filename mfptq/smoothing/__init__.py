"""Smoothing: factors that move the size of loud input channels into the weights that read them."""
