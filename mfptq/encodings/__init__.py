"""Turn bytes into numbers: weights that are stored as codes and scales, found in headers and decoded range by range."""
