"""Small files that are there whole or not at all, and folders that one process works in at a time."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Write beside the file, then rename: who is killed, or finds the disk full, leaves the old one (OSError)."""
    path = Path(path)
    unfinished = path.with_name(f"{path.name}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8", newline="\n")
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold `folder/lock`, which the system lets go when the process ends, however it ends. Raises OSError when another
    process holds it."""
    with open(folder / "lock", "a+b") as file:
        try:
            if os.name == "nt":
                import msvcrt

                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"{folder}: another process is working here; wait for it, or give another folder") from error
        yield
