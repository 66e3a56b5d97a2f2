"""Every error text of Enclos, each in one place.

An error names its subject as the user typed it, says what happened, the cause where it was
checked, and what to do next. `netns/` and `linux/` raise facts; whoever knows what the user
asked for turns them into one of these. docs/errors.md has a section for each function here
and tests/golden/errors.txt all texts; tests compare.

Must not hold: decisions, system calls, printing. The one look outside is at the sysctls that
limit namespaces, because the kernel's own text for them misleads. Used on both sides of the
privilege line. Texts may hold what a user typed, so control characters are escaped when printed.
"""

from __future__ import annotations

from enclos.runtime.errors.commands import *
from enclos.runtime.errors.devices import *
from enclos.runtime.errors.error import *
from enclos.runtime.errors.images import *
from enclos.runtime.errors.kept import *
from enclos.runtime.errors.mounts import *
from enclos.runtime.errors.networks import *
from enclos.runtime.errors.node import *
from enclos.runtime.errors.options import *
from enclos.runtime.errors.registries import *
from enclos.runtime.errors.sessions import *
