"""Free-space check before the work that fills a disk."""

import pathlib
import shutil
from collections.abc import Mapping

from saejax.errors import UserError


def check(sizes: Mapping[pathlib.Path, float], remedy: str) -> None:
    """Refuses what will not fit; folders on one disk must fit together.

    Args:
      sizes: folder, which need not be there yet -> bytes that will be written into it.
      remedy: what to do, for the message.

    Raises:
      UserError: a disk has less room.
    """
    disks: dict[int, list[pathlib.Path]] = {}
    for path in sizes:
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        disks.setdefault(there.stat().st_dev, [there]).append(path)
    for there, *paths in disks.values():
        needed, free = sum(sizes[path] for path in paths), shutil.disk_usage(there).free
        if needed > free:
            names = " and ".join(map(str, paths))
            raise UserError(
                f"path {names}: needs about {needed / 1e9:.3g} GB and has {free / 1e9:.3g} GB free; {remedy}"
            )
