"""Where a conversion ends, except at DeepSpeed: a Hugging Face model, a run's checkpoint or an adapter."""

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path

from r1jax.checkpoints.generation import read_generation_config
from r1jax.checkpoints.hf_export import export
from r1jax.checkpoints.orbax import FOLDER, Checkpoints
from r1jax.checkpoints.peft_export import export_adapter
from r1jax.convert.model import Model
from r1jax.convert.tokenizer_files import tokenizer_in
from r1jax.training.deepspeed import DEEPSPEED


def to_orbax(target: Path, model: Model) -> str:
    """Writes a checkpoint that a run resumes from: the whole state where the source has one."""
    tokenizer = tokenizer_in(model.files) if DEEPSPEED in model.metadata else None
    step = model.metadata.get("step", 0)
    name = str(model.files.absolute()) if model.files else None
    metadata = {"hf_config": model.hf_config, "model_name_or_path": name, **model.metadata}
    with _whole_or_absent(target / FOLDER):
        files = tokenizer.content() if tokenizer else None
        with contextlib.closing(Checkpoints(target / FOLDER, model_files=files)) as checkpoints:
            checkpoints.save(step, dict(model.state), metadata)
    held = (
        "float32 parameters, Adam's moments" if "optimizer" in model.state else "float32 parameters, no optimizer state"
    )
    return f"{target / FOLDER / str(step)} ({held})"


@contextlib.contextmanager
def _whole_or_absent(folder: Path) -> Generator[None]:
    """Within it the folder is filled; it goes again where that fails."""
    was_there, done = folder.exists(), False
    try:
        yield
        done = True
    finally:
        if not (was_there or done):
            shutil.rmtree(folder, ignore_errors=True)


def to_hf(target: Path, model: Model, dtype: str | None) -> str:
    """Writes a model as a run exports it."""
    tokenizer = tokenizer_in(model.files)
    written = export(
        target,
        model.params,
        config=model.config,
        hf_config=model.hf_config,
        tokenizer=tokenizer,
        generation_config=read_generation_config(model.files) if model.files else None,
        dtype=dtype or model.dtype,
        card=model.card,
    )
    left_out = "" if tokenizer else "; no tokenizer found, so none is there: --model_name_or_path gives one"
    return f"{target} ({written}{left_out})"


def to_peft(target: Path, model: Model) -> str:
    """Writes the adapter of a run's checkpoint as PEFT does."""
    assert model.lora is not None, "refused"
    export_adapter(
        target,
        model.params,
        config=model.config,
        hf_config=model.hf_config,
        lora=model.lora,
        base_model=model.card.get("base_model", ""),
        tokenizer=tokenizer_in(model.files),
        generation_config=read_generation_config(model.files) if model.files else None,
        card=model.card,
    )
    return f"{target} (adapter of {model.card.get('base_model')})"
