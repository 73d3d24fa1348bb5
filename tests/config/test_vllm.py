import pytest

from r1jax import config
from r1jax.config.vllm import VllmConfig

BASE = {"task": "grpo", "model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["format"], "use_vllm": True}


@pytest.mark.parametrize(
    ("changes", "urls"),
    [
        ({}, ("http://127.0.0.1:8000",)),
        ({"vllm_server_host": "node7", "vllm_server_port": 81}, ("http://node7:81",)),
        ({"vllm_server_base_url": "https://a:1", "vllm_server_port": 81}, ("https://a:1",)),
        ({"vllm_server_base_url": "http://a, unix:/run/b,"}, ("http://a", "unix:/run/b")),
        ({"vllm_server_base_url": ""}, ()),
    ],
)
def test_addresses(changes, urls):
    assert VllmConfig(**changes).server_urls == urls


def test_what_the_server_is_given():
    given = {"vllm_gpu_memory_utilization": 0.5, "vllm_tensor_parallel_size": 2, "vllm_server_port": 81}
    notes = dict(config.resolve({**BASE, **given, "vllm_server_base_url": "http://a"}).ignored)
    assert notes["vllm_gpu_memory_utilization"].endswith("launch/vllm_server.sh MODEL_DIR --gpu-memory-utilization")
    assert notes["vllm_tensor_parallel_size"].endswith("--tensor-parallel-size")
    assert notes["vllm_server_port"] == "vllm_server_base_url is given"
