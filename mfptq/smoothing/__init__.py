"""Smoothing: powers of two that move the size of outlier channels from inputs into the weights that read them.

Its modules:

    structure   what makes each input, and what reads it
    factors     the factors of one input's channels
    plan, sums  which inputs are smoothed, and what that makes of every tensor
    record      the factors in a file beside the output
"""
