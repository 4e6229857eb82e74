"""Which device and which number format: bf16 on GPUs that have it, fp16 on those that have not, fp32 on a CPU."""

import torch


def pick_device() -> torch.device:
    """This process's GPU (by its local rank under torchrun), or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    import os

    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def compute_dtype(device: torch.device) -> torch.dtype:
    """What matrix products run in on this device; a bf16 backward pass on a CPU is slow enough to look hung."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def name_of(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
