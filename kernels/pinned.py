"""What the host sends to a GPU on the way: small tensors, for which nobody waits."""

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """A tensor in the host's memory, as kernels launched on that device from now on see it.  The host does
    not wait: torch keeps the copy in pinned memory for as long as it is read.
    """
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)
