"""The 40 columns of a Criteo row: label, 13 integers, 26 categories."""

import numpy as np
import numpy.typing as npt

KAGGLE_PARTS = 7  # the original cuts Kaggle's one file into the seven days that it covers
NUM_DENSE = 13
NUM_SPARSE = 26
NUM_FIELDS = 1 + NUM_DENSE + NUM_SPARSE  # label, integers, categories
FIRST_SPARSE = 1 + NUM_DENSE

Bytes = npt.NDArray[np.uint8]
Columns = npt.NDArray[np.int32]  # (40, rows)
Rows = npt.NDArray[np.int32]  # (rows, 40)


NAMES = (
    "label",
    *(f"I{k}" for k in range(1, NUM_DENSE + 1)),
    *(f"C{k}" for k in range(1, NUM_SPARSE + 1)),
)
