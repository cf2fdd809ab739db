"""Run a model by transformers: observe what reaches its layers (`calibrate`), or compare it with its output (`evaluate`)."""
