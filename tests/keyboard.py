"""Plugin of pytest (pyproject.toml) for all tests: the signals of a terminal.

A shell without job control starts what it puts into the background with SIGINT and SIGQUIT ignored, and programs
inherit that. Tests of Ctrl-C would then find that nothing listens.
"""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
