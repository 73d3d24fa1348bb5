"""TensorBoard event files under output_dir/runs."""

from pathlib import Path

from tensorboardX import SummaryWriter

from r1jax.trackers.tracker import Metrics, chart_name


class TensorBoard:
    """Scalars, one event file for every start of the run."""

    def __init__(self, directory: Path, start_step: int):
        """Tells TensorBoard to hide what an earlier start logged after start_step; nothing at 0 is a resume."""
        self._writer = SummaryWriter(
            str(directory),
            purge_step=start_step + 1 if start_step else None,
            # Two starts within one second would otherwise share a file name, and the second would empty the first.
            filename_suffix=f".from{start_step}",
            flush_secs=30,
        )

    def log(self, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(chart_name(name), float(value), step)

    def close(self) -> None:
        self._writer.close()
