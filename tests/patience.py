"""How long tests wait. A plugin of pytest (pyproject.toml): no example of hypothesis is too slow.

Its deadline of 200 ms finds slow code on an idle machine, and other people's work on a busy one.
"""

import os

from hypothesis import settings

# How many times longer everything may take: software emulates a guest's processors (tests/vm).
PATIENCE = int(os.environ.get("ENCLOS_PATIENCE", "1"))

settings.register_profile("enclos", deadline=None)
settings.load_profile("enclos")
