"""Manual pages and completion: made from --help, and what a shell makes of them."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
from pathlib import Path

import pytest
from enclos.runtime import manual
from enclos.runtime.cli.main import VERBS
from enclos.runtime.options import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
BASH = ROOT / "conf/completion/enclos.bash"
SRUN = ROOT / "conf/completion/enclos-srun.bash"
ZSH = ROOT / "conf/completion/_enclos"

# In the command's place; `config show` only where the settings can be read.
ENCLOS = r"""
enclos() {
	case "$1 $2" in
	"profile ls") printf 'NAME  FILE\n'; printf '%s  /home/x/x.toml\n' ${NAMES:-mine} ;;
	"image ls") printf 'NAME  DIGEST\ndocker://debian:12  ab\ndocker://alpine:3  cd\n' ;;
	"config show") [ -z "$OFFERED" ] || echo "step.networks                [$OFFERED]   default" ;;
	ps*) printf 'STEP  USER\n42.0  me\n' ;;
	esac
}
"""


def complete(*words: str, script: Path = BASH, **env: str) -> list[str]:
    """What Tab offers after WORDS, the last of which is begun; the first is the command."""
    command = words[0] if script is SRUN else "enclos"
    line = " ".join(words if script is SRUN else ("enclos", *words))
    commands = f"""
        {ENCLOS}
        source {script}
        COMP_LINE=$1 COMP_POINT=${{#1}}
        COMP_WORDS=($1); [[ $1 == *\\  ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        [[ $(complete -p {command}) =~ -F\\ ([^\\ ]+) ]] && "${{BASH_REMATCH[1]}}" {command}
        printf '%s\\n' "${{COMPREPLY[@]}}\""""
    variables = {"PATH": os.environ["PATH"], **env}
    done = subprocess.run(
        ["bash", "--norc", "-c", commands, "bash", line], capture_output=True, text=True, check=True, env=variables
    )
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_verbs_and_options() -> None:
    assert set(complete("")) == {*VERBS, "--help", "--version", "--debug"}
    assert complete("rend") == ["render"]
    assert complete("config", "") == ["show", "validate"]
    assert complete("config", "show", "--f") == ["--file"]
    assert complete("--debug", "ps", "--") == ["--help", "--json"]
    assert complete("config", "show", "--file", "") == []
    assert "--container-network" in complete("render", "--container-n")


def test_bash_completes_names() -> None:
    assert complete("profile", "show", "m") == ["mine"]
    assert complete("exec", "4") == ["42.0"]
    # Readline replaces what is behind the last colon.
    assert complete("image", "rm", "docker://de") == ["//debian:12"]
    assert complete("image", "inspect", "docker://debian:1") == ["12"]
    assert complete("render", "--container-network", "j") == ["job"]
    assert complete("render", "--container-profile", "") == ["mine"]


@pytest.fixture
def no_slurm(tmp_path: Path) -> dict[str, str]:
    """No completion of Slurm's own."""
    return {"XDG_DATA_DIRS": str(tmp_path)}


@pytest.mark.parametrize("words", [("profile", "show", ""), ("run", "--container-profile=")])
def test_names_are_no_words_of_the_shell(words: tuple[str, ...], tmp_path: Path) -> None:
    """A profile's name is that of a file, which others may have made: on a search path that a group shares."""
    names = ["good", "$(touch$IFS$PWNED)", "`touch$IFS$PWNED`", "a;touch$IFS$PWNED", "x*", "'q", "~root"]
    pwned = tmp_path / "pwned"
    offered = complete(*words, PWNED=str(pwned), NAMES=" ".join(names))
    assert [word for word in offered if word != "--help" and word != "--json"] == ["good"]
    assert not pwned.exists()


def test_bash_completes_the_options_of_srun(no_slurm: dict[str, str]) -> None:
    for command in ("srun", "sbatch", "salloc"):
        assert complete(command, "-N2", "--container-net", script=SRUN, **no_slurm) == ["--container-network="]
        assert complete(command, "--no-container-mo", script=SRUN, **no_slurm) == ["--no-container-mount-home"]
    assert len(complete("srun", "--", script=SRUN, **no_slurm)) == len(OPTIONS)
    assert complete("srun", "./a", script=SRUN, **no_slurm) == []


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("--container-network=", ["host", "job", "none"]),
        ("--container-network j", ["job"]),
        ("--container-unshare=net,u", ["net,uts"]),
        ("--container-unshare=", ["net", "ipc", "uts"]),
        ("--container-rdma=", ["auto", "none"]),
        ("--container-cgroup=d", ["delegate"]),
        ("--container-limit=memory=1G,cp", ["memory=1G,cpu=", "memory=1G,cpuset="]),
        ("--container-profile=m", ["mine"]),
        ("--container-image=", ["docker://debian:12", "docker://alpine:3"]),
        ("--container-image=docker://debian:", ["12"]),
        ("--container-image=/images/x", []),
        ("--container-workdir=/x", []),
    ],
)
def test_bash_completes_values(typed: str, offered: list[str], no_slurm: dict[str, str]) -> None:
    assert complete("srun", typed, script=SRUN, **no_slurm) == offered


def test_networks_are_those_of_the_site(no_slurm: dict[str, str]) -> None:
    found = complete("srun", "--container-network=", script=SRUN, OFFERED="job, none", **no_slurm)
    assert found == ["job", "none"]


def test_slurms_own_completion_goes_on(tmp_path: Path) -> None:
    """It is what the first file of another directory says, and answers for all that is not ours."""
    for folder, text in (("first", SRUN.read_text()), ("second", "_of_slurm() { COMPREPLY=(--partition= --mem=); }\n")):
        place = tmp_path / folder / "bash-completion/completions"
        place.mkdir(parents=True)
        (place / "srun").write_text(text + ("complete -o nospace -F _of_slurm srun\n" if folder == "second" else ""))
    env = {"XDG_DATA_DIRS": f"{tmp_path}/first:{tmp_path}/second"}
    assert complete("srun", "--p", script=SRUN, **env) == ["--partition="]
    assert complete("srun", "x", script=SRUN, **env) == ["--partition=", "--mem="]
    assert complete("srun", "--container-wr", script=SRUN, **env) == ["--container-writable"]
    assert complete("srun", "--container-network=n", script=SRUN, **env) == ["none"]


@pytest.mark.parametrize(
    ("typed", "made"),
    [
        ("srun --container-net", "<--container-network=>"),
        ("srun --container-network=jo", "<--container-network=job>"),
        ("srun --container-image=docker://debian", "<--container-image=docker://debian:12>"),
        ("srun --container-mounts=/etc/hostna", "<--container-mounts=/etc/hostname>"),
        ("sbatch --container-wr", "<--container-writable>"),
    ],
)
def test_a_person_presses_tab(typed: str, made: str, tmp_path: Path) -> None:
    """Readline of an interactive bash, on a terminal."""
    (tmp_path / "rc").write_text(f"PS1='ready'\n{ENCLOS}\nsource {SRUN}\nsrun() {{ printf '<%s>' \"$@\"; echo; }}\n"
                                 "sbatch() { srun \"$@\"; }\n")  # fmt: skip
    child, terminal = pty.fork()
    if child == 0:
        env = {"PATH": os.environ["PATH"], "TERM": "dumb", "INPUTRC": "/dev/null", "XDG_DATA_DIRS": str(tmp_path)}
        os.execvpe("bash", ["bash", "--noprofile", "--rcfile", str(tmp_path / "rc"), "-i"], env)
    try:
        _read_until(terminal, "ready")
        os.write(terminal, f"{typed}\t\n".encode())
        assert made in _read_until(terminal, "ready")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


def _read_until(fd: int, words: str) -> str:
    text = ""
    while words not in text and select.select([fd], [], [], 20)[0]:
        text += os.read(fd, 65536).decode()
    return text


@pytest.mark.skipif(shutil.which("zsh") is None, reason="no zsh here")
def test_zsh_reads_the_completion() -> None:
    subprocess.run(["zsh", "-n", str(ZSH)], check=True)
    stand_ins = "compadd() { print -r -- $2: ${(P)2}; }; _files() { :; }"
    script = f"{ENCLOS}\n{stand_ins}\nsource {ZSH} 2>/dev/null; _enclos_images; _enclos_profiles; _enclos_jobs"
    done = subprocess.run(["zsh", "-f", "-c", script], capture_output=True, text=True, check=False)
    assert "docker://debian:12 docker://alpine:3" in done.stdout and "mine" in done.stdout and "42.0" in done.stdout
    assert "'--container-network[--container-network]:job|host|none:(host job none)'" in ZSH.read_text()


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
