"""Packages Enclos: two Python packages mapped onto the folders `runtime/` and `netns/`, and the cffi modules.

The Slurm plugin is built by `spank/Makefile`, because it has to be compiled against the
Slurm that will load it, not against the Python that installs this package.
"""

from setuptools import setup

PACKAGES = {
    "enclos": "enclos",
    "enclos.runtime": "runtime",
    "enclos.runtime.cli": "runtime/cli",
    "enclos.runtime.cluster": "runtime/cluster",
    "enclos.runtime.devices": "runtime/devices",
    "enclos.runtime.errors": "runtime/errors",
    "enclos.runtime.images": "runtime/images",
    "enclos.runtime.linux": "runtime/linux",
    "enclos.runtime.operations": "runtime/operations",
    "enclos.runtime.squash": "runtime/squash",
    "enclos.netns": "netns",
}

setup(
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={"enclos.runtime.cluster": ["*.c"]},
    cffi_modules=["runtime/linux/build.py:ffibuilder", "runtime/squash/build.py:ffibuilder"],
)
