import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

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


def test_a_resumed_run_hides_later_steps_and_keeps_the_earlier_file(tmp_path):
    for start_step, step in ((0, 1), (10, 11)):
        tracker = TensorBoard(tmp_path, start_step)
        tracker.log(step, {"loss": 0.5})
        tracker.close()
    assert {step for step, _, _ in scalars(tmp_path)} == {1, 11}
    # TensorBoard drops every event of step >= 11 that was written before this one.
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [11]
