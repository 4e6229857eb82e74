"""What matrix products run in while training."""

from contextlib import AbstractContextManager

import torch

from qlora_core.events import Note, Report
from qlora_core.modeling.device import compute_dtype, name_of


def training_dtype(wanted: str, device: torch.device, report: Report) -> torch.dtype:
    """The recipe's precision if the device has it, else what the device computes in, said in words."""
    able = compute_dtype(device)
    if wanted == "auto":
        return able
    dtype: torch.dtype = getattr(torch, wanted)
    if dtype in (able, torch.float32) or (dtype == torch.float16 and device.type == "cuda"):
        return dtype
    report(
        Note(message=f"train.precision is {wanted}, which this {device.type} cannot do; training in {name_of(able)}")
    )
    return able


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `dtype`; the adapter's own weights stay in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
