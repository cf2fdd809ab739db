"""Run a plan's shards on many machines. Nothing here decides, and nothing here knows how a shard is made."""
