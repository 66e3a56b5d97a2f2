"""`enclos image VERB`: the stores of images, one's own and the site's.

Runs as whoever types the command: a user fills his own store, root the site's. Holds the command line alone; what is
done is images/pulling.py's and images/filestore.py's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from enclos.runtime import config, errors
from enclos.runtime.cli import common, progress
from enclos.runtime.images import reference, sif, squashfs, stores
from enclos.runtime.images.filestore import FileStore, StoredImage, checksum
from enclos.runtime.images.layout import hex_of
from enclos.runtime.images.reference import BadReference, Reference
from enclos.runtime.images.stores import Places
from enclos.runtime.settings import Config

DAY = 86400
NAMED = "its name, or eight or more digits of its digest"
HEAD = ("NAME", "DIGEST", "SIZE", "AGE", "STORE")


def run(arguments: list[str]) -> int:
    """Do what one of the verbs says."""
    given = _parser().parse_args(arguments)
    settings = config.load().config
    work = Work(settings, stores.places(settings, os.geteuid()), given)
    try:
        run_verb: Callable[[Work], int] = given.run
        return run_verb(work)
    except errors.EnclosError as error:
        if given.run is not _resolve:  # srun itself uses that one.
            without_option(error)
        raise
    except OSError as error:
        raise errors.store_unusable(work.places.own or str(error.filename), error.errno or 0) from error


def without_option(error: errors.EnclosError) -> errors.EnclosError:
    """An error that was worded for srun, where an image is an option's value; here it is an argument."""
    error.subject = error.subject.removeprefix("--container-image=")
    return error


@dataclass(frozen=True, slots=True)
class Work:
    """What every verb needs."""

    config: Config
    places: Places
    given: argparse.Namespace

    def own(self) -> FileStore:
        """The store that the caller may fill."""
        if not self.places.own:
            raise errors.no_own_store()
        return FileStore(self.places.own)

    def all(self) -> list[tuple[str, FileStore]]:
        """The stores in which an image is looked for, in that order."""
        return [(kind, FileStore(path)) for kind, path in self.places.search()]

    def reference(self, text: str) -> Reference:
        try:
            return reference.parse(text, self.config.imports.default_registry)
        except BadReference as error:
            raise errors.bad_image_reference(text, str(error)) from error

    def find(self, text: str, places: list[tuple[str, FileStore]]) -> tuple[str, FileStore, StoredImage]:
        """An image by its name or its digest, which may be cut as long as it is unambiguous."""
        begun: dict[str, tuple[str, FileStore, StoredImage]] = {}
        for kind, store in places:
            for image in store.images():
                if text in image.names or image.digest == text:
                    return kind, store, image
                if _begins(image.digest, text):
                    begun.setdefault(image.digest, (kind, store, image))
        if len(begun) > 1:
            matches = [" ".join([digest, *image.names[:1]]) for digest, (_, _, image) in sorted(begun.items())]
            raise errors.image_ambiguous(text, matches)
        for found in begun.values():
            return found
        try:
            name = self.reference(text).canonical()
        except errors.EnclosError:
            name = ""
        for kind, store in places:
            if name and (named := store.find(store.digest_of(name))) is not None:
                return kind, store, named
        raise errors.image_not_in_store(text, [store.directory for _, store in places])

    def stored_digest(self, name: str) -> str:
        """What a step gets for that name from the stores, "" if it is in none."""
        for _, store in self.all():
            # One that cannot be read is passed over, as on a node.
            with contextlib.suppress(OSError, ValueError):
                digest = store.digest_of(name)
                if digest and store.find(digest) is not None:
                    return digest
        return ""


def _begins(digest: str, text: str) -> bool:
    digits = text.removeprefix("sha256:")
    return len(digits) >= 8 and digest.removeprefix("sha256:").startswith(digits)


def _parser() -> common.Parser:
    parser = common.Parser(prog="enclos image", description="Images: your own store, and the site's (root fills it).")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=common.Parser)

    def verb(name: str, run_verb: Callable[[Work], int], text: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run_verb)
        common.add_json(added)
        return added

    pull = verb("pull", _pull, "bring images from a registry into your store")
    pull.add_argument("image", nargs="*", help="as docker://REGISTRY/NAME:TAG")
    pull.add_argument("--job", default="", metavar="JOBID", help="those that a job of yours will ask for")
    pull.add_argument("--authfile", default="", metavar="FILE", help="credentials, as skopeo has them")
    verb("ls", _ls, "list the images of your store and the site's")
    verb("inspect", _inspect, "show what is known of an image").add_argument("image", help=NAMED)
    verb("rm", _rm, "remove images from your store").add_argument("image", nargs="+", help=NAMED)
    collect = verb("gc", _gc, "remove images without a name, and what interrupted pulls left")
    collect.add_argument("--unused", type=_days, default=-1, metavar="DAYS", help="and images not used for so long")
    export = verb("export", _export, "write an image to a squashfs file")
    export.add_argument("image", help=NAMED)
    export.add_argument("file", help="the file; one that is there is left alone")
    bring = verb("import", _import, "take a squashfs or SIF file, or an archive, into your store under a name")
    bring.add_argument("file", help="a file, or oci:DIR, oci-archive:FILE, docker-archive:FILE, dir:DIR")
    bring.add_argument("name", help="as docker://REGISTRY/NAME:TAG; NAME:TAG where the site has a default registry")
    resolve = verb("resolve", _resolve, "show the digest that a step would run: of the stores, else of the registry")
    resolve.add_argument("image", help="as docker://REGISTRY/NAME:TAG")
    resolve.add_argument("--registry", action="store_true", help="ask the registry in any case")
    resolve.add_argument("--authfile", default="", metavar="FILE", help="credentials, as skopeo has them")
    return parser


def _days(text: str) -> int:
    """A number of days for argparse, which would take a negative one."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("it is a number of days, 0 or more")
    return int(text)


def _auth_file(work: Work) -> str:
    """The file of --authfile: where credentials usually are, missing ones are none; here they are a mistake."""
    path: str = work.given.authfile
    if not path:
        return ""
    try:
        with open(path, "rb") as file:
            if not isinstance(json.load(file), dict):
                raise errors.auth_file_unusable(path, "it is no auth.json")
    except OSError as error:
        raise errors.auth_file_unusable(path, errors.reason(error.errno or 0)) from error
    except (ValueError, RecursionError) as error:
        raise errors.auth_file_unusable(path, "it is no auth.json") from error
    return os.path.abspath(path)


# -- filling ---------------------------------------------------------------------------------------------------


def _pull(work: Work) -> int:
    from enclos.runtime.images.pulling import Puller

    wanted = [work.reference(text) for text in work.given.image]
    for one in wanted:
        if not one.is_registry:
            raise errors.bad_image_reference(one.text, "only images of registries can be pulled")
    wanted += _of_job(work) if work.given.job else []
    if not wanted and not work.given.job:
        raise errors.usage("image pull", "name an image, or a job with --job")
    auth_file = _auth_file(work)
    store = work.own()
    store.make()
    done = []
    for one in wanted:
        try:
            with progress.shown(one.text, store) as show:
                begin = time.monotonic()
                image, new = Puller(work.config, show, auth_file).pull(store, one)
                words = f"pulled in {time.monotonic() - begin:.1f} s" if new else "is here already"
                show.end(f"{one.canonical()} {words}: {image.digest}, {size(image.bytes)}")
            done.append(_as_json("own", store, image) | {"new": new})
        except errors.EnclosError as error:  # The others are wanted all the same.
            common.report(without_option(error))
    if work.given.json:
        common.print_json(done)
    return 0 if len(done) == len(wanted) else 1


def _of_job(work: Work) -> list[Reference]:
    """The images of registries that a job names; what else it names is said, and is no error: its steps find it."""
    from enclos.runtime.cli import jobimages

    found = []
    for text in jobimages.of_job(work.given.job):
        if "$" in text or "`" in text:
            common.say(f"{text}: not fetched: what it stands for is known when the job runs")
            continue
        try:
            one = reference.parse(text, work.config.imports.default_registry)
        except BadReference as error:
            common.say(f"{text}: not fetched: {error}")
            continue
        if one.is_registry:
            found.append(one)
        else:
            common.say(f"{text}: not fetched: it is no image of a registry")
    return found


def _import(work: Work) -> int:
    name = work.reference(work.given.name)
    if not name.is_registry:
        raise errors.bad_image_reference(work.given.name, "it must be a name, as docker://REGISTRY/NAME:TAG")
    if work.given.file.startswith(tuple(f"{kind}:" for kind in reference.LOCAL_KINDS)):
        return _import_archive(work, name.canonical())
    return _import_file(work, name.canonical())


def _import_archive(work: Work, name: str) -> int:
    from enclos.runtime.images.pulling import Puller

    store, archive = work.own(), work.reference(work.given.file)
    store.make()
    with progress.shown(archive.text, store) as show:
        image, _ = Puller(work.config, show).pull(store, archive, name)
        show.end(f"{name}: {image.digest}, {size(image.bytes)}")
    return _say(work, "", _as_json("own", store, image))


def _import_file(work: Work, name: str) -> int:
    store, path = work.own(), work.given.file
    with contextlib.ExitStack() as stack:
        try:
            source = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise errors.image_file_unusable(path, error.errno or 0) from error
        _check_kind(source.fileno(), path)
        store.make()
        digest = f"sha256:{checksum(path)}"
        with store.working(digest, lambda: None):
            image = store.find(digest)
            if image is None:
                # Without a name until it is whole: of one that is killed nothing is left.
                with open(store.work.part_file(), "wb") as copy:
                    try:
                        shutil.copyfileobj(source, copy, 1 << 20)
                        copy.flush()
                        store.work.keep_part(copy.fileno(), hex_of(digest))
                    except BaseException:
                        store.work.drop_part(copy.fileno())
                        raise
                image = store.add(digest, f"file:{os.path.abspath(path)}", store.work.part_path(hex_of(digest)), "")
        store.name(name, digest)
    return _say(work, f"{name}: {digest}, {size(image.bytes)}", _as_json("own", store, image))


def _check_kind(fd: int, path: str) -> None:
    try:
        extent = sif.find_root(fd, os.uname().machine) if sif.is_sif(fd) else sif.Extent()
        squashfs.check_superblock(fd, extent.offset, extent.size)
    except sif.BadSif as error:
        raise errors.image_sif_unusable(path, str(error)) from error
    except squashfs.NotSquashfs as error:
        raise errors.not_squashfs(path) from error
    except squashfs.Truncated as error:
        raise errors.image_truncated(path, error.wanted_bytes, error.file_bytes) from error


# -- looking ---------------------------------------------------------------------------------------------------


def _ls(work: Work) -> int:
    found = [(kind, store, image) for kind, store in work.all() for image in store.images()]
    if work.given.json:
        common.print_json([_as_json(*one) for one in found])
        return 0
    lines = [
        (name, image.digest[7:19], size(image.bytes), age(time.time() - image.created), kind)
        for kind, _, image in found
        for name in image.names or ("-",)
    ]
    print(common.table(HEAD, lines))
    return 0


def _inspect(work: Work) -> int:
    kind, store, image = work.find(work.given.image, work.all())
    shown = _as_json(kind, store, image)
    if work.given.json:
        common.print_json(shown)
        return 0
    for key, value in shown.items():
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
        print(f"{key}: {errors.printable(text)}")
    return 0


def _resolve(work: Work) -> int:
    from enclos.runtime.images.pulling import Puller

    wanted = work.reference(work.given.image)
    if not wanted.is_registry:
        raise errors.bad_image_reference(wanted.text, "only images of registries have a digest there")
    auth_file = _auth_file(work)
    digest = "" if work.given.registry else work.stored_digest(wanted.canonical())
    digest = digest or Puller(work.config, lambda text: None, auth_file).resolve(wanted)
    return _say(work, wanted.pinned(digest).canonical(), {"image": wanted.canonical(), "digest": digest})


def _export(work: Work) -> int:
    _, store, image = work.find(work.given.image, work.all())
    target = work.given.file
    with open(store.image_path(image.digest), "rb") as source:
        try:
            with open(target, "xb") as copy, contextlib.ExitStack() as undo:
                undo.callback(os.unlink, target)
                shutil.copyfileobj(source, copy, 1 << 20)
                copy.flush()
                undo.pop_all()
        except OSError as error:
            raise errors.image_file_unusable(target, error.errno or 0) from error
    return _say(work, f"{target}: {size(image.bytes)}", {"file": os.path.abspath(target), "digest": image.digest})


# -- removing --------------------------------------------------------------------------------------------------


def _rm(work: Work) -> int:
    store = work.own()
    removed = []
    for text in work.given.image:
        _, _, image = work.find(text, [("own", store)])
        store.remove(image.digest)
        removed.append(image.digest)
    return _say(work, "\n".join(f"removed {digest}" for digest in removed), removed)


def _gc(work: Work) -> int:
    unused = work.given.unused
    removed = work.own().collect(unused * DAY if unused >= 0 else -1)
    return _say(work, "\n".join(f"removed {name}" for name in removed), removed)


# -- printing --------------------------------------------------------------------------------------------------


def _say(work: Work, text: str, value: object) -> int:
    if work.given.json:
        common.print_json(value)
    elif text:
        print(errors.printable(text) if "\n" not in text else text)
    sys.stdout.flush()
    return 0


def _as_json(kind: str, store: FileStore, image: StoredImage) -> dict[str, object]:
    try:
        configuration = json.loads(image.config or "{}")
    except ValueError:
        configuration = {}
    return {
        "names": list(store.names_of(image.digest)),
        "digest": image.digest,
        "source": image.source,
        "bytes": image.bytes,
        "sha256": image.sha256,
        "created": image.created,
        "store": kind,
        "path": store.image_path(image.digest),
        "config": configuration,
    }


def size(count: float) -> str:
    """Bytes as a person reads them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def age(seconds: float) -> str:
    """How long ago, in its largest unit."""
    for unit, length in (("d", DAY), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"
