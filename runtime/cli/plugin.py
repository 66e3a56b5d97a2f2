"""Find the plugin in plugstack.conf, and tell for which Slurm it was built. Pure but for reading files.

slurmd refuses a plugin that was built for another Slurm, and says so only in its own log;
srun then does not know the options. The version is the value of the symbol
`plugin_version` (slurm/slurm_version.h), read from the file without loading it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NAME = "spank_enclos.so"
INCLUDE_DEPTH = 8
_ELF64_LITTLE = b"\x7fELF\x02\x01"
_SHT_DYNSYM = 11


@dataclass(frozen=True, slots=True)
class PluginLine:
    """One plugin in plugstack.conf or a file it includes."""

    place: str
    mode: str
    path: str
    arguments: str

    @property
    def is_ours(self) -> bool:
        return Path(self.path).name in (NAME, NAME.removesuffix(".so"))


def plugstack_lines(path: Path, depth: int = 0) -> Iterator[PluginLine]:
    """All plugins in the order in which Slurm calls them; `include` takes a pattern (spank(8)).

    Raises:
        OSError: a file cannot be read.
    """
    for number, text in enumerate(path.read_text(errors="replace").splitlines(), 1):
        words = text.partition("#")[0].split(None, 2)
        if len(words) < 2:
            continue
        if words[0] == "include":
            if depth < INCLUDE_DEPTH:
                base = Path(words[1])
                pattern = base if base.is_absolute() else path.parent / base
                for included in sorted(Path("/").glob(str(pattern).lstrip("/"))):
                    yield from plugstack_lines(included, depth + 1)
        elif words[0] in ("required", "optional"):
            yield PluginLine(f"{path}:{number}", words[0], words[1], words[2] if len(words) > 2 else "")


def built_for(path: Path) -> tuple[int, int, int] | None:
    """The Slurm release that a plugin was built for; None when the file does not tell.

    Raises:
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    try:
        value = _symbol_value(data, b"plugin_version")
    except (struct.error, IndexError, OverflowError):  # offsets that lead out of the file
        return None
    return None if value is None else (value >> 16 & 0xFF, value >> 8 & 0xFF, value & 0xFF)


def _symbol_value(data: bytes, name: bytes) -> int | None:
    """The 32-bit value of a data symbol in an ELF64 file. Layout: elf(5)."""
    if not data.startswith(_ELF64_LITTLE):
        return None
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    # name, type, flags, address, offset, size, link
    sections = [struct.unpack_from("<IIQQQQI", data, table + i * size) for i in range(count)]
    for _, kind, _, _, offset, length, link in sections:
        if kind != _SHT_DYNSYM:
            continue
        strings = sections[link][4]
        for entry in range(offset, offset + length, 24):
            text, _, _, section, address, _ = struct.unpack_from("<IBBHQQ", data, entry)
            start = strings + text
            if data[start : start + len(name) + 1] == name + b"\0" and 0 < section < count:
                _, _, _, base, place, _, _ = sections[section]
                (value,) = struct.unpack_from("<I", data, place + address - base)
                return int(value)
    return None
