"""Files that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write and read, which takes path's place at the end: at any moment path is the old one or the new.

    Its permissions follow the umask. It is written as .NAME.tmp; where a killed process left that, the next to
    write path removes it.

    Raises:
        OSError: it cannot be written; names path.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        # torch.save goes on to close its archive after a write that failed, and then raises something of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and isinstance(error, (OSError, RuntimeError)):
            raise OSError(cause.errno, cause.strerror or str(cause), str(path)) from error
        raise
