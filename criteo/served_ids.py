"""The ids with which new rows are looked up, also for categories that no training row had."""

import numpy as np
import numpy.typing as npt

from criteo.columns import NUM_SPARSE, Columns, Rows
from criteo.vocabulary import IdLookup
from criteo.vocabulary_file import Vocabulary

MISSING = 0  # the category of an empty field


class ServedIds:
    """Takes an id of the model in place of an unknown category.

    It is that of a missing category: of five ways, this one ranked a day of unseen rows best
    (bench/unknown_values.py; docs/serving.md has the figures). Where no row lacked the category, it
    is the last id: its category came up last, so it is rare, and its vector is near to where it
    began, near 0. Any number of threads may use it at once.

    Args:
        vocabulary: a file whose `check` has passed.
        max_ind_range: categories have been taken modulo this; -1: they have not.

    Raises:
        UserError: the vocabulary does not go with the modulo, or has a value twice.
    """

    def __init__(self, vocabulary: Vocabulary, max_ind_range: int) -> None:
        self._lookup = IdLookup(vocabulary, max_ind_range)
        (missing,) = self._lookup.ids(np.full((NUM_SPARSE, 1), MISSING, np.int32))
        last = np.array(vocabulary.counts, np.int32) - 1
        self.instead: npt.NDArray[np.int32] = np.where(missing < 0, last, missing)

    def ids(self, categories: Columns) -> tuple[Rows, int]:
        """(ids (n, 26) int32 that a model has, how many of them stand for unknown categories).

        Args:
            categories: (26, n) int32, after the modulo.
        """
        found = self._lookup.ids(categories)
        is_unknown = found < 0
        num_unknown = int(is_unknown.sum())
        if num_unknown:
            found = np.where(is_unknown, self.instead, found)
        return found, num_unknown
