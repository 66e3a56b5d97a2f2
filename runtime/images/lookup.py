"""Looks for an image of a registry in the site's and the user's store, as the user.

A task of the zygote: a shared file system may hang, and what a user wrote into his store is read with his rights. The
answer is a path, which the builder opens as the user like any other, and the text of the image's configuration.
"""

from __future__ import annotations

import errno
import os
import pwd
import socket

from enclos.runtime import errors, linux
from enclos.runtime.images import place, stores
from enclos.runtime.images.filekey import file_key
from enclos.runtime.images.filestore import FileStore
from enclos.runtime.protocol import Message, send

CONFIG_LIMIT = 65536
# There is no store, or not for this user: the next one is looked into, and nothing is said of it.
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP)


def person(channel: socket.socket, request: Message) -> int:
    """The task `person`: `uid`. Answers with `gid`, each `group` and `home`; nothing for a user whom the node lacks."""
    try:
        entry = pwd.getpwuid(request.number("uid"))
    except KeyError:
        return 1
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    send(channel, [("gid", str(entry.pw_gid)), ("home", entry.pw_dir), *(("group", str(group)) for group in groups)])
    return 0


def run(channel: socket.socket, request: Message) -> int:
    """The task `lookup`: `uid`, `gid`, each `group`, `site`, `template` (of users' stores), `name`, perhaps `digest`.

    Answers `found` with `digest`, `path` and `config`, `kind` of the store (`site` or `user`), and for the check of the
    file its `sha256` and its `key` as it is now; or `none`, perhaps with the `trouble` that a store has.
    """
    uid = request.number("uid")
    own = stores.user_directory(request.get("template"), uid)
    directories = [("site", request.get("site"), 0), ("user", own, uid)]
    groups = [int(group) for group in request.all("group")]
    linux.drop_bounding_set(0)
    linux.keep_capabilities_and_become(uid, request.number("gid"), groups, 0)
    linux.set_no_new_privileges()
    os.chdir("/")
    trouble = ""
    for kind, directory, owner in directories:
        store = FileStore(directory)
        try:
            # What another user may have put there is not what this one asked for.
            if not directory or place.stranger(directory, owner):
                continue
            digest = request.get("digest") or store.digest_of(request.get("name"))
            image = store.find(digest) if digest else None
            key = file_key(os.stat(store.image_path(digest))) if image else ""
        except OSError as error:
            if error.errno not in ABSENT:
                trouble = f"{directory}: {errors.reason(error.errno or 0)}"
            continue
        except ValueError:
            continue
        if image is not None and len(image.config) <= CONFIG_LIMIT and "\0" not in image.config:
            found = [("digest", digest), ("path", store.image_path(digest)), ("config", image.config)]
            send(channel, [("state", "found"), *found, ("kind", kind), ("sha256", image.sha256), ("key", key)])
            return 0
    send(channel, [("state", "none"), ("trouble", trouble)])
    return 0
