"""Open a repo on the Hub, or a folder, as a checkpoint, and read a repo's files by range.

Its modules:

    opening, source, errors            a repo as a checkpoint; what the client's errors mean
    ranges, connections, answers       byte ranges over HTTP
    window, segments, file_digests     what is fetched ahead, held in memory, and hashed on the way
    downloads, network_rate            how far a download is; how fast the network is
"""
