"""An adapter into the unquantized base, shard by shard, proven."""
