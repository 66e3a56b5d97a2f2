"""What the CDI files of a node describe, as one table; and the error of what is looked for in vain. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from enclos.runtime import errors
from enclos.runtime.devices.cdi import Device


@dataclass(frozen=True, slots=True)
class Catalogue:
    """What the files of a node say.

    Attributes:
        devices: by qualified name; of two directories the later one counts.
        twice: qualified names that two files of one directory describe, with those files.
        broken: files that cannot be used, and what is wrong with each.
    """

    devices: dict[str, Device] = field(default_factory=dict)
    twice: dict[str, tuple[str, str]] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def get(self, qualified: str) -> Device:
        """One device by its name.

        Raises:
            EnclosError: cdi_conflict, cdi_broken, device_unknown.
        """
        if qualified in self.twice:
            raise errors.cdi_conflict(qualified, *self.twice[qualified])
        if qualified not in self.devices:
            self.complain_of_broken()
            raise errors.device_unknown(qualified, sorted(self.devices))
        return self.devices[qualified]

    def of_kind(self, kind: str) -> list[Device]:
        """All devices of a kind, in the order of their files; raises like `get` where there is none."""
        found = [device for device in self.devices.values() if device.kind == kind]
        if not found:
            self.complain_of_broken()
            raise errors.device_unknown(f"{kind}=all", sorted(self.devices))
        return found

    def complain_of_broken(self) -> None:
        """A device that is not found may stand in a file that cannot be read."""
        for file, detail in self.broken.items():
            raise errors.cdi_broken(file, detail)
