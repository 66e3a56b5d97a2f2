"""Loop devices: read-only, gone with their last user, and never one that another process took."""

import errno
import multiprocessing
import os
import subprocess
import time
from pathlib import Path

import pytest
from enclos.runtime import linux

pytestmark = [pytest.mark.kernel, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/file").write_text("of the image")
    target = tmp_path / "image.sqsh"
    command = ["mksquashfs", str(tmp_path / "tree"), str(target), "-all-root", "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return target


def attach(path: Path) -> tuple[int, str]:
    file_fd = os.open(path, os.O_RDONLY)
    try:
        return linux.loop_attach(file_fd, path.name)
    finally:
        os.close(file_fd)


def wait_until_free(device: str, path: Path) -> bool:
    deadline = time.monotonic() + 5
    while linux.loop_backing_file(device) == str(path) and time.monotonic() < deadline:
        time.sleep(0.01)
    return linux.loop_backing_file(device) != str(path)


def test_device_lives_as_long_as_its_mount(image: Path) -> None:
    loop_fd, device = attach(image)
    assert linux.loop_backing_file(device) == str(image)
    assert Path("/sys/block", Path(device).name, "ro").read_text() == "1\n"
    mount_fd = linux.mount_filesystem("squashfs", [("source", device), ("ro", None)])
    os.close(loop_fd)
    assert os.fdopen(os.open("file", os.O_RDONLY, dir_fd=mount_fd)).read() == "of the image"
    assert linux.loop_backing_file(device) == str(image)
    os.close(mount_fd)
    assert wait_until_free(device, image)


def test_device_without_mount_ends_with_its_descriptor(image: Path) -> None:
    loop_fd, device = attach(image)
    os.close(loop_fd)
    assert wait_until_free(device, image)


def test_second_mount_shares_the_first_ones_file_system(image: Path) -> None:
    loop_fd, device = attach(image)
    mounts = [linux.mount_filesystem("squashfs", [("source", device), ("ro", None)]) for _ in range(2)]
    assert len({os.fstat(fd).st_dev for fd in mounts}) == 1
    for fd in [loop_fd, *mounts]:
        os.close(fd)


def test_not_a_file() -> None:
    directory_fd = os.open("/", os.O_RDONLY)
    with pytest.raises(OSError, match="/dev/loop") as caught:
        linux.loop_attach(directory_fd, "x")
    assert caught.value.errno == errno.EINVAL
    os.close(directory_fd)


def _attach_many(path: str, start: "multiprocessing.synchronize.Barrier") -> list[str]:
    start.wait(10)
    held = [attach(Path(path)) for _ in range(4)]
    names = [device for _, device in held]
    start.wait(10)
    for fd, _ in held:
        os.close(fd)
    return names


def test_processes_that_race_get_different_devices(image: Path) -> None:
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager, context.Pool(4) as pool:
        start = manager.Barrier(4)
        results = pool.starmap_async(_attach_many, [(str(image), start)] * 4).get(30)
    devices = [device for names in results for device in names]
    assert len(set(devices)) == 16
    for device in devices:
        assert wait_until_free(device, image)
