"""The rules of load_best_model_at_end, transformers' own: what is chosen among is both saved and evaluated."""

from r1jax.config.checkpoint import CheckpointConfig
from r1jax.config.errors import need, require, shown
from r1jax.config.reporting import ReportingConfig

SFT_METRICS = ("eval_loss", "eval_mean_token_accuracy", "eval_runtime")
"""What an evaluation of the sft task gives."""

# Fractions of a run are compared as whole millionths of it.
_MILLION = 1_000_000


def full_metric_name(name: str | None) -> str:
    """metric_for_best_model as metrics.jsonl has it: eval_loss for null and loss."""
    name = name or "loss"
    return name if name.startswith("eval_") else f"eval_{name}"


def greater_by_name(metric: str) -> bool:
    """Whether more of a metric is better, by its name."""
    return not metric.endswith("loss")


def check_best(checkpoint: CheckpointConfig, reporting: ReportingConfig, task: str) -> None:
    """Nothing, or the UserError where load_best_model_at_end asks for what the other keys cannot give."""
    if not checkpoint.load_best_model_at_end:
        return
    saving, evaluating = checkpoint.save_strategy, reporting.eval_strategy
    if saving != evaluating or saving == "no":
        rule = "save_strategy and eval_strategy the same, steps or epoch"
        got = f"save_strategy {saving} and eval_strategy {evaluating}"
        raise need("load_best_model_at_end", rule, got, "a checkpoint can only be chosen if it was evaluated")
    if saving == "steps":
        _check_intervals(checkpoint.save_steps, reporting.eval_steps or reporting.logging_steps)
    metric = full_metric_name(reporting.metric_for_best_model)
    if task == "sft":
        require(metric in SFT_METRICS, "metric_for_best_model", f"one of {', '.join(SFT_METRICS)}", metric, "name one")


def _check_intervals(save_steps: int | float, eval_steps: int | float) -> None:
    if isinstance(save_steps, int) and isinstance(eval_steps, int):
        fits = save_steps % eval_steps == 0
    else:
        both = isinstance(save_steps, float) and isinstance(eval_steps, float)
        fits = both and round(save_steps * _MILLION) % round(eval_steps * _MILLION) == 0
    if not fits:
        rule = f"a multiple of eval_steps ({shown(eval_steps)}), both numbers or both fractions"
        raise need("save_steps", rule, shown(save_steps), "load_best_model_at_end needs an evaluation at each save")
