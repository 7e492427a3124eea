"""Where the KV of every conversation is.

block.py        blocks: rows of numbers; block_pool.py the slots of a tier
block_table.py  which blocks hold a history; sharing.py lets equal beginnings name the same ones, found by
                block_index.py
manager.py      gives KV to turns and takes it back; holdings.py answers what is where, needed.py how far
                back a sliding window reaches
tiers.py        moves blocks between device, host and nothing, the one writer of residency; idle_blocks.py
                counts what may be evicted
policy.py       what KV is worth; eviction.py the order that follows; costs.py what having it back costs
kv_store.py     the tensors; transfer.py copies between them.  All the others know integers only
"""
