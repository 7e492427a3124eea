"""The engine's parts for a GPU: the host never waits for it while a step is launched.

    parts           puts them together from the settings
    device          streams, events and memory, as much of them as the engine asks for
    runner          runs plans; rows.py mirrors what the device keeps of requests, graphs.py what was captured
    sampler         chooses tokens, edits logits, tells logprobs
    transfer        copies blocks between the tiers beside the kernels; copies.py which bytes, and three ways
                    to move them, of which calibration.py finds the fastest at the start
    out_of_memory   what is said where sizes do not fit

All of it runs on a twin of a device as well, with the host's memory and streams that are as late as they may
be: tests/cuda/virtual_device.py.
"""
