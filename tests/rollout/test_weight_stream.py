"""The bytes are those that safetensors reads, on any mesh, and each way of writing them leaves a whole file or none."""

import os

import jax
import numpy as np
import pytest
from safetensors import safe_open

from r1jax.checkpoints.hf_export import export
from r1jax.config.mesh import MeshConfig
from r1jax.models.parameters import abstract_params, init_params
from r1jax.rollout.weight_stream import FileSink, UploadSink, data_bytes, gathered, header_of
from r1jax.sharding.mesh import make_mesh
from r1jax.sharding.rules import make_specs, shardings
from tests.rollout.http_server import HANG, listening


def sharded(config, **shape):
    """Random parameters split over a mesh as stage 3 has them."""
    params = init_params(config, jax.random.key(0))
    if not shape:
        return params
    mesh = make_mesh(MeshConfig(**shape))
    heads = {"num_heads": config.num_heads, "num_kv_heads": config.num_kv_heads}
    return jax.device_put(params, shardings(mesh, make_specs(abstract_params(config), mesh, 3, **heads).params))


def write(path, params, config, dtype, version=7):
    sink = FileSink(str(path))
    sink.write(header_of(params, config, dtype, version))
    for data in gathered(params, config, dtype):
        sink.write(data)
    sink.finish()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_the_file_is_what_an_export_has(configs, family, dtype, tmp_path):
    config = configs[family]
    params = sharded(config)
    write(tmp_path / "pushed.safetensors", params, config, dtype)
    export(tmp_path / "export", params, config=config, hf_config={"torch_dtype": dtype}, dtype=dtype)
    with (
        safe_open(tmp_path / "pushed.safetensors", "numpy") as pushed,
        safe_open(tmp_path / "export" / "model.safetensors", "numpy") as exported,
    ):
        assert pushed.metadata() == {"format": "pt", "version": "7"}
        assert set(pushed.keys()) == set(exported.keys())
        for name in pushed.keys():
            ours, theirs = pushed.get_tensor(name), exported.get_tensor(name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    size = (tmp_path / "pushed.safetensors").stat().st_size
    assert size == len(header_of(params, config, dtype, 7)) + data_bytes(params, config, dtype)


def test_a_mesh_changes_no_byte(configs, tmp_path):
    config = configs["qwen3"]
    for name, shape in {"one": {}, "many": {"mesh_fsdp": 4, "mesh_tensor": 2}}.items():
        write(tmp_path / name, sharded(config, **shape), config, "float32")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()


def test_the_next_version_takes_the_same_pages(tmp_path):
    path, inodes = tmp_path / "w", set()
    for data in (b"first", b"2", b"the third"):
        sink = FileSink(str(path))
        sink.write(data[:1])
        assert not path.exists()
        sink.write(memoryview(data[1:]))
        sink.finish()
        assert path.read_bytes() == data
        inodes.add(path.stat().st_ino)
    assert len(inodes) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    broken = FileSink(str(path))
    broken.write(b"half")
    broken.abort()
    assert os.listdir(tmp_path) == []


def test_an_upload_is_one_request():
    with listening(lambda *_: {"ok": True}) as server:
        sink = UploadSink(server.url, "key", "w.safetensors", 4, 5)
        sink.write(b"12")
        sink.write(memoryview(b"34"))
        sink.finish()
    assert server.requests == [("/r1jax/weights/w.safetensors", 1234)]
    assert server.headers[0]["Authorization"] == "Bearer key"


@pytest.mark.parametrize(
    ("answer", "line"),
    [((507, b"disk full"), "the upload was answered 507: disk full"), (HANG, "no answer to the upload")],
)
def test_an_upload_that_is_not_taken_raises(answer, line):
    with listening(lambda *_: answer) as server:
        sink = UploadSink(server.url, "key", "w.safetensors", 2, 0.3)
        sink.write(b"12")
        with pytest.raises(OSError, match=line):
            sink.finish()
        sink.abort()
