"""What manifests and configurations may be, which come from strangers: whatever they are, an error is one of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest
from enclos.runtime import errors, protocol
from enclos.runtime.images import local, manifest
from enclos.runtime.images.local import Files, Source
from enclos.runtime.images.manifest import BadManifest, NoSuchPlatform
from enclos.runtime.images.reference import parse
from hypothesis import example, given
from hypothesis import strategies as st

DIGEST = f"sha256:{'ab' * 32}"
TEXT = st.text() | st.sampled_from([DIGEST, "linux", "amd64", "\0", "\ud800", "\x1b[2J", *manifest.INDEXES])
KEYS = st.sampled_from(
    ["schemaVersion", "mediaType", "manifests", "layers", "config", "digest", "size", "platform", "os", "architecture",
     "annotations", local.TAG, "Env", "Labels", "RepoTags", "Config", "Layers"]
)  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 3) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)
DESCRIBED = st.fixed_dictionaries(
    {"digest": st.just(DIGEST) | VALUES, "size": st.integers(0, 9) | VALUES},
    optional={"platform": VALUES, "annotations": VALUES, "mediaType": VALUES},
)
MANIFESTS = (
    VALUES
    | st.fixed_dictionaries({"mediaType": st.sampled_from(manifest.INDEXES), "manifests": VALUES})
    | st.fixed_dictionaries({"manifests": st.lists(DESCRIBED | VALUES, max_size=3)})
    | st.fixed_dictionaries(
        {"schemaVersion": st.just(2), "layers": st.lists(DESCRIBED | VALUES, max_size=3), "config": DESCRIBED | VALUES}
    )
)


def told(error: Exception) -> None:
    protocol.encode(errors.image_bad_manifest("docker://a/b:c", str(error)).fields())


@given(MANIFESTS)
@example({"manifests": [{"platform": {"os": "\0"}}, {"platform": {"os": "\ud800"}}]})
@example({"schemaVersion": 2, "layers": [{"digest": "\ud800", "size": 1}]})
@example({"mediaType": manifest.INDEXES[0], "manifests": None})
def test_no_manifest_does_more_than_fail(value: Any) -> None:  # noqa: ANN401
    try:
        found = manifest.parse(json.dumps(value).encode())
        if isinstance(found, list):
            manifest.choose(found, "x86_64")
    except (BadManifest, NoSuchPlatform) as error:
        told(error)


@given(VALUES | st.fixed_dictionaries({"config": VALUES}))
def test_no_configuration_does_more_than_fail(value: Any) -> None:  # noqa: ANN401
    try:
        protocol.encode([("text", manifest.configuration(json.dumps(value).encode()))])
    except BadManifest as error:
        told(error)


class Same(Files):
    """All files have the same content."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def find(self, name: str) -> tuple[int, Source]:
        raise BadManifest("it has no files but those that are read")

    def read(self, name: str) -> bytes:
        return self._data


@pytest.mark.parametrize("kind", sorted(local.READERS))
@given(MANIFESTS | st.lists(VALUES, max_size=2))
@example([{"RepoTags": [None]}])
def test_no_image_on_disk_does_more_than_fail(kind: str, value: Any) -> None:  # noqa: ANN401
    try:
        local.READERS[kind](Same(json.dumps(value).encode()), parse(f"{kind}:/x:t", ""))
    except (BadManifest, NoSuchPlatform) as error:
        told(error)
