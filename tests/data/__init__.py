"""Checkpoints of earlier versions, packed into one archive: ``python tests/data/__init__.py FILES`` packs them anew."""

import io
import sys
import tarfile
from functools import cache
from pathlib import Path

ARCHIVE = Path(__file__).with_name("checkpoints.tar.xz")


@cache
def _read(name: str) -> bytes:
    with tarfile.open(ARCHIVE) as archive:
        member = archive.extractfile(name)
        assert member is not None
        return member.read()


def checkpoint(name: str) -> io.BytesIO:
    """For torch.load."""
    return io.BytesIO(_read(name))


def pack(files: list[Path]) -> None:
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for file in sorted(files, key=lambda file: file.name):
            info = tarfile.TarInfo(file.name)
            info.size = file.stat().st_size
            archive.addfile(info, io.BytesIO(file.read_bytes()))


if __name__ == "__main__":
    pack([Path(name) for name in sys.argv[1:]])
