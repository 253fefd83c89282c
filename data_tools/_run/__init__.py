"""What every tool runs on: a job a shard, processes, shards in and shards out."""
