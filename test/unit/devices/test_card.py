"""The side stream begins after the main stream's earlier work, and its later work waits for it."""

import contextlib
import types

import torch

from devices import card


def test_steps_that_warm_up_wait_for_the_stream_before_them_and_are_waited_for(monkeypatch):
    calls = []

    class Stream:
        def wait_stream(self, other):
            calls.append(("side" if self is side else "main", "waits"))

    main, side = Stream(), Stream()

    @contextlib.contextmanager
    def stream(used):
        assert used is side
        yield

    module = types.SimpleNamespace(current_stream=lambda: main, stream=stream)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    monkeypatch.setattr(card, "side_stream", lambda device: side)
    with card.on_side_stream(torch.device("cpu")):
        calls.append("step")
    assert calls == [("side", "waits"), "step", ("main", "waits")]
