"Kernel tests run in the interpreter on CPU and on a GPU alike; uninitialised memory is poisoned."

import pytest
import torch
from torch.utils._device import _device_constructors

torch.set_num_threads(1)


@pytest.fixture
def device(): return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    "Every floating `torch.empty` is full of NaN, so that a value nobody wrote is seen."
    _device_constructors()  # torch keeps this list once made: not with the poisoned function in it
    empty = torch.empty

    def nan_empty(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and out.device.type != "meta" else out

    monkeypatch.setattr(torch, "empty", nan_empty)
