"""How large the units of preparation's work are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Sizes that bound the memory; the order of a shuffle depends on those of pieces and buckets.

    Attributes:
        piece_bytes: text of a parsed piece.
        block_bytes: text of a file that is in memory at a time.
        smallest_bucket: fewest bytes of a shuffle's bucket, if there are enough rows to fill it.
        largest_bucket: most bytes of a shuffle's bucket, on average.
        num_buckets: buckets of a shuffle whose size is between these two.
        rows_per_write: rows of a bucket that are permuted and written at a time.
    """

    piece_bytes: int = 32 << 20
    block_bytes: int = 4 << 20
    smallest_bucket: int = 16 << 20
    largest_bucket: int = 256 << 20
    num_buckets: int = 256
    rows_per_write: int = 1 << 16

    @property
    def parser_bytes(self) -> int:
        """Memory of a thread that parses a piece or gives its categories their ids."""
        return 3 * self.piece_bytes


DEFAULT_SIZES = Sizes()
