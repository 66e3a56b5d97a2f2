"""References to images: what each spelling means, and what is refused in which words."""

from __future__ import annotations

import pytest
from enclos.runtime.images.reference import BadReference, Reference, parse
from hypothesis import given
from hypothesis import strategies as st

HEX = "0123456789abcdef" * 4
DIGEST = f"sha256:{HEX}"

REMOTE = {
    "docker://ubuntu": ("docker.io", "library/ubuntu", "", "", ""),
    "docker://ubuntu:24.04": ("docker.io", "library/ubuntu", "24.04", "", ""),
    "docker://user/tool": ("docker.io", "user/tool", "", "", ""),
    "docker://index.docker.io/user/tool:1": ("docker.io", "user/tool", "1", "", ""),
    "docker://nvcr.io/nvidia/pytorch:24.01-py3": ("nvcr.io", "nvidia/pytorch", "24.01-py3", "", ""),
    "docker://localhost/a": ("localhost", "a", "", "", ""),
    "docker://n1:5000/a/b/c:t": ("n1:5000", "a/b/c", "t", "", ""),
    "docker://[fd00::1]:5000/a": ("[fd00::1]:5000", "a", "", "", ""),
    f"docker://n1:5000/a@{DIGEST}": ("n1:5000", "a", "", DIGEST, ""),
    f"docker://n1:5000/a:t@{DIGEST}": ("n1:5000", "a", "t", DIGEST, ""),
    "docker://$oauthtoken@nvcr.io#nvidia/cuda:12": ("nvcr.io", "nvidia/cuda", "12", "", "$oauthtoken"),
    "docker://alice@n1:5000/a:t": ("n1:5000", "a", "t", "", "alice"),
    "alice@n1:5000#a/b:t": ("n1:5000", "a/b", "t", "", "alice"),
    "nvcr.io#nvidia/cuda:12": ("nvcr.io", "nvidia/cuda", "12", "", ""),
    "registry#a": ("registry:443", "a", "", "", ""),
    "n1:5000/a:t": ("n1:5000", "a", "t", "", ""),
    "ubuntu:24.04": ("registry.site:5000", "mirror/ubuntu", "24.04", "", ""),
    f"group/tool@{DIGEST}": ("registry.site:5000", "mirror/group/tool", "", DIGEST, ""),
}


@pytest.mark.parametrize("text", REMOTE)
def test_a_name_in_a_registry(text: str) -> None:
    found = parse(text, "registry.site:5000/mirror")
    assert found.kind == "registry"
    assert (found.registry, found.name, found.tag, found.digest, found.user) == REMOTE[text]
    assert found.text == text


LOCAL = {
    "/images/a.sqsh": ("path", "/images/a.sqsh", ""),
    "./a:b@c#d": ("path", "./a:b@c#d", ""),
    "../a": ("path", "../a", ""),
    ".": ("path", ".", ""),
    "oci:layout": ("oci", "layout", ""),
    "oci:/d/layout:v1": ("oci", "/d/layout", "v1"),
    "oci-archive:/d/a.tar:v1": ("oci-archive", "/d/a.tar", "v1"),
    "oci-archive:/d:1/a.tar": ("oci-archive", "/d:1/a.tar", ""),
    "docker-archive:a.tar": ("docker-archive", "a.tar", ""),
    "docker-archive:a.tar:busybox:latest": ("docker-archive", "a.tar", "busybox:latest"),
    "dir:/d/a:b": ("dir", "/d/a:b", ""),
}


@pytest.mark.parametrize("text", LOCAL)
def test_something_on_disk(text: str) -> None:
    found = parse(text)
    assert (found.kind, found.path, found.tag) == LOCAL[text]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("/" + "a" * 4095, "longer than 4095 bytes"),
        ("docker://", "'' is no name in a registry"),
        ("docker://n1:5000/", "'' is no name in a registry"),
        ("docker://n1:5000/A", "'A' is no name in a registry"),
        ("docker://n1:5000/a/../b", "'a/../b' is no name in a registry"),
        ("docker://-x.y/a", "'-x.y' is no name of a registry"),
        ("docker://n1:5000/a:-t", "'-t' is no tag"),
        ("docker://n1:5000/a@sha256:12", "a digest is sha256: and 64 hexadecimal digits"),
        ("docker://a b@n1:5000/a", "the user before @ has characters that none has"),
        ("http://n1/a", "unknown kind of image 'http://'"),
        ("oci:", "oci: needs a path"),
        ("dir:", "dir: needs a path"),
        ("ubuntu:24.04", "it is no path, and the site has no default registry"),
        ("--help", "it is no path, and the site has no default registry"),
    ],
)
def test_what_is_refused(text: str, words: str) -> None:
    with pytest.raises(BadReference) as caught:
        parse(text)
    assert str(caught.value) == words


def test_skopeo_gets_a_digest_or_a_tag_but_no_user() -> None:
    found = parse("alice@n1:5000#a:t")
    assert found.canonical() == "docker://n1:5000/a:t"
    assert found.pinned(DIGEST).canonical() == f"docker://n1:5000/a@{DIGEST}"
    assert parse("docker://n1:5000/a").canonical() == "docker://n1:5000/a:latest"
    assert parse("oci:/d/layout:v1").canonical() == "oci:/d/layout:v1"


@given(st.text(max_size=60) | st.from_regex(r"docker://[a-z@#:./\-]{0,30}", fullmatch=True))
def test_no_text_becomes_an_option_or_leaves_its_form(text: str) -> None:
    """What goes to skopeo's command line begins with its transport and has no space or control character."""
    try:
        found = parse(text, "registry.site")
    except BadReference:
        return
    assert isinstance(found, Reference)
    if found.is_registry:
        canonical = found.canonical()
        assert canonical.startswith("docker://") and canonical.isprintable() and " " not in canonical
        assert parse(canonical).canonical() == canonical
