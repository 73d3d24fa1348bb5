"""What runs in DeepSpeed's environment: `torch.distributed.run engine.py PLAN`, where PLAN lists what to do.

It knows nothing of r1jax. A state is written as arrays by name (`state.npz`: kind/parameter) and `state.json`.
"""

import gc
import importlib
import json
import os
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)

# By name: it is not installed where types are checked.
deepspeed = importlib.import_module("deepspeed")
gathered = importlib.import_module("deepspeed.utils")

NUM_SEQUENCES, NUM_TOKENS, VOCABULARY = 12, 16, 127
# Those that the tokenizer of the tests has, which r1jax holds tokens against.
WORDS = 64
STEPS = 3
SETTINGS = {
    "train_batch_size": NUM_SEQUENCES,
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "steps_per_print": 10**9,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {"warmup_min_lr": 2e-3, "warmup_max_lr": 1e-2, "warmup_num_steps": 2, "total_num_steps": 20},
}


def make_model(*, tied: bool, seed: int) -> Qwen2ForCausalLM:
    """Sizes that no number of ranks divides, so that there is padding everywhere."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=30,
            intermediate_size=49,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            use_cache=False,
        )
    )


def make_engine(case: dict[str, Any], seed: int) -> Any:
    model = make_model(tied=case["tied"], seed=seed)
    if case["dtype"] == "bf16":
        model = model.bfloat16()
    for name in case.get("frozen", ()):
        model.get_parameter(name).requires_grad_(False)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if (p.ndim > 1) == decayed], "weight_decay": 0.1 if decayed else 0.0}
        for decayed in (True, False)
    ]
    zero = {"stage": case["stage"]} | ({"sub_group_size": case["sub_group_size"]} if "sub_group_size" in case else {})
    zero |= case.get("zero", {})
    config = SETTINGS | {
        "zero_optimization": zero,
        "bf16": {"enabled": case["dtype"] == "bf16"},
        **({} if case.get("client_scheduler") else {"scheduler": SCHEDULER}),
        "checkpoint": {"load_universal": bool(case.get("universal"))},
        **case.get("settings", {}),
    }
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    client = partial(cosine, num_steps=case["client_scheduler"]) if case.get("client_scheduler") else None
    return deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=client, config=config)[0]


def cosine(optimizer: torch.optim.Optimizer, num_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """What the Trainer below makes of its arguments."""
    return get_cosine_schedule_with_warmup(optimizer, 2, num_steps)


def run_steps(engine: Any, start: int) -> tuple[list[float], list[float]]:
    """The mean loss of all ranks before each of the next steps, and the learning rate of that step."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    share, losses, rates = NUM_SEQUENCES // num_ranks, [], []
    for step in range(start, start + STEPS):
        generator = torch.Generator().manual_seed(1000 + step % 2)
        tokens = torch.randint(3, VOCABULARY, (NUM_SEQUENCES, NUM_TOKENS), generator=generator)
        own = tokens[rank * share : (rank + 1) * share]
        loss = engine(input_ids=own, labels=own).loss
        engine.backward(loss)
        rates.append(engine.optimizer.param_groups[0]["lr"])
        engine.step()
        total = torch.tensor([loss.item()], dtype=torch.float64)
        torch.distributed.all_reduce(total)
        losses.append(total.item() / num_ranks)
    return losses, rates


def state_of(engine: Any) -> dict[str, np.ndarray]:
    """Every parameter's weights and moments, gathered by DeepSpeed's own functions."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # DeepSpeed 0.19.8 links the moments when the first group has been updated, before the others have theirs.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            found[f"fp32/{name}"] = _whole(parameter)
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            whole = (
                gathered.safe_get_full_fp32_param(parameter)
                if kind == "fp32"
                else gathered.safe_get_full_optimizer_state(parameter, kind)
            )
            found[f"{kind}/{name}"] = whole.detach().float().numpy().reshape(shape).copy()
    return found


def _whole(parameter: torch.nn.Parameter) -> np.ndarray:
    """A frozen parameter, which stage 3 keeps in parts."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().float().numpy().copy()
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().float().numpy().copy()


def groups_of(engine: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in g.items() if key != "params"} for g in engine.optimizer.param_groups]


def write_results(folder: Path, arrays: dict[str, np.ndarray], results: dict[str, Any]) -> None:
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "state.npz", allow_pickle=False, **arrays)
        (folder / "state.json").write_text(json.dumps(results))
    torch.distributed.barrier()


def train(case: dict[str, Any]) -> None:
    """Trains from nothing, saves a checkpoint, and goes on: the losses to be met again."""
    engine, folder = make_engine(case, seed=0), Path(case["folder"])
    run_steps(engine, 0)
    engine.save_checkpoint(str(folder / "checkpoint"))
    arrays = state_of(engine)
    results = {
        "names": [list(shapes) for shapes in engine._get_zero_param_shapes()],
        "groups": groups_of(engine),
        "scheduler": engine.lr_scheduler.state_dict(),
        "config": json.loads(json.dumps(engine.config)),
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
    }
    results["losses"], results["rates"] = run_steps(engine, STEPS)
    write_results(folder, arrays, results)
    engine.destroy()


def resume(case: dict[str, Any]) -> None:
    """Loads a checkpoint into an engine that was made from other numbers, and goes on."""
    engine = make_engine(case, seed=12345)
    path, _ = engine.load_checkpoint(case["load"])
    assert path is not None
    arrays = state_of(engine)
    results = {"groups": groups_of(engine), "global_steps": engine.global_steps, "skipped": engine.skipped_steps}
    results["global_samples"] = engine.global_samples
    results["losses"], results["rates"] = run_steps(engine, engine.global_steps)
    write_results(Path(case["folder"]), arrays, results)
    engine.destroy()


def weights_of_script(case: dict[str, Any]) -> None:
    """What DeepSpeed's zero_to_fp32.py makes of a checkpoint."""
    folder = Path(case["folder"])
    _run_script("deepspeed.utils.zero_to_fp32", case["load"], str(folder / "made"))
    made = torch.load(folder / "made" / "pytorch_model.bin", weights_only=True)
    write_results(folder, {f"fp32/{name}": tensor.numpy() for name, tensor in made.items()}, {})


def universal_of_script(case: dict[str, Any]) -> None:
    """What DeepSpeed's ds_to_universal.py makes of a checkpoint."""
    folder, load = Path(case["folder"]), Path(case["load"])
    tag = (load / "latest").read_text()
    options = ["--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"]
    made = folder / "made"
    _run_script(
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        str(load / tag),
        "--output_folder",
        str(made),
        *options,
    )
    arrays = {}
    for path in sorted((made / "zero").glob("*/*.pt")):
        content = torch.load(path, weights_only=True)
        arrays[f"{path.stem}/{path.parent.name}"] = (content["param"] if isinstance(content, dict) else content).numpy()
    write_results(folder, arrays, {})
    shutil.rmtree(made)


def _run_script(module: str, *arguments: str) -> None:
    before, sys.argv = sys.argv, [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = before


class _Tokens(torch.utils.data.Dataset):
    def __init__(self, num_rows: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(3, WORDS, (num_rows, NUM_TOKENS), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def use_trainer(case: dict[str, Any]) -> None:
    """Hugging Face's Trainer: its steps with a save after every third, or the rest of them after a checkpoint."""
    folder = Path(case["folder"])
    config = {
        "zero_optimization": {"stage": case["stage"]},
        "bf16": {"enabled": False},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "train_batch_size": NUM_SEQUENCES,
        "train_micro_batch_size_per_gpu": NUM_SEQUENCES // int(os.environ["WORLD_SIZE"]),
        **case.get("settings", {}),
    }
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=NUM_SEQUENCES // int(os.environ["WORLD_SIZE"]),
        max_steps=case["max_steps"],
        save_steps=STEPS,
        save_strategy="steps" if case.get("load") is None else "no",
        logging_steps=1,
        learning_rate=1e-2,
        weight_decay=0.1,
        warmup_steps=2,
        lr_scheduler_type="cosine",
        adam_beta2=0.95,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        deepspeed=config,
    )
    seed = 0 if case.get("load") is None else 12345
    trainer = Trainer(
        model=make_model(tied=case["tied"], seed=seed), args=arguments, train_dataset=_Tokens(case["num_rows"])
    )
    trainer.train(resume_from_checkpoint=case.get("load"))
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    write_results(folder, {}, {"history": history, "global_step": trainer.state.global_step})


COMMANDS = {
    "train": train,
    "resume": resume,
    "weights": weights_of_script,
    "universal": universal_of_script,
    "trainer": use_trainer,
}


def main() -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        COMMANDS[case["command"]](case)
        gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
