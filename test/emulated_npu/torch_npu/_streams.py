"""Streams and events. Work is done at once, but a race that a real card would allow is an error."""

import threading
import time
from itertools import count

from torch_npu._record import record

_numbers = count()
_thread = threading.local()


class Stream:
    """Knows how much of the other streams' work it has waited for."""

    def __init__(self, device=None, priority=0, **kwargs):
        self.number, self.done, self._waited = next(_numbers), 0, {}

    def synchronize(self):
        record.wait("stream.synchronize")

    def wait_stream(self, stream):
        self._waited[stream.number] = stream.done

    def wait_event(self, event):
        if event.stream is not None:
            self._waited[event.stream.number] = event.done

    def record_event(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self):
        return True

    def _begin(self):
        """The number of the next piece of work."""
        self.done += 1
        return self.done

    def _check_ready(self, made, recorded, name):
        """Raise if this stream may not use what `made` = (stream, number of its work) has made."""
        stream, work = made
        if stream is self:
            return
        if self._waited.get(stream.number, 0) < work:
            raise RuntimeError(f"{name} uses a tensor of another stream without waiting for it")
        if self.number not in recorded:
            raise RuntimeError(f"{name} uses a tensor of another stream without record_stream")


class Event:
    def __init__(self, enable_timing=False, blocking=False, interprocess=False):
        self.stream, self.done, self._time = None, 0, 0.0

    def record(self, stream=None):
        self.stream = stream or current_stream()
        self.done, self._time = self.stream.done, time.perf_counter()

    def wait(self, stream=None):
        (stream or current_stream()).wait_event(self)

    def query(self):
        return True

    def synchronize(self):
        record.wait("event.synchronize")

    def elapsed_time(self, end_event):
        record.wait("event.elapsed_time")
        return (end_event._time - self._time) * 1e3


_default = Stream()


def current_stream(device=None):
    return getattr(_thread, "stream", _default)


def default_stream(device=None):
    return _default


def set_stream(stream):
    _thread.stream = stream


class StreamContext:
    def __init__(self, stream_ctx):
        self._stream = stream_ctx

    def __enter__(self):
        self._before = current_stream()
        if self._stream is not None:
            set_stream(self._stream)

    def __exit__(self, *_):
        set_stream(self._before)


def stream(stream):
    return StreamContext(stream)
