"""The keys of open-r1, TRL and HF that are no keys of ours, and what happens instead.

`FOREIGN` keys are accepted with any value and reported once at start. `NOT_BUILT` keys would change the result, so
they are accepted only when they switch their feature off. `RENAMED` keys are refused with the name to use.
"""

_KERNELS = "the loss comes in tiles always; attn_implementation has attention"
_PASS_RATE = "only pass-rate filtering reads it, training does not"
_ROUTER = "open-r1 never passes it to the reward; code runs where code_provider says"
_LOADER = "grain reads and prefetches rows; dataset_num_proc sets the workers that tokenise"
_TORCH = "it tunes torch's distributed training; mesh_* and zero_stage decide here"

FOREIGN: dict[str, str] = {
    "use_liger_kernel": _KERNELS,
    "use_liger": _KERNELS,
    "use_liger_loss": "the loss is computed in tiles of the vocabulary always; loss_chunk_size sets their size",
    "gradient_checkpointing_kwargs": "remat_policy says what gradient_checkpointing recomputes",
    "gradient_checkpointing_use_reentrant": "remat_policy says what gradient_checkpointing recomputes",
    "vllm_device": "the vLLM server's devices are chosen where it is started (open-r1's TRL ignores the key too)",
    "ds3_gather_for_generation": "weights are gathered for generation in one program, over all axes but tensor",
    "benchmarks": "no benchmarks are started by a save; evaluate the saved model with its own command",
    "e2b_router_url": _ROUTER,
    "morph_router_url": _ROUTER,
    "output_dataset_name": _PASS_RATE,
    "pass_rate_min": _PASS_RATE,
    "pass_rate_max": _PASS_RATE,
    "dataset_start_index": _PASS_RATE,
    "dataset_end_index": _PASS_RATE,
    "dataset_split": "training reads dataset_train_split",
    "logging_dir": "tensorboard files are written to output_dir/runs",
    "logging_nan_inf_filter": "a loss that is not finite stops the run and names the step",
    "disable_tqdm": "the progress bar is shown on a terminal only",
    "remove_unused_columns": "columns that nothing reads are never loaded into batches",
    "dataloader_num_workers": _LOADER,
    "dataloader_pin_memory": _LOADER,
    "dataloader_prefetch_factor": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "ddp_find_unused_parameters": _TORCH,
    "ddp_backend": _TORCH,
    "deepspeed": _TORCH,
    "fsdp": _TORCH,
    "fsdp_config": _TORCH,
    "torch_compile": "every step is compiled by XLA",
    "use_cache": "training keeps no key/value cache; the exported config has it on",
    "disable_dropout": "the models have no dropout",
    "lora_task_type": "the models are causal language models",
    "bnb_4bit_quant_type": "load_in_4bit alone reads it",
    "use_bnb_nested_quant": "load_in_4bit alone reads it",
    "trust_remote_code": "no code is ever loaded from a model's or dataset's repository",
}

# Foreign for one task only: the other reads them.
FOREIGN_FOR_SFT: dict[str, str] = {
    "log_completions": "sft samples no completions",
    "num_completions_to_print": "sft samples no completions",
    "wandb_log_unique_prompts": "sft samples no completions",
}

NOT_BUILT: dict[str, str] = {
    "use_dora": "use LoRA: use_peft without it",
    "lora_modules_to_save": "train all parameters to train embeddings or lm_head",
    "lora_target_parameters": "name modules in lora_target_modules",
    "load_in_4bit": "use bf16 and zero_stage 3 to save memory",
    "load_in_8bit": "use bf16 and zero_stage 3 to save memory",
    "auto_find_batch_size": "set per_device_train_batch_size",
    "group_by_length": "use packing",
}

RENAMED: dict[str, str] = {
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "dataset_configs": "dataset_config",
    "streaming": "dataset_streaming",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "no_cuda": "JAX_PLATFORMS=cpu in the environment",
    "use_cpu": "JAX_PLATFORMS=cpu in the environment",
}

ELSEWHERE: dict[str, str] = {
    "config": "give it on the command line",
    "dry_run": "give it on the command line",
    "env": "write it in the config file, as a mapping of names to values",
}
