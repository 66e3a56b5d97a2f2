"""Manual pages and completion: made from --help, and what a shell makes of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from enclos.runtime import manual
from enclos.runtime.cli.main import VERBS

ROOT = Path(__file__).resolve().parents[2]
BASH = ROOT / "conf/completion/enclos.bash"
ZSH = ROOT / "conf/completion/_enclos"


def complete(*words: str) -> list[str]:
    """What Tab offers after `enclos WORDS`, the last of which is begun."""
    script = f"""
        source {BASH}
        enclos() {{ printf 'NAME FILE\\nmine /home/x/mine.toml\\n'; }}
        COMP_WORDS=(enclos "$@"); COMP_CWORD=$#
        _enclos; printf '%s\\n' "${{COMPREPLY[@]}}\""""
    done = subprocess.run(["bash", "-c", script, "bash", *words], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_verbs_and_options() -> None:
    assert set(complete("")) == {*VERBS, "--help", "--version", "--debug"}
    assert complete("rend") == ["render"]
    assert complete("config", "") == ["show", "validate"]
    assert complete("config", "show", "--f") == ["--file"]
    assert complete("--debug", "ps", "--") == ["--help", "--json"]
    assert complete("config", "show", "--file", "") == []
    assert "mine" in complete("profile", "show", "m")
    assert "--container-network" in complete("render", "--container-n")


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_reads_the_completion() -> None:
    subprocess.run(["zsh", "-n", str(ZSH)], check=True)


def test_zsh_knows_each_verb() -> None:
    text = ZSH.read_text()
    assert text.startswith("#compdef enclos\n")
    assert [verb for verb in VERBS if f"\n\t{verb})\n" not in text] == []


def test_each_verb_has_its_help_in_the_manual() -> None:
    page = (ROOT / "docs/man/enclos.1").read_text().replace("\\-", "-")
    for verb in manual.verbs():
        assert re.search(rf"^\\fB{verb.words}\\fR\n\S", page, re.M), verb.words
        assert len(verb.text) > 15, f"enclos {verb.words} --help says nothing"


def test_to_look_at_a_verb_runs_nothing() -> None:
    """`gc` would ask the agent, `check` would make namespaces: only their parsers are made."""
    words = [verb.words for verb in manual.verbs()]
    assert {word.split()[0] for word in words} == set(VERBS)
    assert len(words) == len(set(words))
