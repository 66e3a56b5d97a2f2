"""Plugin of pytest (pyproject.toml) for all tests: no example of hypothesis is too slow.

Its deadline of 200 ms finds slow code on an idle machine, and other people's work on a busy one.
"""

from hypothesis import settings

settings.register_profile("enclos", deadline=None)
settings.load_profile("enclos")
