"""The rules that the dataclasses obey, their defaults, and every refusal of a single value or combination."""

import dataclasses

import pytest

from r1jax import config
from r1jax.config import foreign, schema
from r1jax.config.display import field_notes

BASE = {"model_name_or_path": "m", "dataset_name": "d"}
MIN_LR = "cosine_with_min_lr"


def test_groups_are_small_and_each_field_is_explained():
    for name, cls in {"RunConfig": schema.RunConfig, **schema.groups()}.items():
        names = [field.name for field in dataclasses.fields(cls)]
        assert len(names) <= 15, name
        assert list(field_notes(cls)) == names, name


def test_tables_of_keys_do_not_overlap():
    ours, tables = set(schema.keys()), (foreign.FOREIGN, foreign.NOT_BUILT, foreign.RENAMED, foreign.ELSEWHERE)
    names = [name for table in tables for name in table]
    assert len(names) == len(set(names))
    assert not ours & set(names)
    assert foreign.FOREIGN_FOR_SFT.keys() <= ours
    assert schema.SFT_ONLY <= ours
    assert all(new in ours for new in foreign.RENAMED.values() if "=" not in new)


def test_defaults_are_those_of_trl_018():
    sft = config.resolve(BASE).config
    assert sft.optimizer.learning_rate == 2e-5
    assert (sft.data.max_length, sft.data.packing, sft.batch.num_train_epochs) == (1024, False, 3.0)
    assert (sft.checkpoint.save_steps, sft.reporting.logging_steps, sft.reporting.trackers) == (
        500,
        500,
        ("tensorboard",),
    )
    grpo = config.resolve(BASE | {"task": "grpo"}).config
    assert grpo.optimizer.learning_rate == 1e-6
    assert (
        grpo.grpo.reference.beta,
        grpo.objective.loss_type,
        grpo.grpo.surrogate.epsilon,
        grpo.grpo.advantages.scale_rewards,
    ) == (
        0.04,
        "bnpo",
        0.2,
        True,
    )
    sampling = grpo.sampling
    assert (sampling.num_generations, sampling.max_prompt_length, sampling.max_completion_length) == (8, 512, 256)
    assert (sampling.temperature, grpo.vllm.rollout_engine) == (1.0, "jax")
    assert grpo.rewards.reward_funcs == ("accuracy", "format", "tag_count")


REFUSALS = [
    ({"fp16": True}, "fp16: need false, got true; use bf16"),
    (
        {"mesh_context": 2},
        "mesh_context: need 1, got 2; the context axis is reserved: split over mesh_fsdp or mesh_tensor",
    ),
    ({"mesh_fsdp": 0}, "mesh_fsdp: need -1 or x >= 1, got 0; -1 takes the devices left over"),
    ({"mesh_data": -1}, "mesh_data: need x >= 1, got -1; use mesh_fsdp: -1 for the devices left over"),
    ({"mesh_tensor": 0}, "mesh_tensor: need x >= 1, got 0; 1 means no tensor parallelism"),
    ({"zero_stage": 4}, "zero_stage: need 0, 1, 2 or 3, got 4; 0 is plain data parallel, 3 shards everything"),
    ({"warmup_ratio": 5}, "warmup_ratio: need 0 <= x < 1, got 5; for a number of steps use warmup_steps"),
    ({"warmup_ratio": 1.0}, "warmup_ratio: need 0 <= x < 1, got 1; for a number of steps use warmup_steps"),
    ({"warmup_steps": -1}, "warmup_steps: need x >= 0, got -1; 0 means none"),
    ({"learning_rate": -1e-5}, "learning_rate: need x >= 0, got -1e-05; a usual value is 1e-5"),
    ({"adam_beta2": 1}, "adam_beta2: need 0 <= x < 1, got 1; usual values are 0.9 and 0.999"),
    ({"adam_epsilon": 0}, "adam_epsilon: need x > 0, got 0; a usual value is 1e-8"),
    ({"max_grad_norm": -1}, "max_grad_norm: need x >= 0, got -1; 0 means no clipping"),
    (
        {"save_steps": 1.5},
        "save_steps: need a whole number >= 1 or a fraction 0 < x < 1, got 1.5;"
        " write a number of steps such as 100, or a part of the run such as 0.1",
    ),
    (
        {"eval_steps": 1.0},
        "eval_steps: need a whole number >= 1 or a fraction 0 < x < 1, got 1.0;"
        " write a number of steps such as 100, or a part of the run such as 0.1",
    ),
    (
        {"logging_steps": 0},
        "logging_steps: need a whole number >= 1 or a fraction 0 < x < 1, got 0;"
        " write a number of steps such as 100, or a part of the run such as 0.1",
    ),
    (
        {"save_total_limit": 0},
        "save_total_limit: need x >= 1, got 0; remove the key to keep all, or use save_strategy: 'no'",
    ),
    ({"max_steps": 0}, "max_steps: need -1 or x >= 1, got 0; -1 lets num_train_epochs decide"),
    ({"num_train_epochs": 0}, "num_train_epochs: need x > 0 when max_steps is -1, got 0; set one of the two"),
    (
        {"per_device_train_batch_size": 0},
        "per_device_train_batch_size: need x >= 1, got 0; use at least one sequence",
    ),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps: need x >= 1, got 0; 1 means no accumulation"),
    (
        {"loss_type": "dapo"},
        "loss_type: need one of nll, chunked_nll, dft for task sft, got 'dapo'; choose one, or set task",
    ),
    (
        {"task": "grpo", "loss_type": "dft"},
        "loss_type: need one of grpo, bnpo, dr_grpo, dapo, cispo, sapo, luspo, vespo for task grpo, got 'dft';"
        " choose one, or set task",
    ),
    (
        {"neftune_noise_alpha": -1},
        "neftune_noise_alpha: need x >= 0, got -1; 5 is usual; remove the key for no noise",
    ),
    ({"profile_steps": "5-3"}, "profile_steps: need a step, or first-last, got '5-3'; write 10-12 for three steps"),
    ({"seed": -1}, "seed: need 0 <= x < 2**32, got -1; choose a number in that range"),
    ({"seed": 2**32}, "seed: need 0 <= x < 2**32, got 4294967296; choose a number in that range"),
    (
        {"callbacks": ["early_stopping"]},
        'callbacks: need a list of names, each one of push_to_hub_revision, got ["early_stopping"]; choose one of them',
    ),
    (
        {"hub_model_id": "a/b/c"},
        "hub_model_id: need a repository like org/name or name, got 'a/b/c'; write letters, digits, '-', '_', '.'",
    ),
    (
        {"hub_model_revision": "a..b"},
        "hub_model_revision: need the name of a branch, got 'a..b'; name one like main",
    ),
    ({"ddp_timeout": 0.0}, "ddp_timeout: need x > 0, got 0; give a number of seconds"),
    ({"hub_timeout": 0.0}, "hub_timeout: need x > 0, got 0; give a number of seconds"),
    (
        {"save_strategy": "best"},
        "save_strategy: need one of no, steps, epoch, got 'best'; choose one of them",
    ),
    ({"output_dir": " "}, "output_dir: need a folder name, got ' '; name a folder"),
    (
        {"resume_from_checkpoint": ""},
        "resume_from_checkpoint: need true, false or a folder, got '';"
        " name a checkpoint folder, or remove the key to resume by itself",
    ),
    ({"model_name_or_path": ""}, "model_name_or_path: need a local folder or a hub id, got ''; name a model"),
    ({"dataset_name": ""}, "dataset_name: need a name, got ''; write a name or remove the key"),
    (
        {"max_length": 1},
        "max_length: need x >= 2, got 1; a sequence needs a token to read and one to predict; null = no cut",
    ),
    (
        {"max_length": None, "packing": True},
        "max_length: need a number when packing is true, got null; set max_length",
    ),
    (
        {"max_length": None, "eval_packing": True, "do_eval": True},
        "max_length: need a number when eval_packing is true, got null; set max_length",
    ),
    (
        {"packing_strategy": "wraped"},
        "packing_strategy: need one of bfd, bfd_split, wrapped, got 'wraped'; did you mean wrapped?",
    ),
    ({"dataset_num_proc": 0}, "dataset_num_proc: need x >= 1, got 0; remove the key to let r1jax choose"),
    ({"loss_chunk_size": 0}, "loss_chunk_size: need x >= 1, got 0; remove the key to let r1jax choose"),
    (
        {"report_to": ["none", "wandb"]},
        "report_to: need 'all' or 'none' to stand alone, got [\"none\", \"wandb\"]; keep it or the others",
    ),
    (
        {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        "lr_scheduler_kwargs: need nothing with linear, got 'min_lr_rate';"
        " remove 'min_lr_rate' or choose another lr_scheduler_type",
    ),
    (
        {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 0}},
        "lr_scheduler_kwargs: need only num_cycles with lr_scheduler_type cosine, got 'min_lr';"
        " remove 'min_lr' or choose another lr_scheduler_type",
    ),
    (
        {"lr_scheduler_type": MIN_LR},
        "lr_scheduler_kwargs: need exactly one of min_lr and min_lr_rate with cosine_with_min_lr, got neither;"
        " keep one of them",
    ),
    (
        {"lr_scheduler_type": MIN_LR, "lr_scheduler_kwargs": {"min_lr": 0, "min_lr_rate": 0}},
        "lr_scheduler_kwargs: need exactly one of min_lr and min_lr_rate with cosine_with_min_lr, got both;"
        " keep one of them",
    ),
    (
        {"lr_scheduler_type": MIN_LR, "lr_scheduler_kwargs": {"min_lr_rate": 2}},
        "lr_scheduler_kwargs.min_lr_rate: need 0 <= x <= 1, got 2; it is a fraction of learning_rate",
    ),
    (
        {"lr_scheduler_type": MIN_LR, "lr_scheduler_kwargs": {"min_lr": 1}},
        "lr_scheduler_kwargs.min_lr: need x <= learning_rate, got 1; lower it",
    ),
]

GRPO_REFUSALS = [
    ({"num_generations": 1}, "num_generations: need x >= 2, got 1; advantages compare completions of one prompt"),
    ({"temperature": 0}, "temperature: need x > 0, got 0; 1.0 samples as the model is"),
    ({"top_p": 0}, "top_p: need 0 < x <= 1, got 0; 1 means all tokens"),
    ({"top_k": -1}, "top_k: need x >= 0, got -1; 0 means all tokens"),
    ({"min_p": 2}, "min_p: need 0 <= x <= 1, got 2; remove the key for none"),
    ({"repetition_penalty": 0}, "repetition_penalty: need x > 0, got 0; 1 means none"),
    ({"beta": -0.1}, "beta: need x >= 0, got -0.1; 0 means no KL term"),
    ({"epsilon": 1}, "epsilon: need 0 < x < 1, got 1; 0.2 is usual"),
    (
        {"delta": 1.1},
        "delta: need x > 1.2 (1 + the upper epsilon), got 1.1;"
        " it bounds the ratio beyond the clip range; remove it for none",
    ),
    (
        {"sync_ref_model": True, "beta": 0},
        "sync_ref_model: need false when beta is 0, got true; with beta 0 there is no reference to move",
    ),
    ({"reward_funcs": ["acuracy"]}, "reward_funcs: need names of rewards, got 'acuracy'; the nearest is accuracy"),
    (
        {"reward_funcs": ["format", "format"]},
        'reward_funcs: need each reward once, got ["format", "format"]; remove one ["format"]',
    ),
    (
        {"reward_weights": [1.0]},
        "reward_weights: need 3 numbers, one for each of reward_funcs, got [1.0]; add or remove weights",
    ),
    ({"repetition_max_penalty": 1}, "repetition_max_penalty: need x <= 0, got 1; a penalty is negative"),
    (
        {"soft_punish_cache": 20000},
        "soft_punish_cache: need 1 <= x <= max_completion_len, got 20000; it counts tokens",
    ),
    ({"reward_timeout": 0}, "reward_timeout: need 0 < x <= 86400, got 0; it counts seconds"),
    (
        {"reward_num_workers": 0},
        "reward_num_workers: need x >= 1, got 0; rewards are computed in processes of their own",
    ),
    (
        {"reward_memory_limit": 2},
        "reward_memory_limit: need x >= 256, got 2; it counts MiB, and math-verify alone takes about 60",
    ),
    (
        {"repetition_language": "fr"},
        "repetition_language: need one of en, zh, got 'fr'; choose one of them",
    ),
    (
        {"reward_funcs": ["strict_fromat"]},
        "reward_funcs: need names of rewards, got 'strict_fromat'; the nearest is strict_format",
    ),
    (
        {"code_eval_test_batch_size": 0},
        "code_eval_test_batch_size: need -1 or x >= 1, got 0; -1 runs all at a time",
    ),
    (
        {"vllm_gpu_memory_utilization": 90},
        "vllm_gpu_memory_utilization: need 0 < x <= 1, got 90; it is a part of the memory",
    ),
    (
        {"vllm_importance_sampling_clip_max": 0.5},
        "vllm_importance_sampling_clip_max: need x >= 1, got 0.5;"
        " 2 or 3 is usual, 1e9 is for none; vllm_importance_sampling_correction: false is for no weights",
    ),
    (
        {"vllm_importance_sampling_clip_min": 1.5},
        "vllm_importance_sampling_clip_min: need 0 <= x <= 1, got 1.5; 0.5 is usual, 0 is for none",
    ),
    ({"dppo_mask_threshold": 0}, "dppo_mask_threshold: need 0 < x <= 1, got 0; 0.2 is usual"),
    ({"off_policy_mask_threshold": -1}, "off_policy_mask_threshold: need x >= 0, got -1; it is in nats a token"),
    ({"sapo_temperature_neg": 0}, "sapo_temperature_neg: need x > 0, got 0; about 1 is usual"),
    ({"vespo_k_pos": 0}, "vespo_k_pos: need x > 0, got 0; 2 or 3 is usual"),
    (
        {"top_entropy_quantile": 1.2},
        "top_entropy_quantile: need 0 <= x <= 1, got 1.2; 0.2 is the paper's, 1 means all",
    ),
    ({"entropy_coef": -0.1}, "entropy_coef: need x >= 0, got -0.1; a negative one would punish entropy; 0 means none"),
    (
        {"entropy_coef_min": 0.5, "entropy_coef_max": 0.1},
        "entropy_coef_max: need x >= entropy_coef_min (0.5), got 0.1; 1 is usual",
    ),
    (
        {"use_adaptive_entropy": True, "entropy_coef": 2},
        "entropy_coef: need 0 <= x <= 1 (entropy_coef_min and _max) with use_adaptive_entropy, got 2;"
        " it is where the coefficient starts",
    ),
    ({"vllm_request_timeout": 0}, "vllm_request_timeout: need x > 0, got 0; it is a number of seconds"),
    (
        {"vllm_verify_steps": 0},
        "vllm_verify_steps: need x >= 1, got 0; 1 compares after each push; null when it is needed",
    ),
    ({"rollout_async_depth": 2}, "rollout_async_depth: need 0 or 1, got 2; 1 draws the next generation meanwhile"),
    ({"vllm_server_port": 0}, "vllm_server_port: need 1 <= x <= 65535, got 0; 8000 is the default"),
    (
        {"generation_batch_size": 16, "steps_per_generation": 2},
        "generation_batch_size: need null with steps_per_generation, got 16; keep one: the other follows from it",
    ),
    (
        {"generation_batch_size": 20},
        "generation_batch_size: need a multiple of num_generations (8), got 20;"
        " a group of completions is never split over two batches",
    ),
    (
        {"generation_batch_size": 24, "per_device_train_batch_size": 16},
        "generation_batch_size: need a multiple of per_device_train_batch_size (16), got 24; change one of the two",
    ),
    (
        {"num_generations": 7, "mesh_fsdp": 2},
        "num_generations: need a divisor of the 16 completions of a generation batch (8 per device x 2 x 1), got 7;"
        " change it, per_device_train_batch_size or gradient_accumulation_steps",
    ),
    (
        {"generation_batch_size": 16, "mesh_fsdp": 4},
        "generation_batch_size: need a multiple of per_device_train_batch_size x data shards (8 x 4), got 16;"
        " change one of them",
    ),
]


@pytest.mark.parametrize(("keys", "line"), REFUSALS)
def test_refused(keys, line):
    with pytest.raises(config.UserError) as caught:
        config.resolve(BASE | keys)
    assert str(caught.value) == line


@pytest.mark.parametrize(("keys", "line"), GRPO_REFUSALS)
def test_refused_for_grpo(keys, line):
    with pytest.raises(config.UserError) as caught:
        config.resolve(BASE | {"task": "grpo"} | keys)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"dataset_name": "d"},
            "model_name_or_path: need a value, got null; add it to the config file or the command line",
        ),
        (
            {"model_name_or_path": "m"},
            "dataset_name: need a dataset (or dataset_train_file, dataset_mixture), got null;"
            " name a hub id, a folder or a data file",
        ),
        (
            {"model_name_or_path": "m", "dataset_train_file": "a.jsonl", "eval_strategy": "epoch"},
            "dataset_test_file: need a file (or a mixture's test_split_size) when do_eval or eval_strategy asks for "
            "evaluation, got null; name one, or set eval_strategy: 'no' and do_eval: false",
        ),
    ],
)
def test_refused_when_left_out(keys, line):
    with pytest.raises(config.UserError) as caught:
        config.resolve(keys)
    assert str(caught.value) == line


def test_accepted_at_the_edges():
    run = config.resolve(
        BASE
        | {"warmup_ratio": 0.999, "save_steps": 0.999, "max_steps": 1, "num_train_epochs": 0, "learning_rate": 0}
        | {"lr_scheduler_type": MIN_LR, "lr_scheduler_kwargs": {"min_lr": "0", "num_cycles": 0.5}}
        | {"max_length": None, "max_grad_norm": 0, "seed": 2**32 - 1, "report_to": "none"}
    ).config
    assert run.optimizer.lr_scheduler_kwargs == {"min_lr": 0.0, "num_cycles": 0.5}
    assert run.reporting.trackers == ()
    assert config.resolve(BASE | {"report_to": "all"}).config.reporting.trackers == ("tensorboard", "wandb")
    grpo = config.resolve(BASE | {"reward_funcs": ["my.rewards:brevity"], "top_k": 0, "mesh_fsdp": 1}).config
    assert grpo.rewards.reward_funcs == ("my.rewards:brevity",)


def test_configs_are_frozen():
    run = config.resolve(BASE).config
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.batch.max_steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(("optim", "kind"), [("adamw_torch_fused", "adamw"), ("adamw_8bit", "adamw_lean")])
def test_optimizer_names_map_to_two_kinds(optim, kind):
    assert config.resolve(BASE | {"optim": optim}).config.optimizer.kind == kind


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, "float32"),
        ({"bf16": True}, "bfloat16"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float32"),
    ],
)
def test_compute_dtype(keys, dtype):
    assert config.resolve(BASE | keys).config.model.compute_dtype == dtype
