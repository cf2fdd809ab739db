"""Read a folder as a checkpoint: headers, index, config and companions, all checked; and the bytes of its files.

Its modules:

    source, stored_bytes, small_files, strict_json   files by name and range
    header, index, companions, folder                what a checkpoint in Hugging Face layout holds
    weights, encoding                                what its tensors mean
    reads                                            in which order files will be read
"""
