"""One training at a time in a work directory, also on a file system that several hosts share.

The lock is a file that exists while its owner trains. It is created exclusively, which is safe
where flock is not, and names host, process and the process's start. An owner on this host is dead
when its process is, so that a killed run goes on at once. Of one elsewhere only the heartbeat is
seen, the file's time of change: it is taken for dead after a minute of silence, of which a part is
watched here, whatever the clocks say.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pathlib
import socket
import subprocess
import threading
import time
import uuid
from typing import Any

from stca_jax.errors import UserError

NAME = "training.lock"
HEARTBEAT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
_log = logging.getLogger(__name__)


class WorkdirLock:
    """Held while a training writes into a directory; a context."""

    def __init__(self, workdir: pathlib.Path):
        """Nothing is locked yet."""
        self._path = workdir / NAME
        self._owner = {
            **_this_machine(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "id": uuid.uuid4().hex,
        }
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> WorkdirLock:
        """Takes the lock, breaking that of a dead owner.

        Raises:
          UserError: another process trains here; names host, process and since when.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create():
            found = _read(self._path)
            if found is None:
                continue  # it was released meanwhile
            if _is_alive(self._path, found):
                raise UserError(
                    f"{self._path.parent} is in use: process {found.get('pid')} on "
                    f"{found.get('host')} trains into it since {found.get('since')}. Wait for it, "
                    f"stop it, or use another --workdir. ({self._path} says so; if no training "
                    "runs, remove that file)"
                )
            self._break(found)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Releases it."""
        self._ended.set()
        self._thread.join()
        if self._is_mine():
            self._path.unlink(missing_ok=True)

    def check(self) -> None:
        """Call before something is written that another training would overwrite.

        Raises:
          UserError: another training took the lock, as this process did not answer for long.
        """
        if not self._is_mine():
            raise UserError(
                f"{self._path} is no longer of this process: another training took over "
                f"{self._path.parent} while this one was silent. It goes on from the latest "
                "checkpoint; nothing more is written here"
            )

    def _is_mine(self) -> bool:
        return (_read(self._path) or {}).get("id") == self._owner["id"]

    def _create(self) -> bool:
        try:
            file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(file, "w") as text:
            json.dump(self._owner, text)
            text.flush()
            os.fsync(text.fileno())
        return True

    def _break(self, dead: dict[str, Any]) -> None:
        """Moves the file away; of several processes that try, one succeeds."""
        aside = self._path.with_name(f".{NAME}.{uuid.uuid4().hex}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        if _read(aside) == dead:
            _log.warning(
                "process %s on %s ended without releasing %s: taking over",
                dead.get("pid"), dead.get("host"), self._path.parent,
            )  # fmt: skip
            aside.unlink()
        else:  # another process was quicker, and this is its lock
            os.rename(aside, self._path)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def _is_alive(path: pathlib.Path, owner: dict[str, Any]) -> bool:
    machine = _this_machine()
    if owner and machine.items() <= owner.items():
        return owner["process_start"] == _process_start(owner["pid"])
    # Elsewhere, or a file that is just being written.
    started, first = time.monotonic(), _changed(path)
    told = False
    while first is not None and (now := _changed(path)) is not None:
        if now != first:
            return True
        watched = time.monotonic() - started
        silent = max(_clock_of(path.parent) - now, watched)
        if watched >= 3 * HEARTBEAT_SECONDS and silent >= SILENCE_SECONDS:
            return False
        if not told:
            _log.info("%s is locked by %s: seeing if it is alive", path.parent, owner.get("host"))
            told = True
        time.sleep(HEARTBEAT_SECONDS / 10)
    return False


def _read(path: pathlib.Path) -> dict[str, Any] | None:
    """The owner; {} if the file is not whole, None if there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _changed(path: pathlib.Path) -> float | None:
    """Time of the last heartbeat; opening the file makes a network file system look."""
    try:
        with path.open() as file:
            return os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:
        return None


def _clock_of(directory: pathlib.Path) -> float:
    """The file system's time."""
    probe = directory / f".{NAME}.{uuid.uuid4().hex}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _this_machine() -> dict[str, str]:
    """Where a process id means the same process: a host since its start, and a container in it."""
    boot, namespace = "", ""
    with contextlib.suppress(OSError):
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def _process_start(pid: int) -> str | None:
    """Tells a process from another that got its id later; None if it has ended."""
    if os.path.exists("/proc/self/stat"):
        try:
            # The name, in brackets, may hold blanks and brackets itself.
            fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if fields[0] in "ZX" else fields[19]
    shown = subprocess.run(
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return shown.stdout.strip() or None
