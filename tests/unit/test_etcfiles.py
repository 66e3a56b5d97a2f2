"""The texts of passwd, group and hosts, with what images really contain."""

import pytest
from enclos.runtime import etcfiles

IMAGE_PASSWD = b"root:x:0:0:root:/root:/bin/bash\nubuntu:x:1000:1000:Ubuntu:/home/ubuntu:/bin/bash\n"


def test_user_comes_before_another_with_the_same_number() -> None:
    text = etcfiles.passwd(IMAGE_PASSWD, "usera", 1000, 1001, "/home/usera", "/bin/sh")
    assert text == b"usera:x:1000:1001::/home/usera:/bin/sh\n" + IMAGE_PASSWD


def test_same_name_is_replaced() -> None:
    text = etcfiles.passwd(IMAGE_PASSWD, "root", 0, 0, "/root", "/bin/sh")
    assert text == b"root:x:0:0::/root:/bin/sh\nubuntu:x:1000:1000:Ubuntu:/home/ubuntu:/bin/bash\n"


def test_image_without_passwd_or_without_last_newline() -> None:
    ours = b"u:x:5:6::/:/bin/sh\n"
    assert etcfiles.passwd(b"", "u", 5, 6, "/", "/bin/sh") == ours
    assert etcfiles.passwd(b"daemon:x:1:1\xff", "u", 5, 6, "/", "/bin/sh") == ours + b"daemon:x:1:1\xff\n"


@pytest.mark.parametrize("home", ["", "/a:0:0:x", "/a\nroot::0:0::/:/bin/sh", "/a\0"])
def test_home_cannot_bring_lines_or_fields(home: str) -> None:
    assert etcfiles.passwd(b"", "u", 5, 6, home, home) == b"u:x:5:6::/:/bin/sh\n"


@pytest.mark.parametrize("user", ["", "a:b", "a\nb", "+", "-a", "a\0"])
def test_impossible_names(user: str) -> None:
    with pytest.raises(ValueError, match="no name"):
        etcfiles.passwd(b"", user, 5, 6, "/", "/bin/sh")


def test_groups() -> None:
    image = b"root:x:0:\nusers:x:100:someone\nstaff:x:50:\n"
    text = etcfiles.group(image, [("users", 900), ("proj", 901)], "usera")
    assert text == b"users:x:900:usera\nproj:x:901:usera\nroot:x:0:\nstaff:x:50:\n"


def test_groups_without_member() -> None:
    assert etcfiles.group(b"", [("g", 7)]) == b"g:x:7:\n"


def test_hosts_keeps_a_name_on_one_address() -> None:
    node = b"127.0.0.1 localhost\n# n1 is here\n10.0.0.1 n1 n1.site login # both\n10.0.0.9 store\nfe80::1\n"
    text = etcfiles.hosts(node, ["10.77.0.1 n1", "fd00::1 n1"])
    assert text.decode().splitlines() == [
        "127.0.0.1 localhost",
        "::1 localhost ip6-localhost ip6-loopback",
        "10.77.0.1 n1",
        "fd00::1 n1",
        "10.0.0.1 n1.site login",
        "10.0.0.9 store",
    ]
