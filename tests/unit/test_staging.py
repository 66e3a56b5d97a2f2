"""What an administrator lists wrongly is named, before anything is made."""

from __future__ import annotations

import pytest
from enclos.runtime import errors
from enclos.runtime.operations import StageDevices


@pytest.mark.parametrize(
    ("path", "wanted"), [("/dev/no-such-device", "no such device node"), ("/dev/shm", "not a device")]
)
def test_a_listed_device_that_is_none_is_named(path: str, wanted: str) -> None:
    with pytest.raises(errors.EnclosError, match=wanted) as caught:
        StageDevices._copy_node(-1, path)
    assert path in caught.value.line()
