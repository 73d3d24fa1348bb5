"""Recipes in open-r1's keys, written anew from its published settings, load unchanged and mean what they meant."""

import pytest

from r1jax import config

# Every key that some published open-r1 recipe sets.
OPEN_R1_KEYS = """
attn_implementation benchmarks beta bf16 callbacks chat_template code_eval_scoring_mode code_eval_test_batch_size
code_language dataset_config dataset_name dataset_num_proc dataset_prompt_column dataset_split dataset_test_split
dataset_train_split do_eval e2b_router_url eos_token eval_strategy gradient_accumulation_steps gradient_checkpointing
gradient_checkpointing_kwargs hub_always_push hub_model_id hub_model_revision hub_strategy learning_rate
log_completions log_level logging_first_step logging_steps logging_strategy loss_type lr_scheduler_kwargs
lr_scheduler_type mask_truncated_completions max_completion_length max_grad_norm max_length max_prompt_length max_steps
model_name_or_path model_revision num_generations num_train_epochs optim output_dataset_name output_dir
overwrite_output_dir packing pass_rate_min pass_rate_max per_device_eval_batch_size per_device_train_batch_size
push_to_hub report_to reward_funcs reward_weights save_only_model save_steps save_strategy save_total_limit
scale_rewards seed system_prompt temperature top_p torch_dtype use_liger_kernel use_vllm vllm_device
vllm_gpu_memory_utilization wandb_entity wandb_project warmup_ratio
""".split()

COMMON = """
model_revision: main
torch_dtype: bfloat16
attn_implementation: flash_attention_2
bf16: true
do_eval: false
eval_strategy: 'no'
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: false
hub_strategy: every_save
log_level: info
logging_steps: 1
logging_strategy: steps
max_steps: -1
overwrite_output_dir: true
push_to_hub: true
report_to:
- wandb
save_total_limit: 1
seed: 42
"""

COSINE = """
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs:
  min_lr_rate: 0.1
"""

SFT = {
    "OpenR1-Distill-7B": """
model_name_or_path: open-r1/Qwen2.5-Math-7B-RoPE-300k
chat_template: "{%- if tools %}{{- '<|im_start|>system\\n' }}{%- endif %}"
eos_token: <|im_end|>
dataset_name: open-r1/Mixture-of-Thoughts
dataset_config: all
dataset_num_proc: 12
hub_model_id: OpenR1-Distill-7B
learning_rate: 4.0e-05
packing: false
max_grad_norm: 0.2
max_length: 32768
num_train_epochs: 5
output_dir: data/OpenR1-Distill-7B
per_device_eval_batch_size: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
save_strategy: epoch
use_liger_kernel: true
warmup_ratio: 0.03
""",
    "OlympicCoder-7B": """
model_name_or_path: Qwen/Qwen2.5-Coder-7B-Instruct
dataset_name: open-r1/codeforces-cots
dataset_config: solutions_decontaminated
dataset_num_proc: 48
hub_model_id: open-r1/OlympicCoder-7B
learning_rate: 1.0e-05
packing: false
max_grad_norm: 0.2
max_length: 32768
num_train_epochs: 10
output_dir: data/OlympicCoder-7B
per_device_eval_batch_size: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
save_strategy: "steps"
save_steps: 0.2
use_liger_kernel: true
warmup_ratio: 0.03
""",
    "OlympicCoder-32B": """
model_name_or_path: Qwen/Qwen2.5-Coder-32B-Instruct
dataset_name: open-r1/codeforces-cots
dataset_config: solutions_decontaminated
dataset_num_proc: 12
hub_always_push: true
hub_model_id: OlympicCoder-32B
learning_rate: 4.0e-05
packing: false
max_grad_norm: 0.2
max_length: 22528
num_train_epochs: 10
optim: paged_adamw_8bit
output_dir: data/open-r1/OlympicCoder-32B
per_device_eval_batch_size: 1
per_device_train_batch_size: 1
gradient_accumulation_steps: 1
save_only_model: true
save_strategy: epoch
use_liger_kernel: false
warmup_ratio: 0.03
""",
}

GRPO_COMMON = """
use_vllm: true
log_completions: true
logging_first_step: true
num_train_epochs: 1
system_prompt: "Respond in the following format: <think>\\n...\\n</think>\\n<answer>\\n...\\n</answer>"
"""

GRPO = {
    "R1-Distill-1.5B": COSINE
    + """
model_name_or_path: deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
chat_template: "{{bos_token}}{% for message in messages %}{{ message['content'] }}{% endfor %}"
dataset_name: open-r1/OpenR1-Math-220k
dataset_prompt_column: problem
hub_model_id: DeepSeek-R1-Distill-Qwen-1.5B-GRPO
learning_rate: 1.0e-06
max_prompt_length: 512
max_completion_length: 2048
num_generations: 16
temperature: 0.7
output_dir: data/DeepSeek-R1-Distill-Qwen-1.5B-GRPO
per_device_eval_batch_size: 16
per_device_train_batch_size: 16
gradient_accumulation_steps: 4
reward_funcs: [accuracy, format, tag_count]
reward_weights: [1.0, 1.0, 1.0]
save_strategy: epoch
use_liger_kernel: true
vllm_device: auto
warmup_ratio: 0.1
""",
    "Qwen2.5-1.5B": """
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
dataset_name: open-r1/OpenR1-Math-220k
dataset_prompt_column: problem
hub_model_id: Qwen2.5-1.5B-Open-R1-GRPO
learning_rate: 2.0e-05
lr_scheduler_type: cosine
max_prompt_length: 512
max_completion_length: 1024
num_generations: 16
output_dir: data/Qwen2.5-1.5B-Open-R1-GRPO
per_device_train_batch_size: 16
gradient_accumulation_steps: 4
reward_funcs: [accuracy, format, tag_count]
reward_weights: [1.0, 1.0, 1.0]
save_strategy: epoch
warmup_ratio: 0.1
""",
    "Qwen2.5-1.5B code": COSINE
    + """
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
dataset_name: open-r1/verifiable-coding-problems-python
dataset_prompt_column: problem_statement
e2b_router_url: 1.2.3.4:8000
beta: 0.01
vllm_gpu_memory_utilization: 0.9
learning_rate: 5.0e-06
max_prompt_length: 1024
max_completion_length: 2048
num_generations: 14
temperature: 1.0
output_dir: data/Qwen2.5-1.5B-Open-R1-Code-GRPO
per_device_train_batch_size: 16
gradient_accumulation_steps: 4
reward_funcs:
- code
- format
reward_weights:
- 1.0
- 0.1
save_strategy: "steps"
save_steps: 50
warmup_ratio: 0.03
""",
    "Qwen2.5-1.5B ioi": COSINE
    + """
model_name_or_path: Qwen/Qwen2.5-1.5B-Instruct
dataset_name: open-r1/ioi
dataset_prompt_column: problem
beta: 0.01
learning_rate: 5.0e-06
max_prompt_length: 1024
max_completion_length: 2048
num_generations: 14
output_dir: data/Qwen2.5-1.5B-Open-R1-Code-GRPO
per_device_train_batch_size: 16
gradient_accumulation_steps: 4
reward_funcs: [ioi_code, code_format, format]
reward_weights: [1.0, 0.1, 0.1]
code_eval_test_batch_size: 3
code_language: cpp
save_strategy: "steps"
save_steps: 50
warmup_ratio: 0.03
""",
    # Published with do_eval twice.
    "Coder-7B codeforces": """
model_name_or_path: Qwen/Qwen2.5-Coder-7B-Instruct
dataset_name: open-r1/codeforces
dataset_config: verifiable-prompts
dataset_prompt_column: prompt
callbacks:
- push_to_hub_revision
benchmarks:
- lcb_v4
beta: 0.0
loss_type: dr_grpo
scale_rewards: false
do_eval: false
hub_model_id: open-r1/Qwen2.5-Coder-7B-Instruct-Codeforces-GRPO
hub_model_revision: v01.00
learning_rate: 1.0e-06
lr_scheduler_type: constant_with_warmup
max_grad_norm: 0.2
max_prompt_length: 2000
max_completion_length: 8192
num_generations: 16
temperature: 0.7
output_dir: data/Qwen2.5-Coder-7B-Instruct-Codeforces-GRPO_v01.00
per_device_train_batch_size: 4
gradient_accumulation_steps: 32
reward_funcs: [cf_code, code_format]
reward_weights: [1.0, 0.1]
save_strategy: "steps"
save_steps: 0.05
wandb_entity: huggingface
wandb_project: open-r1
warmup_ratio: 0.1
mask_truncated_completions: true
code_eval_test_batch_size: -1
code_eval_scoring_mode: weighted_sum
""",
}


@pytest.fixture
def load(tmp_path):
    def load_text(text: str, *overrides: str) -> config.Resolved:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return config.load(["--config", str(path), *overrides])

    return load_text


@pytest.mark.parametrize("name", SFT)
def test_sft_recipe_loads(load, name):
    resolved = load(COMMON + COSINE + SFT[name])
    run = resolved.config
    assert run.run.task == "sft"
    assert run.optimizer.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert run.model.compute_dtype == "bfloat16"
    assert run.reporting.eval_strategy == "no"
    assert {"attn_implementation", "use_liger_kernel"} <= dict(resolved.ignored).keys()
    assert run.checkpoint.push_to_hub and run.checkpoint.hub_model_id


@pytest.mark.parametrize("name", GRPO)
def test_grpo_recipe_loads(load, name):
    resolved = load(COMMON + GRPO_COMMON + GRPO[name])
    assert resolved.config.run.task == "grpo"
    assert resolved.origins["task"] == "inferred"
    assert resolved.config.vllm.rollout_engine == "vllm"
    assert resolved.config.sampling.log_completions


def test_recipe_values_arrive(load):
    run = load(COMMON + COSINE + SFT["OlympicCoder-32B"]).config
    assert (run.batch.per_device_train_batch_size, run.batch.num_train_epochs) == (1, 10.0)
    assert (run.optimizer.learning_rate, run.optimizer.max_grad_norm, run.optimizer.kind) == (4e-5, 0.2, "adamw_lean")
    assert (run.data.max_length, run.data.dataset_num_proc) == (22528, 12)
    assert run.checkpoint.save_only_model
    run = load(COMMON + GRPO_COMMON + GRPO["Coder-7B codeforces"]).config
    assert (run.objective.loss_type, run.grpo.advantages.scale_rewards) == ("dr_grpo", False)
    assert run.grpo.reference.beta == 0.0
    assert run.rewards.reward_funcs == ("cf_code", "code_format")
    assert run.rewards.reward_weights == (1.0, 0.1)
    assert run.checkpoint.save_steps == 0.05
    assert run.code_rewards.code_eval_test_batch_size == -1
    assert (run.checkpoint.callbacks, run.checkpoint.hub_model_revision) == (("push_to_hub_revision",), "v01.00")


def test_every_key_of_every_recipe_is_known(load):
    recipes = {**SFT, **GRPO}
    written = "".join(COMMON + GRPO_COMMON + COSINE + text for text in recipes.values())
    # the filtering recipes, which are no training runs, add these; top_p and the splits are set there too
    rest = {
        "dataset_split": "train",
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "output_dataset_name": "me/filtered",
        "pass_rate_min": 0.1,
        "pass_rate_max": 0.6,
        "top_p": 0.95,
    }
    unseen = [key for key in OPEN_R1_KEYS if f"\n{key}:" not in written and key not in rest]
    assert unseen == []
    text = COMMON + GRPO_COMMON + GRPO["Qwen2.5-1.5B"] + "".join(f"{key}: {value}\n" for key, value in rest.items())
    resolved = load(text)
    assert resolved.config.sampling.top_p == 0.95
    assert "pass_rate_min" in dict(resolved.ignored)


def test_a_recipe_can_sample_without_a_server(load):
    resolved = load(COMMON + GRPO_COMMON + GRPO["Qwen2.5-1.5B code"], "--rollout_engine", "jax")
    assert resolved.config.vllm.rollout_engine == "jax"
    notes = dict(resolved.ignored)
    assert notes["use_vllm"] == notes["vllm_gpu_memory_utilization"] == "rollout_engine is jax: no vLLM server is used"
