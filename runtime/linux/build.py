"""How the cffi module `enclos.runtime.linux._linux` is compiled from kernel.c. Run by setup.py.

The module uses the stable ABI, so one file serves every Python from 3.11. It lands beside this file
(`python setup.py build_ext --inplace`).
"""

from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

ffibuilder = FFI()
ffibuilder.cdef((HERE / "kernel.h").read_text())
ffibuilder.set_source(
    "enclos.runtime.linux._linux",
    '#include <stddef.h>\n#include <stdint.h>\n#include "kernel.h"\n',
    sources=[str((HERE / "kernel.c").relative_to(ROOT))],
    depends=[str(HERE / "kernel.h")],
    include_dirs=[str(HERE)],
    # cffi's own half of the module: its generated wrappers do not use all of their arguments.
    extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"],
)
