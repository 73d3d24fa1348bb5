from pathlib import Path

from r1jax.doctor.findings import is_bad
from r1jax.doctor.machine import (
    GIB,
    available_memory,
    check_machine,
    judge_memory,
    judge_open_files,
    judge_shared_memory,
)


def test_this_machine_is_good_enough_for_its_tests():
    findings = check_machine()
    assert [finding.check for finding in findings] == ["processors", "memory", "shared memory", "open files"]
    assert not is_bad(findings)


def test_memory_is_what_the_control_group_leaves(tmp_path: Path):
    meminfo = tmp_path / "meminfo"
    assert available_memory(meminfo, tmp_path) is None
    meminfo.write_text("MemTotal:  16777216 kB\nMemAvailable:   8388608 kB\nHugePages_Total: 0\n")
    assert available_memory(meminfo, tmp_path) == 8 * GIB
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text(f"{GIB}\n")
    assert available_memory(meminfo, tmp_path) == 8 * GIB
    (tmp_path / "memory.max").write_text(f"{3 * GIB}\n")
    assert available_memory(meminfo, tmp_path) == 2 * GIB


def test_verdicts():
    assert [judge_memory(size).verdict for size in (GIB - 1, 2 * GIB, 4 * GIB, None)] == ["bad", "warn", "ok", "ok"]
    # Docker gives 64 MiB
    assert [judge_shared_memory(size).verdict for size in (None, 64 * 2**20, GIB)] == ["warn", "warn", "ok"]
    assert [judge_open_files(soft, 4096).verdict for soft in (64, 256, 1024, -1)] == ["bad", "warn", "ok", "ok"]
