"""Energy of GPUs. No GPU is here: NVML is a stand-in with the calls that are used (tests/gpu asks the real one)."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from qlora_core.training.energy import EnergyMeter

CUDA = torch.device("cuda")


class NvmlError(Exception):
    pass


class Cards:
    """Two cards, counting millijoules."""

    def __init__(self) -> None:
        self.counters = {"GPU-0": 5_000, "GPU-1": 70_000}
        self.tell = True

    def read(self, card: str) -> int:
        if not self.tell:
            raise NvmlError("Not Supported")
        return self.counters[card]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    cards, nvml = Cards(), ModuleType("pynvml")
    calls = {
        "NVMLError": NvmlError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetTotalEnergyConsumption": cards.read,
    }
    vars(nvml).update(calls)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=number))
    return cards


def test_the_joules_of_all_cards_are_counted_from_one_call_to_the_next(cards):
    meter = EnergyMeter(CUDA, processes=2, nodes=1)
    cards.counters |= {"GPU-0": 6_500, "GPU-1": 71_000}
    assert meter.since_last() == {"gpu_energy_j": 2.5}
    cards.counters |= {"GPU-1": 71_250}
    assert meter.since_last() == {"gpu_energy_j": 0.25}


def test_cards_of_others_are_not_counted(cards):
    meter = EnergyMeter(CUDA, processes=1, nodes=1)
    cards.counters |= {"GPU-0": 6_000, "GPU-1": 99_000}
    assert meter.since_last() == {"gpu_energy_j": 1.0}


def test_what_cannot_be_read_is_left_out_instead_of_guessed(cards):
    assert EnergyMeter(torch.device("cpu"), processes=1, nodes=1).since_last() == {}
    assert EnergyMeter(CUDA, processes=2, nodes=2).since_last() == {}
    cards.tell = False
    assert EnergyMeter(CUDA, processes=1, nodes=1).since_last() == {}


def test_without_the_package_nothing_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter(CUDA, processes=1, nodes=1).since_last() == {}
