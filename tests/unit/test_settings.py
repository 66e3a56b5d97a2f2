"""Rows of settings and options, and the files that are made from them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from enclos.runtime import config, generate
from enclos.runtime.errors import EnclosError
from enclos.runtime.options import OPTIONS
from enclos.runtime.settings import Config, rows

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = (ROOT / "conf/enclos.yaml").read_text()
UNCOMMENTED = "".join(f"{line[2:]}\n" if line.startswith("# ") else "\n" for line in EXAMPLE.splitlines())


def test_generated_files_are_fresh() -> None:
    assert generate.stale() == [], "run: python -m enclos.runtime.settings --write"


def test_a_change_is_noticed(tmp_path: Path) -> None:
    for path, text in generate.files().items():
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text)
    assert generate.stale(tmp_path) == []
    (tmp_path / "spank/options.gen.h").write_text("old")
    page = tmp_path / "docs/man/enclos.yaml.5"
    page.write_text(page.read_text().replace("kill switch", "kill switches"))
    assert generate.stale(tmp_path) == [tmp_path / "spank/options.gen.h", page]


def test_the_example_changes_nothing() -> None:
    assert config.parse(EXAMPLE.encode(), "x", {}).config == Config()


def test_the_example_without_its_comment_signs_is_the_defaults() -> None:
    loaded = config.parse(UNCOMMENTED.encode(), "x", {})
    assert loaded.config == Config()
    assert "default" not in loaded.origins.values()


def schema_errors(text: str) -> list[str]:
    schema = json.loads((ROOT / "conf/enclos.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


@pytest.mark.parametrize(
    "text", ["", EXAMPLE, UNCOMMENTED, "step:\n", "network: {port: 5000, underlay: {name: '{node}-ib'}}"]
)
def test_the_schema_takes_what_we_take(text: str) -> None:
    assert schema_errors(text) == []
    config.parse(text.encode(), "x", {})


@pytest.mark.parametrize(
    "text",
    ["a: 1", "network: {prot: 1}", "network: {port: 80}", "step: 1", "step: {networks: []}", "step: {networks: [blue]}",
     "rootfs: {tmpfs_size: 2GB}", "network: {ifname: a/b}", "devices: {nodes: [/dev/../etc]}", "enabled: maybe",
     "network: {underlay: {name: fixed}}"],
)  # fmt: skip
def test_the_schema_refuses_what_we_refuse(text: str) -> None:
    assert schema_errors(text)
    with pytest.raises(EnclosError):
        config.parse(text.encode(), "x", {})


def test_keys_environment_names_and_options_are_unique() -> None:
    keys = [row.key for row in rows()]
    variables = [row.env for row in rows()] + [o.env for o in OPTIONS if o.env] + [config.PATH_VARIABLE]
    names = [o.name for o in OPTIONS]
    for found in (keys, variables, names):
        assert len(set(found)) == len(found)


def test_options_are_all_there() -> None:
    names = {o.name.replace("container-", "") for o in OPTIONS}
    assert names == {
        "image", "mounts", "profile", "workdir", "name", "save", "writable", "readonly", "remap-root", "no-remap-root",
        "mount-home", "no-mount-home", "entrypoint", "no-entrypoint", "entrypoint-log", "slurm", "no-slurm", "env",
        "device", "rdma", "unshare", "limit", "cgroup", "network",
    }  # fmt: skip


def test_option_rows() -> None:
    for o in OPTIONS:
        assert bool(o.arginfo) != bool(o.fixed), o.name
        assert o.usage.startswith("[enclos] ")
        assert "\n" not in o.usage
        # srun prints "--NAME=ARGINFO" into a buffer of 81 bytes.
        assert len(f"--{o.name}={o.arginfo}") < 80


def test_each_key_of_the_wire_has_one_environment_twin() -> None:
    for key in {o.key for o in OPTIONS}:
        assert [o.env for o in OPTIONS if o.key == key and o.env] == [
            f"ENCLOS_CONTAINER_{key.upper().replace('-', '_')}"
        ]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_the_header_compiles_and_has_the_rows(tmp_path: Path) -> None:
    source = tmp_path / "t.c"
    source.write_text(
        '#include <stdio.h>\n#include "options.gen.h"\n#include "options.gen.h"\n'
        "int main(void)\n{\n\tfor (size_t i = 0; i < ENCLOS_OPTION_COUNT; i++)\n"
        '\t\tprintf("%s|%s|%d\\n", enclos_option_rows[i].name, enclos_option_rows[i].usage,\n'
        "\t\t       enclos_option_rows[i].has_arg);\n"
        "\treturn enclos_sent_variables[0] == NULL;\n}\n"
    )
    program = tmp_path / "t"
    flags = ["-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'spank'}"]
    subprocess.run(["cc", *flags, "-o", str(program), str(source)], check=True)
    lines = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [f"{o.name}|{o.usage}|{0 if o.fixed else 1}" for o in OPTIONS]


def test_command() -> None:
    command = [sys.executable, "-m", "enclos.runtime.settings"]
    done = subprocess.run([*command, "--c-header"], capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "spank/options.gen.h").read_text()
    assert subprocess.run([*command, "--check"], check=False).returncode == 0


@pytest.mark.skipif(shutil.which("man") is None or shutil.which("groff") is None, reason="needs man and groff")
@pytest.mark.parametrize("page", sorted((ROOT / "docs/man").iterdir()), ids=lambda page: page.name)
def test_manual_pages_format_without_warnings(page: Path) -> None:
    done = subprocess.run(["man", "--warnings", "-l", str(page)], capture_output=True, text=True, check=True,
                          env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin", "MANWIDTH": "100"})  # fmt: skip
    assert done.stderr == ""
    assert len(done.stdout) > 500


def test_manual_has_every_key_and_option() -> None:
    settings_page = (ROOT / "docs/man/enclos.yaml.5").read_text().replace("\\-", "-")
    options_page = (ROOT / "docs/man/enclos-srun.1").read_text().replace("\\-", "-")
    assert re.findall(r"^\\fB([a-z0-9_.]+)\\fR: ", settings_page, re.M) == [row.key for row in rows()]
    assert [o.name for o in OPTIONS] == re.findall(r"^\\fB--([a-z-]+)\\fR", options_page, re.M)
