"""The rules for variables: what an image may set, and which interface variables are taken away."""

import pytest
from enclos.runtime import environment
from enclos.runtime.environment import from_image, parse_etc_environment, unset_interfaces


def test_lines() -> None:
    data = b"""# comment
A=1
export B=two words
C="quoted # not a comment"
D='single'
E=a=b
F=
G="open
1BAD=x
no separator
 H=indented
I=\xff
"""
    assert parse_etc_environment(data) == [
        ("A", "1"),
        ("B", "two words"),
        ("C", "quoted # not a comment"),
        ("D", "single"),
        ("E", "a=b"),
        ("F", ""),
        ("G", '"open'),
        ("H", "indented"),
        ("I", "\udcff"),
    ]


def test_a_nul_never_passes() -> None:
    assert parse_etc_environment(b"A=1\0status=ok\nB=2\n") == [("B", "2")]


def test_limits() -> None:
    many = parse_etc_environment(b"".join(b"V%d=x\n" % number for number in range(5000)))
    assert len(many) == environment.MOST_VARIABLES
    large = parse_etc_environment(b"A=" + b"x" * 40000 + b"\nB=" + b"y" * 40000 + b"\n")
    assert [name for name, _ in large] == ["A"]


@pytest.mark.parametrize(
    "name", ["SLURM_JOB_ID", "SLURMD_NODENAME", "PMI_FD", "PMI2_X", "PMIX_RANK", "ENCLOS_X", "HOME", "USER"]
)
def test_protected(name: str) -> None:
    assert from_image([(name, "x")], []) == []


def test_image_wins_except_for_kept_names_and_the_last_of_a_name_counts() -> None:
    image = [("PATH", "/first"), ("LANG", "C"), ("PATH", "/opt/bin"), ("KEEP", "x")]
    assert from_image(image, ["KEEP"]) == [("PATH", "/opt/bin"), ("LANG", "C")]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_SOCKET_IFNAME", "encl"),
        ("NCCL_SOCKET_IFNAME", "ib,enclos"),
        ("NCCL_SOCKET_IFNAME", "=enclos0"),
        ("NCCL_SOCKET_IFNAME", "^ib"),
        ("NCCL_SOCKET_IFNAME", "enclos0:5555"),
        ("GLOO_SOCKET_IFNAME", "enclos0"),
        ("GLOO_SOCKET_IFNAME", ""),
        ("UCX_NET_DEVICES", "all"),
        ("UCX_NET_DEVICES", "mlx5_1:1,eth0"),
        ("OMPI_MCA_btl_tcp_if_include", "10.77.0.0/16"),
        ("OMPI_MCA_btl_tcp_if_include", "eth0,lo"),
        ("FI_TCP_IFACE", "enclos0"),
    ],
)
def test_what_is_there_stays(name: str, value: str) -> None:
    assert unset_interfaces({name: value}, ["lo", "enclos0"], ["10.77.0.3"], ["mlx5_1"]).names == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_SOCKET_IFNAME", "ib"),
        ("NCCL_SOCKET_IFNAME", "=enclos"),
        ("NCCL_SOCKET_IFNAME", "=eth0,enclos"),
        ("GLOO_SOCKET_IFNAME", "enclos"),
        ("UCX_NET_DEVICES", "mlx5_0:1"),
        ("OMPI_MCA_btl_tcp_if_include", "192.168.0.0/16"),
        ("OMPI_MCA_btl_tcp_if_include", "eth0/nonsense"),
        ("FI_TCP_IFACE", "ib0"),
    ],
)
def test_what_is_not_there_goes(name: str, value: str) -> None:
    assert unset_interfaces({name: value}, ["lo", "enclos0"], ["10.77.0.3"], ["mlx5_1"]).names == (name,)


def test_one_notice_for_all() -> None:
    variables = {"NCCL_SOCKET_IFNAME": "ib0", "FI_TCP_IFACE": "lo", "GLOO_SOCKET_IFNAME": "eth0"}
    unset = unset_interfaces(variables, ["lo", "enclos0"])
    assert unset.names == ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    assert unset.notice == (
        "unset NCCL_SOCKET_IFNAME=ib0, GLOO_SOCKET_IFNAME=eth0: "
        "no such interface in the container's network (it has enclos0, lo)"
    )
    assert unset_interfaces({}, ["lo"]) == environment.Unset()
