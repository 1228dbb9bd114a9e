"""A lock on a folder that the kernel releases when its process ends, however it ends."""

from __future__ import annotations

import errno
import fcntl
import os
import time
import weakref
from pathlib import Path

__all__ = ["FolderLock", "has_locks"]

_NO_LOCKS_HERE = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class FolderLock:
    """The lock of `folder`: the file `lock` in it, which holds the process id of the last holder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._file: int | None = None
        _all_locks.add(self)

    def __del__(self) -> None:
        self.release()

    @property
    def held(self) -> bool:
        return self._file is not None

    def acquire(self) -> int | None:
        """Take the lock; returns None, or the process id of the other holder (0 if it did not write it yet)."""
        if self.held:
            return None
        holder = 0
        for _ in range(20):
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                if _lock_exclusively(file) and self._is_still(file):
                    os.ftruncate(file, 0)
                    os.write(file, str(os.getpid()).encode())
                    self._file = file
                    return None
                holder = int(os.pread(file, 20, 0) or 0)
            finally:
                if self._file is None:  # not got, or the disk is full
                    os.close(file)
            # Someone who asks `is_held_by_anyone` holds a shared lock for an instant.
            time.sleep(0.01)
        return holder

    def release(self) -> None:
        """Give the lock free; nothing happens if it is not held here."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def is_held_by_anyone(self) -> bool:
        """Also True where the file system has no locks, so that it cannot be told."""
        if self.held:
            return True
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe of that name would wait
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError) and error.errno not in _NO_LOCKS_HERE:
                raise
            return True
        finally:
            os.close(file)
        return False

    def _is_still(self, file: int) -> bool:
        """False if the folder was moved aside between opening its lock and getting it."""
        try:
            return os.path.samestat(os.fstat(file), self.path.stat())
        except FileNotFoundError:
            return False


def has_locks(folder: Path) -> bool:
    """Whether the file system that `folder` is on has locks at all."""
    file = os.open(folder / ".locks", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in _NO_LOCKS_HERE:
            raise
        return False
    finally:
        os.close(file)
    return True


def _lock_exclusively(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        # Some network file systems have no locks; training without one beats not training.
        if error.errno not in _NO_LOCKS_HERE:
            raise
    return True


_all_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _release_inherited() -> None:
    """A forked child (a data loader's worker) shares its parent's locks and would keep them after its death."""
    for lock in _all_locks:
        lock.release()


os.register_at_fork(after_in_child=_release_inherited)
