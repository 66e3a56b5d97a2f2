from typing import TypeAlias

from cffi import FFI

_CData: TypeAlias = FFI.CData

ffi: FFI

class _Lib:
    SQUASH_CONFLICT: int
    def squash_open(
        self, opened: _CData, path: bytes, compressor: bytes, level: int, block_bytes: int, workers: int, backlog: int
    ) -> int: ...
    def squash_xattr(self, squash: _CData, key: bytes, value: bytes, value_bytes: int) -> int: ...
    def squash_add(
        self, squash: _CData, path: bytes, path_bytes: int, mode: int, mtime: int, target: bytes, size: int
    ) -> int: ...
    def squash_link(
        self, squash: _CData, path: bytes, path_bytes: int, target: bytes, target_bytes: int
    ) -> int: ...
    def squash_data(self, squash: _CData, data: bytes, count: int) -> int: ...
    def squash_finish(self, squash: _CData) -> int: ...
    def squash_close(self, squash: _CData) -> None: ...

lib: _Lib
