"""The kernels for GPUs, in Triton.  The contracts, and the references in torch, are those of the modules one
floor up, which come here with tensors on a GPU; nothing else imports this room, for it brings in Triton.

    launch      one compiled form of a kernel: how it is named and launched
    compiled    the same compiled without a GPU, and what it takes of one
    arguments   what all launchers refuse
    plan        a step's attention as work items, made once per step on the device
    attention   the attention kernel over those items: short queries, longer ones; attention_tiles.py its
                sizes, attention_checks.py what it refuses
    merge       joins partial results over disjoint keys
    rope        (RMSNorm of q and k heads,) rotation, write of K and V into their blocks
    norm        RMSNorm, alone or after a residual addition
    gate        silu or gelu of one half times the other
    sampling    the next token of each row, as kernels.sampling chooses it
    groups      lists groups of a row's tokens, sums them, finds tokens in them, for sampling
    gather      copies of many small pieces between the tiers
    prepare     what changed since the last step, written into the device's tables

Every number that varies from step to step lies in device memory or is not specialised on, so that nothing is
compiled while serving.  Counts are read by the kernels, grids are bounds.
"""
