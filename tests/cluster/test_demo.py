"""The tour of `make demo`: it checks each part itself, so its exit status says whether the main job works."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from enclos.runtime.cluster.cluster import clusters


def test_demo_shows_the_main_job_and_cleans_up() -> None:
    name = f"demo-{os.getpid()}"
    command = [sys.executable, "-m", "enclos.runtime.cluster.main", "demo", "--name", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"rank 3  node n2  address 10\.77\.", done.stdout)
    assert len(re.findall(r"12 of 12 attempts got no answer", done.stdout)) == 4
    assert re.search(r"^added: -?\d+ ms", done.stdout, re.MULTILINE)
    assert "What to type next" in done.stdout
    assert name not in clusters()
