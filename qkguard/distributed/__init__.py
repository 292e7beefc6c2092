"""Ranks that agree, tensors in shards: nothing else knows ZeRO, FSDP2 or DTensor.

May import `layout` and the rooms below it. Public: `ranks.agree`, `ranks.on_rank_zero`, `sharding.read`,
`sharding.write`, `collectives.all_reduce_sum`, `reference.Reference`.
"""
