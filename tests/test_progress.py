from r1jax import progress


def test_a_report_keeps_the_step_until_another_is_given():
    progress.report("update", 3)
    first = progress.here()
    progress.report("checkpoint")
    second = progress.here()
    assert (first.phase, first.step) == ("update", 3) and (second.phase, second.step) == ("checkpoint", 3)
    assert second.since >= first.since


def test_a_run_begins_without_the_steps_of_another():
    progress.report("update", 3)
    progress.begin()
    assert (progress.here().phase, progress.here().step) == ("start", None)
