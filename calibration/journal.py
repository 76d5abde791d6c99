"""What a quantisation has finished, on disk, so that one that was killed goes on and ends with the same bytes.

A hidden directory beside the destination, locked while in use: `key.json` says what is being made of what; for each
finished stage there is a file of its values; and there are the activations that the next stage reads. A directory
with another key is swept. Files appear whole, by renaming.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OneVisionError

_STATE = "state.json"


class Journal:
    """The directory of one quantisation. Stages are finished in their order, each once."""

    def __init__(self, directory: Path, key: str) -> None:
        self.directory = directory
        self._state: dict[str, Any] = {"key": key, "finished": [], "notes": {}, "stream": None}
        found = _read(directory / _STATE)
        if found is not None and found.get("key") == key:
            self._state = found
        else:
            self._sweep()
        self.resumed = len(self._state["finished"])

    def restart_unless(self, stage: str) -> None:
        """Begin anew where a stage is not done: for work whose middle cannot be picked up."""
        if not self.finished(stage):
            self._sweep()

    def _sweep(self) -> None:
        self._state = {"key": self._state["key"], "finished": [], "notes": {}, "stream": None}
        for entry in self.directory.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def finished(self, stage: str) -> bool:
        """Whether a stage is done."""
        return stage in self._state["finished"]

    @property
    def notes(self) -> dict[str, Any]:
        """What the finished stages noted."""
        return self._state["notes"]

    def path(self, name: str) -> Path:
        """A file of the journal."""
        return self.directory / name

    def stream(self) -> np.ndarray:
        """The activations after the last finished stage: float32 [rows, width], mapped."""
        return np.load(self.path(self._state["stream"]), mmap_mode="r")

    def new_stream(self, stage: str, rows: int, width: int) -> np.memmap:
        """A file to fill with the activations after `stage`."""
        return self.new_array(_file(stage, "stream.npy"), (rows, width))

    def new_array(self, name: str, shape: tuple[int, ...]) -> np.memmap:
        """A mapped float32 file to fill. Its room is taken at once: where a page of it finds none, SIGBUS kills us."""
        array = np.lib.format.open_memmap(self.path(name), "w+", np.float32, shape)
        with open(self.path(name), "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        return array

    def finish(
        self, stage: str, values: Mapping[str, np.ndarray], notes: Mapping[str, Any], stream: np.memmap | None = None
    ) -> None:
        """Keep a stage's values and notes; `stream`, filled, is what the next one reads."""
        path = self.path(_file(stage, "npz"))
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            np.savez(file, allow_pickle=False, **values)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        old = self._state["stream"]
        state = {**self._state, "finished": [*self._state["finished"], stage], "notes": {**self.notes, **notes}}
        if stream is not None:
            stream.flush()
            state["stream"] = _file(stage, "stream.npy")
        self._save(state)
        if old is not None and state["stream"] != old:
            self.path(old).unlink(missing_ok=True)

    def values(self) -> "FinishedValues":
        """The values of all finished stages."""
        return FinishedValues([self.path(_file(stage, "npz")) for stage in self._state["finished"]])

    def _save(self, state: dict[str, Any]) -> None:
        part = self.path(_STATE + ".part")
        with open(part, "w", encoding="utf-8") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path(_STATE))
        self._state = state


class FinishedValues(Mapping[str, np.ndarray]):
    """Arrays by parameter name, read from their file when asked for."""

    def __init__(self, paths: list[Path]) -> None:
        self._places: dict[str, Path] = {}
        for path in paths:
            with np.load(path) as file:
                self._places |= dict.fromkeys(file.files, path)

    def __getitem__(self, name: str) -> np.ndarray:
        with np.load(self._places[name]) as file:
            return file[name]

    def __contains__(self, name: object) -> bool:
        return name in self._places  # Mapping's own would read the array

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


@contextmanager
def journal(destination: Path, key: Mapping[str, Any], purpose: str = "quantizing") -> Iterator[Journal]:
    """The journal of a quantisation to `destination`, removed when it ends well and kept when it does not.

    Raises OneVisionError where another process is at it, and when the disk is full.
    """
    directory = destination.parent / f".{destination.name}.{purpose}"
    lock = _claim(directory, destination)
    try:
        yield Journal(directory, _digest(key))
        shutil.rmtree(directory, ignore_errors=True)  # before the lock goes: the next one's files are not ours
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OneVisionError(
            f"{destination}: the disk is full; what was finished is kept in {directory}: free some room and run the "
            "same command to go on"
        ) from error
    finally:
        with suppress(OSError):
            directory.rmdir()  # where nothing was put into it
        os.close(lock)


def _claim(directory: Path, destination: Path) -> int:
    """The journal's directory, made where it is missing, for this process alone: its locked descriptor."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise OneVisionError(f"{destination}: cannot be written: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise OneVisionError(f"{directory}: another process is quantising to this place; wait for it to end") from None
    return lock


def _file(stage: str, suffix: str) -> str:
    return f"{stage}.{suffix}"


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
