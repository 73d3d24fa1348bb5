"""A reward as the run knows it: what it is called, what it reads, and how it may be called."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reward:
    name: str
    """The function's `__name__`; metrics are rewards/{name}/mean and so on."""

    columns: tuple[str, ...]
    """Dataset columns that it cannot do without."""

    function: Callable[..., Any]
    """The reward itself, picklable, in open-r1's convention (`convention.py`)."""

    optional_columns: tuple[str, ...] = ()
    """Dataset columns that it reads where the data has them."""

    judge: Callable[..., Any] | None = None
    """Of a pooled reward: the part that looks at one completion, and may hang; its results go to `correct`."""

    @property
    def pooled(self) -> bool:
        """Whether a completion's reward depends on the others of the call."""
        return self.judge is not None

    @property
    def users(self) -> bool:
        """Whether it is the user's own: it is given every column, and the whole batch in one call where that works."""
        return isinstance(self.function, UserFunction)


@dataclass(frozen=True)
class UserFunction:
    """A function by its path, module:function, so that a worker imports it anew instead of unpickling it."""

    path: str

    def __call__(self, **kwargs: Any) -> Any:
        return self.load()(**kwargs)

    def load(self) -> Any:
        """The function, if it is one; raises what its module raises on import."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)
