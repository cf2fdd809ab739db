"""Read a folder or a Hub repo as a checkpoint: headers, index, config and companions, all checked; and the bytes of its files.

Its modules:

    source, stored_bytes, small_files, strict_json   files by name and range
    header, index, companions, folder                what a checkpoint in Hugging Face layout holds
    weights, encoding                                what its tensors mean
    hub, hub_source, hub_errors                      the same for a repo on the Hub
    ranges, connections, answers                     byte ranges over HTTP
    reads, window, segments, file_digests            what is fetched ahead, held in memory, and hashed on the way
    downloads, network_rate                          how far a download is; how fast the network is
"""
