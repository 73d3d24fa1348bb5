"""What has been accepted comes back to the last bit, and nothing else passes for it."""

import dataclasses
import resource

import numpy as np
import pytest

from r1jax.config.errors import RunFailure
from r1jax.rollout.journal import Entry, Journal, Label
from r1jax.rollout.vllm_requests import Sample

NOW, EARLIER = Label(4, "00000000aaaaaaaa"), Label(3, "00000000bbbbbbbb")
TINY = np.finfo(np.float32)


def entry(request: str = "r0", label: Label = NOW, logprobs=(-0.1, -2.5), **changes) -> Entry:
    sample = Sample(
        token_ids=np.arange(3, 3 + len(logprobs), dtype=np.int32),
        logprobs=np.array(logprobs, np.float32),
        finish_reason="stop",
        version=label.version,
    )
    sample = dataclasses.replace(sample, **changes)
    return Entry(prompt_id=7, number=2, request=request, label=label, sample=sample)


def test_a_sample_comes_back_to_the_last_bit(tmp_path):
    """The numbers nearest to 0 and to one another, denormal ones, the largest, and a 0 with a sign."""
    awkward = [-TINY.smallest_subnormal, -TINY.tiny, TINY.min, -0.0, 0.0, -1 / 3, np.nextafter(np.float32(-1), 0)]
    written = entry(logprobs=awkward, finish_reason="length")
    Journal(tmp_path / "journal").append(5, [written])
    found = Journal(tmp_path / "journal").taken(5, {NOW})
    assert found.keys() == {"r0"}
    one, other = found["r0"], written.sample
    assert (one.finish_reason, one.version) == ("length", 4)
    for name in ("token_ids", "logprobs"):
        array, wanted = getattr(one, name), getattr(other, name)
        assert array.dtype == wanted.dtype and array.tobytes() == wanted.tobytes()


def test_many_bits_come_back(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, dtype=np.uint32).view(np.float32)
    finite = bits[np.isfinite(bits)]
    journal = Journal(tmp_path)
    journal.append(0, [entry(logprobs=finite.tolist())])
    assert journal.taken(0, {NOW})["r0"].logprobs.tobytes() == finite.tobytes()


def test_generations_and_appends_stand_side_by_side(tmp_path):
    journal = Journal(tmp_path)
    journal.append(5, [entry("a"), entry("b")])
    journal.append(5, [entry("c")])
    journal.append(55, [entry("d")])
    assert journal.taken(5, {NOW}).keys() == {"a", "b", "c"} and journal.taken(55, {NOW}).keys() == {"d"}
    assert journal.taken(6, {NOW}) == {}


def test_samples_of_other_weights_are_not_taken_unless_vouched_for(tmp_path):
    """The same update with other bits, and the same bits by another update, are other weights too."""
    strangers = [EARLIER, Label(NOW.version, EARLIER.weights), Label(EARLIER.version, NOW.weights)]
    Journal(tmp_path).append(1, [entry(f"r{n}", label) for n, label in enumerate([NOW, *strangers])])
    assert Journal(tmp_path).taken(1, {NOW}).keys() == {"r0"}
    both = Journal(tmp_path, vouched=EARLIER).taken(1, {NOW})
    assert {request: sample.version for request, sample in both.items()} == {"r0": 4, "r1": 3}


@pytest.mark.parametrize("rest", [1, 30, -2, -1])
def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path, rest, caplog):
    """Killed in the middle of a write; -1 leaves a whole line without its end."""
    journal = Journal(tmp_path)
    journal.append(5, [entry("a")])
    path = tmp_path / "5-0.jsonl"
    whole = path.read_bytes()
    cut = whole[: len(whole) + rest] if rest < 0 else whole[:rest]
    path.write_bytes(whole + cut.replace(b'"a"', b'"b"'))
    journal.append(5, [entry("c")])
    assert Journal(tmp_path).taken(5, {NOW}).keys() == ({"a", "b", "c"} if rest == -1 else {"a", "c"})
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["journal: a line of 5-0.jsonl was cut off; its sample is drawn again"] * (rest != -1)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"[3, 4]", b"[3]"),
        (b"[3, 4]", b"[3, 1099511627776]"),
        (b'"request"', b'"reques"'),
        (b"{", b"[{"),
        (b'"', b"\xff"),
        (b"{", bytes(512) + b"{"),  # blocks that a crash of the machine left empty
    ],
)
def test_a_line_that_is_damaged_is_drawn_again(tmp_path, old, new):
    journal = Journal(tmp_path)
    journal.append(5, [entry("a")])
    path = tmp_path / "5-0.jsonl"
    damaged = path.read_bytes().replace(old, new, 1)
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    journal.append(5, [entry("c")])
    assert journal.taken(5, {NOW}).keys() == {"c"}


def test_what_other_processes_have_written_is_read(tmp_path):
    """A run may go on with other processes, which share the prompts otherwise."""
    for process in range(3):
        Journal(tmp_path, process).append(5, [entry(f"r{process}")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5-0.jsonl", "5-1.jsonl", "5-2.jsonl"]
    assert Journal(tmp_path, 9).taken(5, {NOW}).keys() == {"r0", "r1", "r2"}


def test_old_generations_are_removed(tmp_path):
    journal = Journal(tmp_path / "journal")
    for generation in (8, 9, 10, 100):
        for process in (0, 1):
            Journal(tmp_path / "journal", process).append(generation, [entry()])
    (tmp_path / "journal" / "notes.jsonl").write_text("somebody's\n")
    journal.discard_before(10)
    left = {path.name for path in (tmp_path / "journal").iterdir()}
    assert left == {"10-0.jsonl", "10-1.jsonl", "100-0.jsonl", "100-1.jsonl", "notes.jsonl"}
    journal.discard()
    assert not (tmp_path / "journal").exists()


def test_a_folder_that_nobody_has_made_yet_holds_nothing(tmp_path):
    journal = Journal(tmp_path / "journal")
    assert journal.taken(0, {NOW}) == {}
    journal.discard_before(3)
    journal.discard()
    assert not (tmp_path / "journal").exists()


def test_a_disk_that_takes_no_more_is_one_line_and_the_rest_stays(tmp_path):
    journal = Journal(tmp_path)
    journal.append(5, [entry("a")])
    size = (tmp_path / "5-0.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(RunFailure) as failed:
            journal.append(5, [entry("b")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = f"output_dir: need a disk that takes {tmp_path}/5-0.jsonl, got an error (File too large); make room"
    assert str(failed.value).startswith(line)
    journal.append(5, [entry("c")])
    assert journal.taken(5, {NOW}).keys() == {"a", "c"}
