"""The operations of a plan: each says what it does (`describe`) and does it (`execute`).

Every mount, namespace and identity change of a container is here, in small steps that a fault test can interrupt
anywhere. The order of the steps is plan.py's. Runs in a builder: as root up to BecomeUser, as the user after it.
"""

from enclos.runtime.operations.assembly import (
    APT_SETTING,
    Attach,
    CheckWorkdir,
    EnterRoot,
    MakeDirectory,
    MountInside,
    SealRoot,
    SetUpPackageManagers,
    Unmount,
    WriteAccounts,
    WriteHostname,
    WriteProgram,
    WriteStaged,
)
from enclos.runtime.operations.common import (
    Operation,
)
from enclos.runtime.operations.devices import (
    AttachDevices,
    CloneDevices,
    JoinLibraries,
    SelectDevices,
)
from enclos.runtime.operations.image import CloneImageMounts, PlaceImageMounts, ReadImageFacts
from enclos.runtime.operations.kept import (
    AttachRunning,
    EnterContainer,
    EnterRootBeside,
    StageBeside,
    StageKept,
    TakeContainer,
)
from enclos.runtime.operations.namespaces import (
    AwaitServer,
    BecomeUser,
    CloneDirectoryImage,
    CloneSource,
    EnterNamespaces,
    EnterUserNamespace,
    JoinMounts,
    TakeMounts,
)
from enclos.runtime.operations.parts import OpenParts
from enclos.runtime.operations.staging import (
    CloneHostPath,
    JoinNetwork,
    LookUpAccounts,
    OpenImage,
    StageDevices,
    StageFilesystem,
    StageProc,
    StageText,
)
from enclos.runtime.operations.usermounts import clone, place

__all__ = [
    "APT_SETTING",
    "Attach",
    "AttachDevices",
    "AttachRunning",
    "AwaitServer",
    "BecomeUser",
    "CheckWorkdir",
    "CloneDevices",
    "CloneDirectoryImage",
    "CloneHostPath",
    "CloneImageMounts",
    "CloneSource",
    "EnterContainer",
    "EnterNamespaces",
    "EnterRoot",
    "EnterRootBeside",
    "EnterUserNamespace",
    "JoinLibraries",
    "JoinMounts",
    "JoinNetwork",
    "LookUpAccounts",
    "MakeDirectory",
    "MountInside",
    "OpenImage",
    "OpenParts",
    "Operation",
    "PlaceImageMounts",
    "ReadImageFacts",
    "SealRoot",
    "SelectDevices",
    "SetUpPackageManagers",
    "StageBeside",
    "StageDevices",
    "StageFilesystem",
    "StageKept",
    "StageProc",
    "StageText",
    "TakeContainer",
    "TakeMounts",
    "Unmount",
    "WriteAccounts",
    "WriteHostname",
    "WriteProgram",
    "WriteStaged",
    "clone",
    "place",
]
