"""Read a folder or a Hub repo as a checkpoint: headers, index, config and companions."""
