"""A record of the work that the program has given to the emulated device."""

import threading
from collections import Counter
from dataclasses import dataclass, field

# the shape of their result depends on values, so the host waits for it
VALUE_DEPENDENT = {
    "aten::nonzero",
    "aten::_unique",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::masked_select",
    "aten::equal",
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
}


@dataclass
class Record:
    """Calls since `clear`.

    Attributes:
        operators: how often each was called, by name with overload.
        dtypes: of the tensors that operators gave.
        host_copies: (operator, elements) of copies from the device to the host.
        waits: why the host had to wait for the device.
        shapes: (operator, shapes of its tensors).
    """

    operators: Counter = field(default_factory=Counter)
    dtypes: Counter = field(default_factory=Counter)
    host_copies: list = field(default_factory=list)
    waits: Counter = field(default_factory=Counter)
    shapes: set = field(default_factory=set)

    def __post_init__(self):
        self._lock = threading.Lock()  # the loader's thread copies while a step computes

    def clear(self):
        for found in (self.operators, self.dtypes, self.host_copies, self.waits, self.shapes):
            found.clear()

    def operator(self, function, tensors, output_size):
        """Record a call; with `output_size` the caller has given the size of the result."""
        name = function._schema.name
        with self._lock:
            self.operators[function.name()] += 1
            self.shapes.add((function.name(), tuple(tuple(one.shape) for one in tensors)))
            counted = name == "aten::repeat_interleave" and not output_size
            if name in VALUE_DEPENDENT or counted:
                self.waits[name] += 1

    def result(self, tensor):
        with self._lock:
            self.dtypes[tensor.dtype] += 1

    def to_host(self, name, numel):
        with self._lock:
            self.host_copies.append((name, numel))
            self.waits["copy to the host"] += 1

    def to_device(self, name, pinned):
        if not pinned:
            with self._lock:
                self.waits["copy from pageable memory"] += 1

    def wait(self, why):
        with self._lock:
            self.waits[why] += 1


record = Record()
