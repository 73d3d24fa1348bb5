"""TEMPORARY."""

import numpy as np, jax, jax.numpy as jnp
from r1jax.batch import Rollout, Turn, VersionSpan
from r1jax.models.decoding import unstack
from r1jax.rollout.sampler import Sampler


class RolloutEngine: ...


class TempEngine(RolloutEngine):
    def __init__(self, config, sampling, stop_ids, seed):
        self.config = config
        self.sampling = sampling
        self.stop = stop_ids
        self.seed = seed
        self.un = jax.jit(unstack)

    def sync(self, params, version):
        self.params = self.un(params)
        self.version = version

    def generate(self, prompts, ids, *, num_generations, step):
        s = Sampler(params=self.params, config=self.config)
        out = s.generate(
            prompts,
            num_generations=num_generations,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            max_new_tokens=self.sampling.max_completion_length,
            stop_ids=self.stop,
            seed=(self.seed * 1000003 + step) % 2**31,
            batch_size=256,
            prompt_ids=ids,
        )
        res = []
        for p, i, g in zip(prompts, ids, out):
            grp = []
            for k, c in enumerate(g):
                toks = np.asarray(list(p) + list(c.token_ids), np.int32)
                n = len(p)
                m = (np.arange(len(toks)) >= n).astype(np.int32)
                lp = np.concatenate([np.zeros(n), c.logprobs]).astype(np.float32)
                grp.append(
                    Rollout(
                        prompt_id=i,
                        sample=k,
                        tokens=toks,
                        action_mask=m,
                        logprobs=lp,
                        policy_logprobs=lp,
                        versions=(VersionSpan(n, len(toks), self.version),),
                        turns=(Turn(n, len(toks), c.finish_reason),),
                    )
                )
            res.append(grp)
        return res
