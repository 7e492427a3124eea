"""Where the KV of every conversation is.  Integers only, except `kv_store`, which owns the tensors."""
