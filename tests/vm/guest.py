"""One guest: start qemu, wait for its end, hand back what it left; end it when it hangs. Runs as root."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from vm.initramfs import build
from vm.kernels import Kernel

QEMU = "qemu-system-x86_64"
START = Path(__file__).with_name("start.sh")
HUNG = 124
# Booted it is after 4 s, on a busy machine after 40. One of some hundred stopped before its kernel said anything.
BOOT_SECONDS = 180.0
SILENT = "did not boot"
# The old kernel stands for those that lack something: there a controller, too.
OPTIONS = {"6.1": ["cgroup_disable=hugetlb"]}
CONSOLE_LINES = 60
# 2^0 ns for each instruction; while it waits, for the host too, time goes on as the host's.
COUNTING = "shift=0,sleep=on"


class FolderInUse(RuntimeError):
    """Another guest has the folder; the text says which, and what to do."""


@dataclass(slots=True)
class Guest:
    """A virtual machine that runs one command and ends. `folder` is /vm inside: what is left there is the result."""

    kernel: Kernel
    folder: Path
    memory_mb: int = 4096
    cpus: int = 2
    variables: dict[str, str] = field(default_factory=dict)
    # Pairs of network interfaces, each pair joined by a cable: unlike veth, they outlive a namespace that dies.
    cables: int = 0
    # Its clock counts instructions while it runs any: what else the host does changes no figure.
    counting: bool = False

    def run(self, command: str, timeout: float, *, show: bool = True) -> int:
        """Run a shell script in the guest and return its exit status; HUNG when the guest had to be ended.

        The console (the script's output with it) is in `folder`/console, the kernel's messages in `folder`/dmesg.

        Args:
            show: print the console as it comes; without it, its end only where the guest hung.
        """
        self._prepare(command)
        if (what := self._boot(timeout, show)) == SILENT:
            print(f"vm: the guest ({self.kernel.release}) {what}; starting it once more")
            self._prepare(command)
            what = self._boot(timeout, show)
        return self._hung(what) if what else self._status()

    def _boot(self, timeout: float, show: bool) -> str:
        """Start it and copy its console until it ends; "", or why it was ended."""
        qemu = subprocess.Popen(self._qemu("stdio"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        late: list[str] = []

        def end(what: str) -> None:
            if what != SILENT or not (self.folder / "booted").exists():
                late.append(what)
                qemu.kill()

        limits = ((timeout, f"was ended after {timeout:.0f} s"), (BOOT_SECONDS, SILENT))
        timers = [threading.Timer(seconds, end, [what]) for seconds, what in limits]
        for timer in timers:
            timer.daemon = True
            timer.start()
        assert qemu.stdout is not None
        with qemu, (self.folder / "console").open("wb") as console:
            while chunk := os.read(qemu.stdout.fileno(), 65536):
                console.write(chunk)
                console.flush()
                if show:
                    sys.stdout.buffer.write(chunk)
                    sys.stdout.flush()
        for timer in timers:
            timer.cancel()
        return late[0] if late else ""

    def shell(self, directory: Path) -> int:
        """Give the terminal to a shell in the guest, in a directory, until that ends."""
        self._prepare(f"cd '{directory}'; exec setsid -c bash -i")
        subprocess.run(self._qemu("mon:stdio"), check=False)
        return self._status()

    def _hung(self, what: str) -> int:
        print(f"vm: the guest ({self.kernel.release}) {what}; the end of its console:")
        try:
            text = (self.folder / "console").read_text(errors="replace")
        except FileNotFoundError:
            text = ""
        print("\n".join(text.splitlines()[-CONSOLE_LINES:]))
        return HUNG

    def _prepare(self, command: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("status", "dmesg", "console", "booted"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.copy(START, self.folder / "start")
        (self.folder / "start").chmod(0o755)
        (self.folder / "command").write_text(command + "\n")
        rows = [f"export {name}='{value}'\n" for name, value in self.variables.items()]
        (self.folder / "variables").write_text("".join(rows))
        (self.folder / "clock").write_text(str(int(time.time())))
        # The trial cluster copies /etc: thousands of small files take half a minute over 9p, one file a second.
        subprocess.run(["tar", "-C", "/etc", "-cf", self.folder / "etc.tar", "."], check=True)

    def _status(self) -> int:
        try:
            return int((self.folder / "status").read_text())
        except (FileNotFoundError, ValueError):
            return self._hung("ended without a result")

    def _qemu(self, serial: str) -> list[str]:
        """The command line. Software emulation: it works in any machine, also a virtual one."""
        shares = {"host": Path("/"), "modules": self.kernel.modules, "result": self.folder}
        command = [
            # A guest whose maker was killed would go on for as long as it likes.
            "setpriv", "--pdeathsig", "KILL",
            QEMU, "-nodefaults", "-no-reboot", "-display", "none",
            "-machine", "q35", "-cpu", "max,la57=off,pmu=off",
            "-accel", f"tcg,thread={'single' if self.counting else 'multi'},tb-size=512",
            *(["-icount", COUNTING] if self.counting else []),
            "-smp", str(self.cpus), "-m", str(self.memory_mb), "-device", "virtio-rng-pci", "-serial", serial,
            "-kernel", str(self.kernel.image), "-initrd", str(build(self.kernel)),
            "-append", " ".join(["console=ttyS0 panic=-1 mitigations=off nokaslr loglevel=3 random.trust_cpu=on",
                                 *OPTIONS.get(self.kernel.name, ())]),
        ]  # fmt: skip
        for tag, path in shares.items():
            readonly = "" if tag == "result" else ",readonly=on"
            options = f"local,id={tag},path={path},security_model=none,multidevs=remap{readonly}"
            command += ["-fsdev", options, "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
        for number in range(2 * self.cables):
            command += ["-netdev", f"hubport,id=end{number},hubid={number // 2}"]
            command += ["-device", f"virtio-net-pci,netdev=end{number},mac=52:54:00:00:00:{number:02x},romfile="]
        return command


def scratch(name: str) -> Path:
    """A folder for a guest's results, empty but for `cache`: which tests failed the last time. It is this process' own.

    Raises:
        FolderInUse: another process has it.
    """
    folder = Path(os.environ.get("ENCLOS_VM_RESULTS", "build/vm")).absolute() / name
    folder.mkdir(parents=True, exist_ok=True)
    # Stays open, and locked, until the process ends; qemu does not get it.
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise FolderInUse(f"another guest has {folder}; ENCLOS_VM_RESULTS=FOLDER gives this one a place") from None
    for path in folder.iterdir():
        if path.name == "cache":
            continue
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder
