"""Rewards that users could write and should not have; worker processes import them."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time

calls = 0


def _texts(completions):
    return [completion[0]["content"] for completion in completions]


def _misbehave(text):
    if text == "hang":
        time.sleep(600)
    elif text == "hang without threads":
        return 7 ** (10**9)
    elif text == "exit":
        os._exit(3)
    elif text == "segfault":
        ctypes.string_at(0)
    elif text == "memory":
        eaten = []
        while True:
            eaten.append(bytearray(2**20))
    elif text == "stop":  # as a debugger or the kernel's freezer would
        os.kill(os.getpid(), signal.SIGSTOP)
    elif text == "half an answer":
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if os.path.exists(path := f"/proc/self/fd/{descriptor}") and os.readlink(path).startswith("socket:"):
                os.write(descriptor, b"\0\0\1\0begins and never")
        time.sleep(600)
    elif text == "raise":
        raise KeyError("no such thing")
    elif text == "system exit":
        sys.exit(1)
    elif text == "nan":
        return float("nan")
    elif text == "print":
        os.write(1, b"printed to where the answers might have gone\n")
        return 1.0
    elif text == "input":
        return float(input())
    elif text == "none":
        return None
    elif text.startswith("child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(text.removeprefix("child "), "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    return float(len(text))


def text_length(completions, **kwargs):
    return [_misbehave(text) for text in _texts(completions)]


def one_by_one(completions, **kwargs):
    if len(completions) > 1:
        raise ValueError("one at a time")
    return [_misbehave(text) for text in _texts(completions)]


async def slowly(completions, **kwargs):
    await asyncio.sleep(0.01)
    return [_misbehave(text) for text in _texts(completions)]


def wrong_number(completions, **kwargs):
    return [1.0]


def batch_size(completions, **kwargs):
    return [len(completions)] * len(completions)


def few_parameters(completions, difficulty):
    return [2.0 * value for value in difficulty]


def sees_everything(completions, prompts, completion_ids, trainer_state, prefills, group_ids, extra, **kwargs):
    assert completions[0] == [{"role": "assistant", "content": "a"}]
    assert prompts == ["p", "q"]
    assert completion_ids == [[1], [2, 3]]
    assert prefills == ["<think>\n", ""]
    assert group_ids == [0, 1]
    assert trainer_state.global_step == 7
    return extra


def where_am_i(completions, **kwargs):
    path = kwargs["file"][0]
    with open(path, "w") as file:
        file.write(f"{os.getcwd()}\n{'jax' in sys.modules}\n{os.environ['JAX_PLATFORMS']}")
    return [0.0] * len(completions)


def count_calls(completions, **kwargs):
    global calls
    calls += 1
    return [float(calls)] * len(completions)


not_a_function = 3


def accuracy_reward(completions, **kwargs):
    return [0.0] * len(completions)
