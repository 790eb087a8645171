"""Equal consecutive shares of rows."""


def split_evenly(num_rows: int, num_shares: int) -> list[int]:
    """Rows of each of `num_shares` consecutive shares; the first ones may have one row more."""
    return [num_rows // num_shares + (k < num_rows % num_shares) for k in range(num_shares)]


def share_of_rows(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(begin, end) of the rank's rows if `split_evenly` divides them among all ranks."""
    whole, rest = divmod(num_rows, world_size)
    begin = rank * whole + min(rank, rest)
    return begin, begin + whole + (rank < rest)
