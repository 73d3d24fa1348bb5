import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import RecordWriter

from r1jax.trackers.tensorboard import TensorBoard


def events(folder):
    """All events of a folder, file by file; a record is length (8 bytes), its crc (4), data, its crc (4)."""
    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


def scalars(folder):
    return [(e.step, v.tag, v.simple_value) for e in events(folder) for v in e.summary.value]


def test_scalars_are_written_in_groups(tmp_path):
    tracker = TensorBoard(tmp_path, start_step=0)
    tracker.log(3, {"loss": 0.5, "eval_loss": 0.25})
    tracker.close()
    assert scalars(tmp_path) == [(3, "train/loss", 0.5), (3, "eval/loss", 0.25)]


def test_a_resumed_run_cuts_later_steps_and_a_torn_record_and_keeps_the_earlier_file(tmp_path):
    tracker = TensorBoard(tmp_path, start_step=0)
    for step in (9, 10, 11):
        tracker.log(step, {"loss": step / 4})
    # Not closed: what was logged is there when the process is killed.
    (first,) = tmp_path.iterdir()
    whole = first.read_bytes()
    first.write_bytes(whole[:-5])
    tracker = TensorBoard(tmp_path, start_step=10)
    assert whole.startswith(first.read_bytes()) and scalars(tmp_path) == [
        (9, "train/loss", 2.25),
        (10, "train/loss", 2.5),
    ]
    tracker.log(11, {"loss": 0.5})
    tracker.close()
    assert [step for step, _, _ in scalars(tmp_path)] == [9, 10, 11]
    # TensorBoard drops every event of step >= 11 that it has read before this one.
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [11]


def test_a_run_that_starts_again_at_0_leaves_nothing_of_the_first(tmp_path):
    for loss in (0.5, 0.25):
        tracker = TensorBoard(tmp_path, start_step=0)
        tracker.log(1, {"loss": loss})
    assert scalars(tmp_path) == [(1, "train/loss", 0.25)]


def test_records_are_those_that_tensorboardx_reads(tmp_path):
    tracker = TensorBoard(tmp_path, start_step=0)
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    (path,) = tmp_path.iterdir()
    reference = RecordWriter(str(tmp_path / "reference"))
    for event in events(tmp_path):
        reference.write(event.SerializeToString())
    reference.close()
    assert path.read_bytes() == (tmp_path / "reference").read_bytes()
