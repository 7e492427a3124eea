"""Where the KV of every conversation is.  Integers only, except `kv_store`, which owns
the tensors, and `transfer`, which copies between them."""
