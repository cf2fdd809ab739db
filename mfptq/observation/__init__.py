"""Run a model by transformers: observe what reaches its layers (`calibrate`), or compare it with its output (`evaluate`).

Its modules:

    calibrate, calibration_pass, calibration_parts   a calibration file, made here or in parts on a cluster
    evaluate, evaluation_pass, unfinished            the figures of an output, and the notes of an interrupted evaluation
    forward_options, texts, hub_datasets             the keywords of both; text as token ids
    models, residency, runner, streaming             a model, whole in memory or block by block from disk
    inputs, experts                                  which modules of the model meet which input
    recording, sums, factors, key_values             statistics of inputs, keys and values
    sensitivity, rounded_inputs                      what the model loses where one input's layers are rounded
    side_by_side, substitution, quantized            the source's model with the output's weights in its place
"""
