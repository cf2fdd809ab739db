"""The calibration file: statistics of the inputs of a model's linear layers, written, checked, merged and put to use."""
