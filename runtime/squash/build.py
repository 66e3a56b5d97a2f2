"""How the cffi module `enclos.runtime.squash._squash` is compiled from squash.c, with libsquashfs. Run by setup.py.

The module uses the stable ABI, so one file serves every Python from 3.11.
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "squash.h").read_text())
ffibuilder.set_source(
    "enclos.runtime.squash._squash",
    '#include <stddef.h>\n#include <stdint.h>\n#include "squash.h"\n',
    sources=[str((HERE / "squash.c").relative_to(ROOT))],
    depends=[str(HERE / "squash.h")],
    include_dirs=[str(HERE)],
    libraries=["squashfs"],
    # cffi's own half of the module: its generated wrappers do not use all of their arguments.
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"],
)
