"""Locks of files, which not every file system has."""

import errno

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def means_no_locks(error: OSError) -> bool:
    """True if the error says that the file system has no locks."""
    return error.errno in _NO_LOCKS
