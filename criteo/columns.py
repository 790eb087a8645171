"""The 40 columns of a Criteo row: a label, 13 integers, 26 categories."""

import numpy as np
import numpy.typing as npt

NUM_DENSE = 13
NUM_SPARSE = 26
FIRST_SPARSE = 1 + NUM_DENSE
NUM_FIELDS = FIRST_SPARSE + NUM_SPARSE
NAMES = (
    "label",
    *(f"I{k}" for k in range(1, NUM_DENSE + 1)),
    *(f"C{k}" for k in range(1, NUM_SPARSE + 1)),
)
KAGGLE_PARTS = 7  # the original cuts Kaggle's one file into the seven days that it covers

Bytes = npt.NDArray[np.uint8]
Columns = npt.NDArray[np.int32]  # (40, rows)
Rows = npt.NDArray[np.int32]  # (rows, 40)
