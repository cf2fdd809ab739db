"""The calibration pass: run a model and observe the inputs of its layers."""
