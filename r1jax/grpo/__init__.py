"""GRPO, assembled: a checkpoint, prompts and rewards come in, a policy that earns more of them leaves.

prompts -> rollouts -> rewards -> advantages -> PackedBatch -> step
   ^                                                            |
   +---------------------- weights, version + 1 <---------------+
"""

from r1jax.grpo.collecting import evaluate_policy, make_collector, make_generations, open_graders
from r1jax.grpo.run import run
from r1jax.grpo.sampling import open_engine
from r1jax.grpo.steps import make_steps

__all__ = [
    "evaluate_policy",
    "make_collector",
    "make_generations",
    "make_steps",
    "open_engine",
    "open_graders",
    "run",
]
