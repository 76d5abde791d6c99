"""Answers on disk: a line for each, appended as they come, and at the end all of them in the order of their rows.

Until then they are in FILE.partial, from which an interrupted run goes on. A line counts once its line break is there.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import OneVisionError

Record = dict[str, Any]


class AnswerFile:
    """The answers of one output file, by their keys. A context manager, which holds the file for this process alone."""

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self._descriptor = self._claimed()
        try:
            if overwrite:
                self.path.unlink(missing_ok=True)
                os.ftruncate(self._descriptor, 0)
            self.records: dict[str, Record] = {r["key"]: r for r in _records(path)} | self._recovered()
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if os.fstat(self._descriptor).st_size == 0:
            self.partial.unlink(missing_ok=True)
        os.close(self._descriptor)

    def forget_errors(self) -> None:
        """Let rows that could not be answered be asked again."""
        self.records = {key: record for key, record in self.records.items() if "error" not in record}

    def append(self, record: Record) -> None:
        """Keep an answer; a key that is there already keeps its first. Raises OneVisionError on a full disk."""
        if record["key"] in self.records:
            return
        line = json.dumps(record, ensure_ascii=False).encode() + b"\n"
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        try:
            _write_all(self._descriptor, line)
        except OSError as error:
            os.ftruncate(self._descriptor, end)
            raise self._refused(error) from error
        self.records[record["key"]] = record

    def complete(self, keys: Iterable[str]) -> None:
        """Write the answers with these keys, in their order, as the output file: whole, or not at all."""
        part = self.path.with_name(f".{self.path.name}.part")
        try:
            with open(part, "wb") as file:
                for key in keys:
                    file.write(json.dumps(self.records[key], ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except OSError as error:
            raise self._refused(error) from error
        finally:
            part.unlink(missing_ok=True)  # there only where it was not renamed
        os.ftruncate(self._descriptor, 0)

    def _claimed(self) -> int:
        """The partial file, opened and locked."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OneVisionError(f"{self.partial}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OneVisionError(f"{self.partial}: another process is writing it; wait for it to end") from None
        return descriptor

    def _recovered(self) -> dict[str, Record]:
        """What an earlier run left, after cutting off a line that it did not finish."""
        data = self.partial.read_bytes()
        os.ftruncate(self._descriptor, data.rfind(b"\n") + 1)
        return {record["key"]: record for record in _records(self.partial)}

    def _refused(self, error: OSError) -> OneVisionError:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return OneVisionError(f"{self.path}: cannot be written: {error.strerror}")
        return OneVisionError(
            f"{self.path}: the disk is full; {len(self.records)} answers are kept in {self.partial.name}: free some "
            "room and run the same command to go on"
        )


def _write_all(descriptor: int, data: bytes) -> None:
    """All of it, as the end of a full disk takes a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _records(path: Path) -> list[Record]:
    """The lines of a file of ours; none where there is no file. Raises OneVisionError for another file."""
    if not path.exists():
        return []
    found = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                found.append(_record(line, f"{path}:{number}"))
    except OSError as error:
        raise OneVisionError(f"{path}: cannot be read: {error.strerror}") from error
    return found


def _record(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, Mapping) or not isinstance(record.get("key"), str):
        raise OneVisionError(f"{where}: is no answer of onevision-edge batch; choose another file, or --overwrite")
    return dict(record)
