"""The documents: what they point at is there, and what there is they name."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from enclos.runtime import daemon
from enclos.runtime.cli.main import VERBS
from enclos.runtime.cluster.main import VERBS as CLUSTER_VERBS
from enclos.runtime.options import OPTIONS
from enclos.runtime.settings import rows

ROOT = Path(__file__).parent.parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MANUAL = sorted((ROOT / "docs/man").iterdir())
BINARY = {".png", ".sqsh", ".so"}

page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def test_the_pages_are_there() -> None:
    names = {str(path.relative_to(ROOT)) for path in PAGES}
    guides = {f"docs/{name}.md" for name in ("user-guide", "admin-guide", "design", "security", "debugging", "errors")}
    assert names >= guides | {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/protocol.md"}


def anchors(path: Path) -> set[str]:
    """The names under which a page's headings can be linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = (page.parent / name).resolve() if name else page
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{page.name}: {target}"


@page
def test_files_that_are_named_exist(page: Path) -> None:
    named = r"(?<![\w/.$-])((?:runtime|netns|spank|tests|conf|docs|benchmarks|\.ci)/[\w./-]*\w)"
    for name in re.findall(named, page.read_text()):
        assert (ROOT / name).exists(), f"{page.name}: {name}"


@page
def test_tests_that_are_named_exist(page: Path) -> None:
    every = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    names = {path.name for path in (ROOT / "tests").rglob("*.py")}
    for name in re.findall(r"\btest_\w+(?:\.py)?", page.read_text()):
        assert name in names if name.endswith(".py") else f"def {name}(" in every, f"{page.name}: {name}"


@page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    code = re.findall(r"```\n.*?```|`[^`\n]+`", page.read_text(), re.DOTALL)
    named = {name for text in code for name in re.findall(r"(?:^|`|&& )make ([a-z][a-z-]*)", text, re.MULTILINE)}
    assert named <= targets, f"{page.name}: {sorted(named - targets)}"


def test_the_readme_begins_with_its_two_commands() -> None:
    first = (ROOT / "README.md").read_text().split("```")[1]
    assert re.findall(r"^make ([a-z]+)", first, re.MULTILINE) == ["demo", "test"]


@page
def test_settings_that_are_named_exist(page: Path) -> None:
    """A dotted name in backquotes whose first part is a section is a setting, or a file of the project."""
    keys = {row.key for row in rows()}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    for name in re.findall(r"`([a-z]+(?:\.[a-z_0-9]+)+)(?::[^`]*)?`", page.read_text()):
        if name.partition(".")[0] in sections and not name.endswith((".py", ".yaml", ".md")):
            assert name in keys or any(key.startswith(f"{name}.") for key in keys), f"{page.name}: {name}"


def test_the_user_guide_names_each_option() -> None:
    guide = (ROOT / "docs/user-guide.md").read_text()
    names = [option.name for option in OPTIONS if not option.name.startswith("no-")]
    assert [name for name in names if f"--{name}" not in guide] == []


@page
def test_options_that_are_named_exist(page: Path) -> None:
    known = {option.name for option in OPTIONS}
    named = set(re.findall(r"--((?:no-)?container-[a-z-]*[a-z])", page.read_text()))
    assert named <= known, f"{page.name}: {sorted(named - known)}"


@page
def test_a_page_begins_with_something_to_paste(page: Path) -> None:
    """But for what is looked up."""
    if page.name not in {"CHANGELOG.md", "errors.md", "mpi-matrix.md", "protocol.md"}:
        assert "```" in page.read_text().split("\n## ")[0], page.name


@page
def test_headings_stand_alone(page: Path) -> None:
    """A section that was added at the end of another one without a blank line is no heading for some readers."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert re.findall(r"[^\n]\n#+ .*", re.sub(r"<!--.*?-->\n", "\n", prose)) == []
    assert re.findall(r"^(?:<{7}|={7}|>{7})(?: .*)?$", prose, re.MULTILINE) == []


@page
def test_commands_that_are_shown_exist(page: Path) -> None:
    """Verbs of enclos, of `enclos image` and of enclos-cluster, in what is there to paste."""
    code = "\n".join(re.findall(r"```.*?```", page.read_text(), re.DOTALL))
    images = set(re.findall(r"^\\fBimage (\w+)\\fR$", (ROOT / "docs/man/enclos.1").read_text(), re.MULTILINE))
    every = {"enclos": set(VERBS), "enclos image": images, "enclos-cluster": set(CLUSTER_VERBS)}
    for program, verbs in every.items():
        shown = set(re.findall(rf"(?:^|bin/|-- ){program} ([a-z-]+)\b(?![.:/])", code, re.MULTILINE))
        assert shown <= verbs, f"{page.name}: {program} {sorted(shown - verbs)}"


def test_the_readme_names_every_verb() -> None:
    text = (ROOT / "README.md").read_text()
    assert [verb for verb in VERBS if f"`{verb}`" not in text and f"`enclos {verb}`" not in text] == []


def test_the_readme_fits_a_terminal() -> None:
    prose = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert [line for line in prose.splitlines() if len(line) > 124] == []


def test_what_is_installed_is_removed() -> None:
    """Each file below the prefix is in the admin guide's commands that remove Enclos."""
    guide = (ROOT / "docs/admin-guide.md").read_text()
    removal = guide[guide.index("\n## Remove\n") :].split("```")[1]
    pages = {f"share/man/man{path.suffix[1:]}/{path.name}" for path in MANUAL}
    made = {"bin/enclos", "bin/enclosd", "bin/enclos-cluster", "lib/enclos", "lib/systemd/system/enclosd.service"}
    made.add("lib/udev/rules.d/60-enclos.rules")
    completion = {"share/bash-completion/completions/enclos", "share/zsh/site-functions/_enclos"}
    assert pages | made | completion <= set(removal.split())
    recipe = (ROOT / "Makefile").read_text().split("\ninstall:")[1].split("\n\n")[0]
    installed = set(re.findall(r"\$\(prefix\)/((?:share|lib)/[\w/.-]+)", recipe))
    slurms = "share/bash-completion/completions/"
    assert installed == {f"{slurms}enclos", slurms, "share/zsh/site-functions", "lib/udev/rules.d"}
    assert f"for f in srun sbatch salloc; do grep -l _enclos_srun {slurms}$f" in removal


def manual(name: str) -> str:
    return (ROOT / "docs/man" / name).read_text().replace("\\-", "-").replace("\\fB", "").replace("\\fR", "")


def test_the_manual_has_every_verb() -> None:
    assert [verb for verb in VERBS if f"\n{verb}" not in manual("enclos.1")] == []


def test_the_manual_has_every_option_of_the_daemon() -> None:
    options = [text for action in daemon._arguments()._actions for text in action.option_strings]
    assert [option for option in options if option.startswith("--") and option not in manual("enclosd.8")] == ["--help"]


def tracked() -> list[Path]:
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_path_of_a_developers_machine() -> None:
    """Neither the place of this checkout nor, outside of tests with their made-up users, a home directory."""
    home = re.compile(r"/home/(?!user[ab]\b)[a-z]\w*|/Users/\w+")
    for path in tracked():
        if path.suffix in BINARY:
            continue
        text = path.read_text(errors="replace")
        assert len(ROOT.parts) < 3 or f"{ROOT}/" not in text, path
        assert path.is_relative_to(ROOT / "tests") or not home.findall(text), path
