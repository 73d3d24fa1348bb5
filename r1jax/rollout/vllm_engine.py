"""The `RolloutEngine` whose samples come from vLLM servers, with the trainer's weights pushed to them.

    sync      gather -> file or upload -> prepare -> apply -> reset the prefix cache (-> compare a probe)
    generate  are the weights still ours? -> journal -> requests for the rest -> are they still? -> Rollouts

Every trainer process has one, for its own prompts. The first process pushes; all of them take part in the gathering.
"""

import logging
from collections.abc import Sequence

import jax

from r1jax.batch import Rollout
from r1jax.config.errors import ResumableFailure, RunFailure, need
from r1jax.models.config import DecoderConfig
from r1jax.models.fingerprint import fingerprint
from r1jax.models.parameters import Params
from r1jax.rollout.distribution import switches
from r1jax.rollout.engine import EVALUATION, as_rollout
from r1jax.rollout.journal import Journal, Label, Page
from r1jax.rollout.sampler import Completion, check_prompt
from r1jax.rollout.settings import SamplingSettings
from r1jax.rollout.vllm_checks import Expected
from r1jax.rollout.vllm_client import ServersLost, VllmClient
from r1jax.rollout.vllm_fleet import Fleet
from r1jax.rollout.vllm_probe import PROBE_TOKENS, Probe, compare, tolerance
from r1jax.rollout.vllm_requests import Sample
from r1jax.rollout.vllm_router import draw_samples
from r1jax.rollout.weight_push import PushTimes, Route

logger = logging.getLogger(__name__)

MOST_RECOVERIES = 3
"""In a row, of one sync: servers that are lost as often as they come back are nothing to train with."""
COUNTED = (
    "timeout",
    "silent",
    "connection",
    "status",
    "malformed",
    "stale",
    "refused",
    "retries",
    "recoveries",
    "replayed",
)


class VllmEngine:
    """Samples on servers that others run."""

    def __init__(
        self,
        config: DecoderConfig,
        settings: SamplingSettings,
        client: VllmClient,
        *,
        dtype: str,
        probe: Probe,
        probe_prompt: Sequence[int],
        longest_prompt: int,
        start_seconds: float = 240.0,
        route: Route = "auto",
        journal: Journal | None = None,
        compare_every: int | None = None,
    ) -> None:
        """dtype: that the trainer computes in; longest_prompt: in tokens; compare_every: versions, None for no more
        than are needed.

        Raises `UserError` for servers, or settings, that training could not trust.
        """
        _refuse_reshaped(settings, config)
        self._config, self._settings, self._client, self._probe = config, settings, client, probe
        self._probe_prompt = tuple(map(int, probe_prompt))
        expected = Expected(
            config=config,
            longest=max(longest_prompt + settings.max_new_tokens, len(self._probe_prompt) + PROBE_TOKENS),
            stop_ids=tuple(settings.stop_ids),
            probe=self._probe_prompt,
            pushed=True,
        )
        self._fleet = Fleet(client, expected, config, start_seconds=start_seconds, route=route)
        if self._fleet.found.dtype != dtype:
            logger.warning("vllm: the servers compute in %s, the trainer in %s", self._fleet.found.dtype, dtype)
        self._dtype, self._journal, self._compare_every = dtype, journal, compare_every
        self._compared: int | None = None
        self._told: dict[str, int] = {}
        self.version: int | None = None
        self.label: Label | None = None
        """Of the weights that the servers have, where there is a journal."""
        self._earlier: Label | None = None
        """Of the weights before them, where servers were lost in the middle of a generation."""
        self.push_times: PushTimes | None = None
        """Of the last sync; None in processes that do not push."""

    def sync(self, params: Params, version: int, *, lost: bool = False) -> None:
        """Gives the servers the trainer's parameters; every process must call it.

        The first time, every compare_every versions, and when servers were lost, their log-probabilities of a probe
        must be the trainer's. Servers that are gone are waited for, at once where it is known (lost). Raises
        `ResumableFailure` where they do not come back, weights do not arrive, or are not those that answer.
        """
        self.version = None
        label = Label(version, fingerprint(params)) if self._journal is not None else None
        if not lost or label != self.label:
            # What was accepted before they were lost, however often, is as good as what other servers' samples of that
            # time are.
            self._earlier = self.label if lost else None
        self.label = label
        try:
            self._sync(params, version, lost)
        except RunFailure as failure:
            raise ResumableFailure(str(failure)) from failure
        self.version = version

    def compare(self, params: Params) -> float:
        """The largest mean difference between a server's log-probabilities of a probe and the trainer's.

        Every process must call it. Raises `RunFailure` where it is more than rounding.
        """
        return self._compare(params, self.version)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        prompt_ids: Sequence[int],
        *,
        num_generations: int,
        step: int,
        settings: SamplingSettings | None = None,
    ) -> list[list[Rollout]]:
        """Each prompt's rollouts, in the prompts' order; those that the journal has are not drawn again.

        Raises `UserError` for a prompt that leaves no room, `ServersLost` for samples that could not be had at present
        (what was accepted is in the journal: the next call asks for the rest), and `RunFailure` for refused ones.
        """
        assert self.version is not None, "sync comes before generate"
        settings = settings or self._settings
        _refuse_reshaped(settings, self._config)
        for row, prompt in enumerate(prompts):
            name = f"prompt {prompt_ids[row]}"
            check_prompt(prompt, self._config, settings.max_new_tokens, name, "max_completion_length")
        page = Page(self._journal if step < EVALUATION else None, self.label, self._earlier, step, settings)
        known = [page.known(prompt, prompt_ids[row], num_generations) for row, prompt in enumerate(prompts)]
        self._client.counts["replayed"] += sum(map(len, known))
        if any(len(have) < num_generations for have in known):
            self._fleet.check_version(self.version)
        drawn = draw_samples(
            self._client,
            prompts,
            prompt_ids,
            settings,
            num_generations=num_generations,
            step=step,
            model=self._fleet.found.model,
            vocab_size=self._config.vocab_size,
            version=self.version,
            known=known,
            accept=page.accept,
        )
        return [
            [as_rollout(prompt, completion_of(one), prompt_id, number, one.version) for number, one in enumerate(group)]
            for prompt, prompt_id, group in zip(prompts, prompt_ids, drawn, strict=True)
        ]

    def counts(self) -> dict[str, float]:
        """What went wrong in this process since the last call, and samples that the journal gave, by metric."""
        now = {name: self._client.counts[name] for name in COUNTED}
        news = {f"vllm/{name}": float(count - self._told.get(name, 0)) for name, count in now.items()}
        self._told = now
        return news

    def close(self) -> None:
        """Removes what was written for the servers, which stay as they are, and ends a call that is under way."""
        self._fleet.close()

    def _sync(self, params: Params, version: int, lost: bool) -> None:
        if self._fleet.incomplete and not lost:
            self._fleet.look_for_absent()
        failure: ServersLost | None = None
        for _ in range(MOST_RECOVERIES + 1):
            try:
                if lost:
                    self._compared = None
                    self._client.counts["recoveries"] += jax.process_index() == 0  # one of all processes
                    self._fleet.reopen()
                self.push_times = self._fleet.push(params, version)
                self._compare_if_due(params, version)
                return
            except ServersLost as error:
                logger.warning("%s", error)
                lost, failure = True, error
        raise RunFailure(f"{failure}; this is the end after {MOST_RECOVERIES} recoveries in a row")

    def _compare_if_due(self, params: Params, version: int) -> None:
        every = self._compare_every
        if self._compared is None or (every is not None and version - self._compared >= every):
            self._compare(params, version)
            self._compared = version

    def _compare(self, params: Params, version: int | None) -> float:
        return compare(
            self._client,
            self._probe,
            params,
            prompt=self._probe_prompt,
            model=self._fleet.found.model,
            vocab_size=self._config.vocab_size,
            version=version,
            temperature=self._settings.temperature or 1.0,
            tolerance=tolerance(self._dtype, self._fleet.found.dtype),
        )


def _refuse_reshaped(settings: SamplingSettings, config: DecoderConfig) -> None:
    """Raises for a distribution that the trainer cannot follow: it can where tokens are only cut off, in our order."""
    on = switches(settings, config.vocab_size)
    if on.repetition or on.min_p:
        got = ", ".join(f"{name} {getattr(settings, name)}" for name in ("min_p", "repetition_penalty"))
        rule = "the policy at its temperature, cut by top_k and top_p alone, with rollout_engine: vllm"
        raise need("rollout_engine", rule, got, "leave these keys out, or sample with rollout_engine: jax")


def completion_of(sample: Sample) -> Completion:
    """The sample as the embedded sampler would give it; the policy's log-probabilities are taken for the same,
    which is right where nothing is cut off."""
    return Completion(
        token_ids=sample.token_ids,
        logprobs=sample.logprobs,
        policy_logprobs=sample.logprobs,
        finish_reason=sample.finish_reason,
    )
