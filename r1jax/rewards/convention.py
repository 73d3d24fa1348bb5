"""How a reward is called and named: open-r1's convention, which is TRL's.

`f(completions, **kwargs)` gives one number or None a completion. kwargs are `prompts`, `completion_ids`,
`trainer_state`, each dataset column as a list, and our own `prefills` and `group_ids`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

Conversations = Sequence[Sequence[dict[str, Any]]]
"""One list of messages a completion; ours have one message, that of the assistant."""


GIVEN = ("completions", "prompts", "completion_ids", "trainer_state", "prefills", "group_ids")
"""What every call has beside the dataset's columns; a column of such a name is hidden by it."""


def conversations(texts: Sequence[str]) -> Conversations:
    """Completions as rewards are given them."""
    return [[{"role": "assistant", "content": text}] for text in texts]


def contents(completions: Conversations) -> list[str]:
    """The text of each completion's first message, which is what open-r1's rewards read."""
    return [completion[0]["content"] for completion in completions]


def answers(completions: Conversations, prefills: Sequence[str] | None) -> list[str]:
    """Each answer from its first character: what the generation prompt had opened of it, then the completion.

    A chat template that ends its generation prompt with `<think>\\n` leaves the model to write only the rest, and
    open-r1's format rewards, which read the completion alone, are then 0 for ever (open-r1#560, trl#6966).
    """
    texts = contents(completions)
    opened = [""] * len(texts) if prefills is None else prefills
    return [start + text for start, text in zip(opened, texts, strict=True)]


def named(function: partial[Any]) -> Callable[..., Any]:
    """The same partial with the `__name__` of its function: metrics are keyed by it, as open-r1's closures have it."""
    function.__name__ = function.func.__name__  # pyright: ignore[reportAttributeAccessIssue]
    return function
