"""Checkpoints of earlier versions, packed into one archive: ``python tests/data/__init__.py FILES`` packs them anew.

Of each file, which torch.save writes as a ZIP archive, it has a line with the names and sizes of the members, and then
their bytes one after the other: 1,500 members of 16 bytes are mostly headers, checksums and padding.
"""

import io
import json
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path

ARCHIVE = Path(__file__).with_name("checkpoints.tar.xz")


@cache
def _read(name: str) -> bytes:
    with tarfile.open(ARCHIVE) as archive:
        kept = archive.extractfile(name)
        assert kept is not None
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as members:
            for member, size in json.loads(kept.readline()).items():
                members.writestr(member, kept.read(size))
        return file.getvalue()


def checkpoint(name: str) -> io.BytesIO:
    """For torch.load."""
    return io.BytesIO(_read(name))


def pack(files: list[Path]) -> None:
    with tarfile.open(ARCHIVE, "w:xz", preset=9) as archive:
        for file in sorted(files, key=lambda file: file.name):
            with zipfile.ZipFile(file) as opened:
                members = {name: opened.read(name) for name in opened.namelist()}
            sizes = {name: len(content) for name, content in members.items()}
            kept = json.dumps(sizes).encode() + b"\n" + b"".join(members.values())
            info = tarfile.TarInfo(file.name)
            info.size = len(kept)
            archive.addfile(info, io.BytesIO(kept))


if __name__ == "__main__":
    pack([Path(name) for name in sys.argv[1:]])
