"""Checkpoints: each rank writes a shard, rank 0 the manifest that completes them; any layout reads them again."""
