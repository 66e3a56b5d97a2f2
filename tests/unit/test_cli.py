"""`enclos`: verbs, their output, and errors in one line."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from enclos.runtime import protocol
from enclos.runtime.cli import client, common, ps
from enclos.runtime.cli.main import VERBS, main
from enclos.runtime.errors import EnclosError

ENCLOS = [sys.executable, "-m", "enclos.runtime.cli.main"]
# Output stays in a buffer until the end, as at users'; some machines' environment says otherwise.
os.environ.pop("PYTHONUNBUFFERED", None)


@contextmanager
def agent(path: Path, *replies: dict[str, str] | None) -> Iterator[list[dict[str, list[str]]]]:
    """A real socket that answers one request per reply; None closes without an answer."""
    requests: list[dict[str, list[str]]] = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for reply in replies:
                connection, _ = listener.accept()
                with connection:
                    message = protocol.receive(connection)
                    assert message is not None
                    requests.append(dict(message.values))
                    if reply is not None:
                        protocol.send(connection, reply.items())

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield requests
        thread.join(5)


CONTAINERS = [
    {
        "job": 7,
        "step": 0,
        "uid": 0,
        "network": "job",
        "state": "running",
        "ipv4": "10.77.0.2",
        "tasks": 2,
        "devices": ["nvidia.com/gpu=0", "nvidia.com/gpu=1"],
        "started": 1000.0,
        "image": "/i",
    },
    {"job": 8, "step": 4294967291, "uid": 4000000000, "network": "host", "ipv4": "", "image": "/new\nline"},
]


def test_ps_prints_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    monkeypatch.setattr(client.ask, "__defaults__", (str(path),))
    with agent(path, {"status": "ok", "json": json.dumps(CONTAINERS)}) as requests:
        assert main(["ps"]) == 0
    assert requests == [{"version": ["1"], "verb": ["ps"]}]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == list(ps.HEAD)
    assert re.fullmatch(r"7\.0 +root +running +job +10\.77\.0\.2 +2 +[0-9-]+:[0-9:]+ +nvidia.com/gpu=0,1 +/i", lines[1])
    assert re.fullmatch(r"8\.batch +4000000000 +- +host +- +- +- +- +/new\\nline", lines[2])
    assert len(lines) == 3


def test_ps_shows_which_image_a_tag_was() -> None:
    container = {"job": 1, "step": 0, "image": "docker://r.site/a:t", "digest": f"sha256:{'ab' * 32}"}
    assert ps.line(container, 0)[-1] == "docker://r.site/a:t@sha256:abababababab"


def test_ps_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s"
    monkeypatch.setattr(client.ask, "__defaults__", (str(path),))
    with agent(path, {"status": "ok", "json": json.dumps(CONTAINERS)}):
        assert main(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == CONTAINERS


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"status": "error", "text": "no such verb", "hint": "update it"}, "no such verb"),
        ({"status": "ok", "json": "{"}, "its JSON cannot be read"),
        (None, "without an answer"),
    ],
)
def test_client_errors(tmp_path: Path, reply: dict[str, str] | None, words: str) -> None:
    with agent(tmp_path / "s", reply), pytest.raises(EnclosError) as caught:
        client.ask("ps", str(tmp_path / "s"))
    assert words in caught.value.line()
    assert caught.value.hint


def test_agent_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EnclosError, match=r"agent is not running .*no such file"):
        client.ask("ps", str(tmp_path / "s"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(tmp_path / "dead"))
    with pytest.raises(EnclosError, match=r"agent is not running .*connection refused"):
        client.ask("ps", str(tmp_path / "dead"))


def test_agent_that_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "ANSWER_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(EnclosError, match="agent does not answer"):
            client.ask("ps", str(tmp_path / "s"))


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0:00"), (61, "1:01"), (3600, "1:00:00"), (90061, "1-01:01:01")])
def test_duration(seconds: float, text: str) -> None:
    assert ps.duration(seconds) == text


def test_table_pads_and_escapes() -> None:
    assert common.table(("A", "BB"), [("xyz", "1"), ("\x1b[2J", "2")]) == "A        BB\nxyz      1\n\\x1b[2J  2"


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environ}
    return subprocess.run([*ENCLOS, *arguments], capture_output=True, text=True, check=False, env=environment)


@pytest.mark.parametrize("arguments", [["--help"], ["ps", "--help"], ["check", "--help"], ["config", "--help"]])
def test_help(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: enclos")
    assert done.stderr == ""


def test_main_help_has_every_verb() -> None:
    assert set(re.findall(r"^  ([a-z]+)  ", run("--help").stdout, re.M)) == set(VERBS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["bla"], "enclos: no such verb: bla"),
        (["ps", "--all"], "enclos: ps: unrecognized arguments: --all"),
        (["config"], "enclos: config: the following arguments are required: show|validate"),
    ],
)
def test_usage_errors_are_one_line_and_a_hint(arguments: list[str], line: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0] == line
    assert done.stderr.splitlines()[1].startswith("hint: 'enclos")
    assert len(done.stderr.splitlines()) == 2


def test_config_show(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("network:\n  port: 5000\n")
    done = run("config", "show", ENCLOS_CONFIG=str(file), ENCLOS_LOG_LEVEL="debug")
    assert done.returncode == 0
    cells = {line.split()[0]: line.split(None, 1)[1] for line in done.stdout.splitlines()[2:]}
    assert cells["network.port"].split() == ["5000", f"{file}:2"]
    assert cells["log.level"].split() == ["debug", "environment", "(ENCLOS_LOG_LEVEL)"]
    assert cells["enabled"].split() == ["true", "default"]
    found = json.loads(run("config", "show", "--json", "--file", str(file)).stdout)
    assert found["settings"]["network.port"] == {"value": 5000, "origin": f"{file}:2"}
    assert found["file"] == str(file)


def test_config_validate(tmp_path: Path) -> None:
    file = tmp_path / "e.yaml"
    file.write_text("netwrok: {}\n")
    done = run("config", "validate", str(file))
    assert done.returncode == 1
    assert done.stderr == f"enclos: {file}:1: unknown key 'netwrok'\nhint: did you mean 'network'?\n"
    file.write_text("")
    done = run("config", "validate", str(file))
    assert (done.returncode, done.stdout) == (0, f"{file}: ok\n")
    assert run("config", "validate", str(tmp_path / "none")).returncode == 1
    assert run("config", "validate", ENCLOS_CONFIG=str(tmp_path / "none")).returncode == 0


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    assert "Traceback" not in run("config", "validate", str(tmp_path / "none")).stderr
    assert "Traceback" in run("--debug", "config", "validate", str(tmp_path / "none")).stderr


@pytest.mark.parametrize("words", [["--help"], ["config", "--help"], ["config", "show"], ["--version"]])
def test_a_reader_that_goes_away_is_no_traceback(words: list[str]) -> None:
    with subprocess.Popen([*ENCLOS, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        running.stdout.close()
        _, messages = running.communicate(timeout=60)
    assert (running.returncode, messages) == (1, "")


@pytest.mark.parametrize("words", [["--help"], ["config", "show"], ["config", "show", "--json"]])
def test_a_full_disk_is_no_traceback(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*ENCLOS, *words], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "enclos: standard output: cannot be written (no space left on device)"
    assert len(done.stderr.splitlines()) == 2


def test_a_verb_imports_only_what_it_needs() -> None:
    program = (
        "import sys\nfrom enclos.runtime.cli.main import main\nmain(['--help'])\nprint(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & {"yaml", "argparse", "json", "subprocess", "socket", "dataclasses"}


def test_render_without_an_option_says_what_it_needs() -> None:
    done = run("render")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, "enclos: render: it needs --container-image as well")


def test_a_mapping_in_place_of_a_name_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    """What everybody writes first: {node} without quotes is YAML's mapping."""
    file = tmp_path / "enclos.yaml"
    file.write_text("network:\n  underlay:\n    name: {node}-ib\n")
    done = run("config", "validate", str(file))
    assert done.returncode == 1 and 'as "{node}-ib"' in done.stderr
