"""Random and synthetic data as the contract says it: number by number, from numpy's generator."""

import numpy as np


class NaiveRandomData:
    """Batches of a dlrm_data_pytorch.RandomSpec, to be drawn in order."""

    def __init__(self, spec):
        self.spec, self.random = spec, np.random.RandomState(spec.seed)
        self.traces = []
        for table in range(len(spec.num_rows) if spec.trace else 0):
            with open(spec.trace.replace("j", str(table))) as file:
                ids, distances, probabilities = (line.split(",") for line in file)
            numbers = [int(word) for word in ids], [int(word) for word in distances]
            self.traces.append((*numbers, np.array([float(word) for word in probabilities])))

    def batch(self, num_rows):
        """(dense, targets, bags[row][table]) of the next rows."""
        spec, random = self.spec, self.random
        dense = random.rand(num_rows, spec.num_dense).astype(np.float32)
        by_table = [[self.bag(table) for _ in range(num_rows)] for table in range(self.num_tables)]
        targets = random.rand(num_rows, 1).astype(np.float32)
        bags = [[bags[row].tolist() for bags in by_table] for row in range(num_rows)]
        return dense, np.round(targets) if spec.round_targets else targets, bags

    @property
    def num_tables(self):
        return len(self.spec.num_rows)

    def bag(self, table):
        """Ids of the next bag, in order."""
        spec, random, rows = self.spec, self.random, self.spec.num_rows[table]
        size = spec.num_indices
        if not spec.num_indices_fixed:
            share = random.random_sample(1)[0] * min(rows, spec.num_indices)
            size = max(1, int(np.round(share)))
        if spec.trace:
            return np.unique(self.trace_ids(table, size)) % rows
        if spec.distribution == "gaussian":
            mu = (spec.maximum + spec.minimum) / 2 if spec.mu == -1 else spec.mu
            drawn = np.clip(random.normal(mu, spec.sigma, size), spec.minimum, spec.maximum)
            ids = np.unique(drawn).astype(np.int64)
            assert ids.min() >= 0 and ids.max() < rows, f"id {ids} of table {table}"
            return ids
        return np.unique(np.round(random.random_sample(size) * (rows - 1))).astype(np.int64)

    def trace_ids(self, table, size):
        """(size,) int64 ids by stack distance."""
        ids, distances, probabilities = self.traces[table]
        numbers = [self.random.rand(1)[0] for _ in range(size)]
        profile = (ids, distances, probabilities, self.spec.trace_padding)
        return np.array(naive_trace(profile, numbers), np.int64)


def naive_trace(profile, numbers):
    """The ids that random numbers draw by stack distance, from a list that is popped."""
    ids, distances, probabilities, padding = profile
    recent, num_new, drawn = list(ids), 0, []
    for number in numbers:
        if num_new < distances[-1]:
            last = int(np.searchsorted(distances, num_new, side="right")) - 1
            number *= probabilities[max(last, 0)]
        elif padding:
            number = (1 - probabilities[0]) * number + probabilities[0]
        place = int(np.searchsorted(probabilities, number, side="left"))
        distance = distances[min(place, len(distances) - 1)]
        num_new += distance == 0
        drawn.append(recent.pop(0 if distance == 0 else -distance))
        recent.append(drawn[-1])
    return drawn
