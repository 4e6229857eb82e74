"""Training in float16 on a CPU, which `worker.run` would refuse as too slow: for tests of its loss scale."""

from typing import Any

import torch

from qlora_core.artifacts import Adapter
from qlora_core.events import Report
from qlora_core.training.spec import TrainSpec
from qlora_core.training.worker import train_in


def run(raw: dict[str, Any], report: Report) -> Adapter:
    """Entry of a child process."""
    return train_in(torch.float16, 1e9, TrainSpec.model_validate(raw), torch.device("cpu"), report)
