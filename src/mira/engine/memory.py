"""What running out of memory looks like."""

import torch

OUT_OF_MEMORY = "out of memory; lower training.batch_size or prompt.max_length"


def is_out_of_memory(error: RuntimeError) -> bool:
    """On a GPU PyTorch has an error of its own; on a CPU its allocator raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
