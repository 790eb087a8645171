"""A step uses the operators that every torch_npu has kernels for, as the torch at hand splits it.

The emulated device needs torch 2.10; this test runs with all. On torch's meta device, which has
shapes and no numbers, a step takes the way of a card.
"""

from collections import Counter

import pytest
import torch
from conftest import SMALL_MODEL
from test_npu import KINDS, SAME, without_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import dlrm_s_pytorch as dlrm
from ranks.process import Process
from reporting.reporter import Reporter

ONLY_A_CARDS = "--pin-memory=false --copy-stream=false --tensor-board-filename=".split()
STEPS = 2


@pytest.fixture
def unsplit(monkeypatch):
    """torch_npu has a kernel for repeat_interleave of values; without one torch splits it."""
    split = torch.repeat_interleave

    def repeat_interleave(values, repeats=None, output_size=None):
        if repeats is None:
            return split(values, output_size=output_size)
        return values.new_empty(output_size)

    monkeypatch.setattr(torch, "repeat_interleave", repeat_interleave)


class Recorder(TorchDispatchMode):
    """Counts the operators that reach a device."""

    def __init__(self):
        super().__init__()
        self.operators = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators[function.name()] += 1
        return function(*args, **(kwargs or {}))


def operators_of(flags):
    """The operators of two steps, by name with overload, and how often each was called."""
    options = dlrm.parse_options([*SMALL_MODEL, *flags.split(), *ONLY_A_CARDS])
    host, card = (Process(0, 1, 0, torch.device(kind), "gloo") for kind in ("cpu", "meta"))
    dlrm.seed_everything(options)
    data = dlrm.make_data(options, None, host)
    trainer = dlrm.Trainer(options, card, data, Reporter())
    recorder = Recorder()
    for it, batch in zip(range(1, STEPS + 1), data.train, strict=False):
        on_card = batch.to(card.device)
        with recorder:
            trainer.train_step(on_card, it)
    return recorder.operators


@pytest.mark.parametrize("flags", [*SAME.values(), "--amp=fp16"], ids=[*SAME, "fp16"])
def test_every_torch_npu_has_kernels_for_a_step(flags, unsplit):
    found = operators_of(flags)
    assert {"aten::embedding", "aten::addmm"} <= {*found} and found.total() > 100
    for version, kinds in KINDS.items():
        assert without_kernel(found, kinds) == [], version
