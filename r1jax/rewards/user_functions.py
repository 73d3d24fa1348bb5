"""Rewards that are the user's own functions, named as module:function."""

import inspect
from collections.abc import Callable
from typing import Any

from r1jax.config.errors import need, shown
from r1jax.rewards.convention import GIVEN
from r1jax.rewards.reward import Reward, UserFunction


def user_reward(path: str) -> Reward:
    """The Reward of module:function, imported once to see that it is there; UserError where it is not."""
    function = _load(path)
    name = getattr(function, "__name__", path.partition(":")[2])
    return Reward(name=name, columns=_columns(function), function=UserFunction(path))


def _load(path: str) -> Callable[..., Any]:
    rule = "module:function that can be imported"
    try:
        function = UserFunction(path).load()
    except AttributeError as error:
        raise need("reward_funcs", rule, shown(path), f"it has no such function ({error})") from None
    except ImportError as error:
        raise need("reward_funcs", rule, shown(path), f"run where the module is found ({error})") from None
    except Exception as error:  # the user's module may raise anything
        said = " ".join(str(error).split())[:200]
        raise need("reward_funcs", rule, shown(path), f"its import raised {type(error).__name__}: {said}") from error
    if not callable(function):
        raise need("reward_funcs", "module:function", shown(path), f"that is a {type(function).__name__}")
    return function


def _columns(function: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters that only the dataset can fill."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in kinds and parameter.default is inspect.Parameter.empty and name not in GIVEN
    )
