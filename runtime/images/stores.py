"""Where images are looked for before a registry is asked: the site's store, then the user's.

Looks at nothing but the settings and the user's name.
"""

from __future__ import annotations

import pwd
from dataclasses import dataclass

from enclos.runtime.settings import Config


@dataclass(frozen=True, slots=True)
class Places:
    """Directories of stores, empty where there is none; `own` is the one that the caller may fill."""

    site: str
    user: str
    own: str

    def search(self) -> list[tuple[str, str]]:
        """(kind, directory) in the order in which they are looked through."""
        return [(kind, path) for kind, path in (("site", self.site), ("user", self.user)) if path]


def places(config: Config, uid: int) -> Places:
    """The stores that this user sees. Root has no store of his own but the site's."""
    site = config.images.site_store
    user = "" if uid == 0 else user_directory(config.images.user_store, uid)
    return Places(site, user, site if uid == 0 else user)


def user_directory(template: str, uid: int) -> str:
    """A user's store; "" where the site has none, or the user no name."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return ""
    return template.replace("{home}", entry.pw_dir.rstrip("/")).replace("{user}", entry.pw_name)
