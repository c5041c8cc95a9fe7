"""A new file whose bytes go to the disk without a copy in the operating system's cache.

A checkpoint is read again by nobody soon: cached, its bytes would be copied once more, push out what others have
cached, and reach the disk only when somebody waits for them. Here they are gathered in blocks, and one block is on its
way to the disk while the next is filled.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

BLOCK_BYTES = 8 << 20
SECTOR_BYTES = 4096  # lengths, offsets and addresses of what goes past the cache are multiples of it
_NO_CACHE: int = getattr(os, "O_DIRECT", 0)  # Linux


class DirectFile:
    """Written front to back: `write` as often as needed, `finish`, `flush`, `close`.

    Where the file system has no such way (some network ones), or refuses it, the same goes through the cache.
    """

    def __init__(self, path: Path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            self._number = os.open(path, flags | _NO_CACHE, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL or not _NO_CACHE:
                raise
            self._number = os.open(path, flags, 0o666)
        self._blocks: list[mmap.mmap] = []
        self._filled = self._size = 0
        self._on_its_way: Future[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def write(self, data: memoryview) -> int:
        """How many of the bytes were taken. Raises OSError for what the disk said of an earlier block."""
        if not self._blocks:
            self._blocks.append(mmap.mmap(-1, BLOCK_BYTES))
        taken = min(len(data), BLOCK_BYTES - self._filled)
        self._blocks[0][self._filled : self._filled + taken] = data[:taken]
        self._filled += taken
        if self._filled == BLOCK_BYTES:
            self._send()
        return taken

    def finish(self) -> None:
        """The rest of the last block; every byte is with the file system."""
        if self._filled:
            self._wait()
            tail, self._filled = self._filled, -(-self._filled // SECTOR_BYTES) * SECTOR_BYTES
            self._blocks[0][tail : self._filled] = bytes(self._filled - tail)
            self._put(self._blocks[0], self._filled, self._size)
            self._size += tail
            os.ftruncate(self._number, self._size)
            self._filled = 0
        self._wait()
        self._free()

    def flush(self) -> None:
        """What `finish` has left to do, on the disk."""
        os.fsync(self._number)

    def close(self) -> None:
        try:
            self._free()
        finally:
            os.close(self._number)

    def _send(self) -> None:
        """The filled block, while the other one is filled."""
        self._wait()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "gearshift-checkpoint")
            self._blocks.append(mmap.mmap(-1, BLOCK_BYTES))
        self._on_its_way = self._thread.submit(self._put, self._blocks[0], BLOCK_BYTES, self._size)
        self._blocks.reverse()
        self._size, self._filled = self._size + BLOCK_BYTES, 0

    def _put(self, block: mmap.mmap, length: int, at: int) -> None:
        with memoryview(block) as view:
            done = 0
            while done < length:
                with view[done:length] as rest:
                    try:
                        done += os.pwrite(self._number, rest, at + done)
                    except OSError as error:
                        if error.errno != errno.EINVAL or not self._turn_to_cache():
                            raise

    def _turn_to_cache(self) -> bool:
        """For a file system that opens such a file and does not write it. False if it is so already."""
        flags = fcntl.fcntl(self._number, fcntl.F_GETFL)
        if not flags & _NO_CACHE:
            return False
        fcntl.fcntl(self._number, fcntl.F_SETFL, flags & ~_NO_CACHE)
        return True

    def _wait(self) -> None:
        if self._on_its_way is not None:
            sent, self._on_its_way = self._on_its_way, None
            sent.result()

    def _free(self) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None
        for block in self._blocks:
            block.close()
        self._blocks = []
