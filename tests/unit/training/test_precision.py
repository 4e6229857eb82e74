"""What matrix products run in; the two kinds of GPU are stood in for, as a machine has at most one of them."""

import pytest
import torch

from qlora_core.training.precision import training_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "has_bfloat16", "dtype", "said"),
    [
        ("auto", CPU, False, torch.float32, []),
        ("auto", GPU, True, torch.bfloat16, []),
        ("auto", GPU, False, torch.float16, []),
        ("float16", GPU, True, torch.float16, []),
        ("float32", GPU, True, torch.float32, []),
        ("bfloat16", GPU, False, torch.float16, ["bfloat16, which this cuda cannot do; training in float16"]),
        ("float16", CPU, False, torch.float32, ["float16, which this cpu cannot do; training in float32"]),
    ],
)
def test_the_device_decides_and_what_it_cannot_do_is_said(wanted, device, has_bfloat16, dtype, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    notes: list[str] = []
    assert training_dtype(wanted, device, lambda event: notes.append(event.message)) == dtype
    assert notes == [f"train.precision is {what}" for what in said]
