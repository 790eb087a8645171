"""The flags and the device together say how the device is used."""

import argparse

import pytest
import torch
from conftest import train

from devices.execution import (
    Execution,
    add_device_options,
    add_execution_options,
    add_gpu_options,
)

CPU = torch.device("cpu")


def execution(*flags, device=CPU):
    parser = argparse.ArgumentParser()
    for add_options in (add_device_options, add_execution_options, add_gpu_options):
        add_options(parser)
    return Execution.from_options(parser.parse_args(flags), device)


def test_a_cpu_uses_nothing_that_only_a_card_has():
    assert execution() == Execution()


def test_a_card_uses_everything_but_what_is_turned_off():
    card = torch.device("cuda")
    found = execution("--triton=false", "--copy-stream=false", "--cuda-graphs", device=card)
    assert found == Execution(static_shapes=True, pin_memory=True, copy_stream=False, graphs=True)
    off = ("fused-optimizer", "one-lookup", "static-shapes", "pin-memory", "copy-stream", "triton")
    assert execution(*(f"--{name}=false" for name in off), device=card) == Execution(
        fused_optimizer=False, one_lookup=False
    )


@pytest.mark.parametrize("amp, lower", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_lower_precision_is_what_amp_names(amp, lower):
    assert execution(f"--amp={amp}").lower is lower


def test_another_precision_is_refused():
    wrong = train("--amp=fp8")
    assert wrong.status == 2 and "choose from 'off', 'bf16', 'fp16'" in wrong.err
