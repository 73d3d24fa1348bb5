"""TensorBoard event files under output_dir/runs."""

import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c
from tensorboardX.summary import scalar

from r1jax.config.folders import writing
from r1jax.trackers.tracker import Metrics, chart_name

_HEADER, _CHECKSUM = 12, 4
"""Bytes of a TFRecord before its data (length, the length's checksum) and behind it."""


class TensorBoard:
    """Scalars, one event file for every start of the run.

    Written here and not by SummaryWriter, whose queue a kill empties: the steps up to a checkpoint would be lost.
    """

    def __init__(self, directory: Path, start_step: int):
        """Cuts what earlier starts logged after start_step; at 0 all of it."""
        # The name that TensorBoard looks for; two starts within one second have different processes.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.from{start_step}"
        self._path = directory / name
        with writing("output_dir", self._path):
            directory.mkdir(parents=True, exist_ok=True)
            for path in sorted(directory.glob("*tfevents*")):
                truncate_events(path, start_step)
            self._file = self._path.open("ab")
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            if start_step:
                # For a TensorBoard that has read the later steps already: it forgets them.
                begins = SessionLog(status=SessionLog.START)
                self._write(Event(wall_time=time.time(), step=start_step + 1, session_log=begins))

    def log(self, step: int, metrics: Metrics) -> None:
        with writing("output_dir", self._path):
            for name, value in metrics.items():
                self._write(Event(wall_time=time.time(), step=step, summary=scalar(chart_name(name), float(value))))
            self._file.flush()

    def close(self) -> None:
        with writing("output_dir", self._path):
            self._file.close()

    def _write(self, event: Event) -> None:
        data = event.SerializeToString()
        size = struct.pack("<Q", len(data))
        self._file.write(size + _checksum(size) + data + _checksum(data))


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))


def truncate_events(path: Path, start_step: int) -> None:
    """Nothing; keeps a file's events of steps <= start_step, removes the file at 0.

    The file is replaced in one move. A last record that a crash cut off goes too.
    """
    if start_step == 0 or path.name.endswith(".tmp"):
        path.unlink()
        return
    kept = [record for record in records(path.read_bytes()) if _step(record) <= start_step]
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    os.replace(temporary, path)


def records(data: bytes) -> Iterator[bytes]:
    """The whole records of an event file."""
    while len(data) >= _HEADER:
        end = _HEADER + struct.unpack("<Q", data[:8])[0] + _CHECKSUM
        if end > len(data):
            return
        yield data[:end]
        data = data[end:]


def _step(record: bytes) -> int:
    return Event.FromString(record[_HEADER:-_CHECKSUM]).step
