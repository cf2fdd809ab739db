"""Turn bytes into numbers: weights that are stored as codes and scales, found in headers and decoded range by range.

Its modules:

    contents, modules, declared, refusals   what is stored how, and what is not read
    fp8, fp4, integers, transposed          the formats, recognized one by one
    scaled, codes                           codes and scales as numbers
    smoothed                                tensors multiplied while they are read
"""
