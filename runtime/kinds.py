"""Kinds of values that a setting may have: check one, describe it, give its JSON schema.

Each check returns the value in its final form or raises ValueError("expected …"), which
config.py words with file and line. Must not hold: settings (settings.py). Pure.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

from enclos.runtime import limits as limit_syntax
from enclos.runtime import mounts as mount_syntax
from enclos.runtime.errors import EnclosError


class Kind:
    """What a setting may be: checks a value that YAML gave, and describes itself."""

    plain_text = False
    """An environment variable's text is the value itself, not YAML."""

    def check(self, value: object) -> object:
        """Return the value in its final form, or raise ValueError("expected …")."""
        raise ValueError("expected nothing")

    def describe(self) -> str:
        """A few words for the manual."""
        return "value"

    def schema(self) -> dict[str, Any]:
        """The JSON schema of the value."""
        return {}


class Flag(Kind):
    """true or false."""

    def check(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value

    def describe(self) -> str:
        return "true or false"

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


class Number(Kind):
    """A whole number within bounds."""

    def __init__(self, low: int, high: int) -> None:
        self.low, self.high = low, high

    def check(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not self.low <= value <= self.high:
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


class Choice(Kind):
    """One of a few words."""

    plain_text = True

    def __init__(self, *words: str) -> None:
        self.words = words

    def check(self, value: object) -> str:
        if value not in self.words:
            raise ValueError(f"expected {self.describe()}")
        return str(value)

    def describe(self) -> str:
        return f"{', '.join(self.words[:-1])} or {self.words[-1]}"

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.words)}


class Text(Kind):
    """A string that matches a pattern as a whole."""

    plain_text = True

    def __init__(self, pattern: str, words: str) -> None:
        self.pattern, self.words = pattern, words

    def check(self, value: object) -> str:
        if not isinstance(value, str) or re.fullmatch(self.pattern, value) is None:
            raise ValueError(f"expected {self.words}")
        return value

    def describe(self) -> str:
        return self.words

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": f"^({self.pattern})$"}


class Size(Kind):
    """A tmpfs size as the kernel takes it: bytes, with a suffix, or a share of the memory."""

    PATTERN = r"[1-9][0-9]{0,17}[KMGTkmgt]?|([1-9][0-9]?|100)%"
    WORDS = "a size such as 512M, 2G or 50% (of the node's memory)"

    def check(self, value: object) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or re.fullmatch(self.PATTERN, value) is None:
            raise ValueError(f"expected {self.WORDS}")
        return value

    def describe(self) -> str:
        return self.WORDS

    def schema(self) -> dict[str, Any]:
        return {
            "anyOf": [{"type": "string", "pattern": f"^({self.PATTERN})$"}, {"type": "integer", "minimum": 1}]
        }


class Amount(Kind):
    """A number of bytes, with a suffix; `amount` makes a number of it."""

    PATTERN = r"[1-9][0-9]{0,17}[KMGT]?"

    def check(self, value: object) -> str:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if not isinstance(value, str) or re.fullmatch(self.PATTERN, value) is None:
            raise ValueError(f"expected {self.describe()}")
        return value

    def describe(self) -> str:
        return "a size such as 512M or 100G"

    def schema(self) -> dict[str, Any]:
        return {
            "anyOf": [{"type": "string", "pattern": f"^({self.PATTERN})$"}, {"type": "integer", "minimum": 1}]
        }


def amount(text: str) -> int:
    """The bytes of a value that Amount has checked."""
    factor = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}.get(text[-1], 1)
    return int(text.rstrip("KMGT")) * factor


class Block(Kind):
    """A block of addresses, in prefix notation without host bits."""

    plain_text = True

    def __init__(self, version: int, shortest: int, longest: int) -> None:
        self.version, self.shortest, self.longest = version, shortest, longest

    def check(self, value: object) -> str:
        try:
            if not isinstance(value, str) or "/" not in value:
                raise ValueError
            network = ipaddress.ip_network(value)
            if network.version != self.version or not self.shortest <= network.prefixlen <= self.longest:
                raise ValueError
        except ValueError:
            raise ValueError(f"expected {self.describe()}") from None
        return str(network)

    def describe(self) -> str:
        return f"an IPv{self.version} block, its prefix between /{self.shortest} and /{self.longest}"

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": "^[0-9a-fA-F.:]+/[0-9]+$"}


class Several(Kind):
    """A list of values of one kind, none of them twice."""

    LIMIT = 256

    def __init__(self, item: Kind, least: int = 0) -> None:
        self.item, self.least = item, least

    def check(self, value: object) -> tuple[object, ...]:
        if not isinstance(value, list):
            raise ValueError("expected a list, for example [a, b]")
        if not self.least <= len(value) <= self.LIMIT:
            raise ValueError(f"expected {self.least} to {self.LIMIT} items")
        items = tuple(self.item.check(item) for item in value)
        if len(set(items)) != len(items):
            raise ValueError("expected each item once")
        return items

    def describe(self) -> str:
        return f"a list; each item: {self.item.describe()}"

    def schema(self) -> dict[str, Any]:
        return {
            "type": "array",
            "items": self.item.schema(),
            "minItems": self.least,
            "maxItems": self.LIMIT,
            "uniqueItems": True,
        }


class SiteMount(Kind):
    """One mount in the syntax of --container-mounts; its source is absolute."""

    def check(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"expected {self.describe()}")
        try:
            mount_syntax.parse(value)
        except EnclosError as error:
            raise ValueError(error.what) from error
        return value

    def describe(self) -> str:
        return '"SRC[:DST[:FLAG[+FLAG]]]", as in --container-mounts'

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1}


class SiteLimit(Kind):
    """Limits in the syntax of --container-limit, for everybody, a partition or an account."""

    def check(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError(f"expected {self.describe()}")
        try:
            limit_syntax.parse_site(value)
        except limit_syntax.BadLimit as error:
            raise ValueError(str(error)) from error
        return value

    def describe(self) -> str:
        return '"LIMITS", "partition:NAME LIMITS" or "account:NAME LIMITS", as in --container-limit'

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1}
