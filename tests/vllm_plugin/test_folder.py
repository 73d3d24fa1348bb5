import pytest

from r1jax.vllm_plugin.folder import VARIABLE, Refused, path_of, sync_folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    made = tmp_path / "sync"
    made.mkdir(mode=0o700)
    monkeypatch.setenv(VARIABLE, str(made))
    return made


def test_a_plain_name_is_a_file_of_the_directory(folder):
    assert path_of("weights-1.safetensors", sync_folder()) == str(folder / "weights-1.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../x.safetensors",
        "a/x.safetensors",
        "x",
        "",
        ".safetensors",
        "x.safetensors\n",
        None,
        3,
        "ü.safetensors",
    ],
)
def test_no_name_leads_out(folder, name):
    with pytest.raises(Refused, match=r"need a plain name"):
        path_of(name, sync_folder())


def test_links_lead_nowhere(folder, tmp_path):
    (tmp_path / "secret.safetensors").write_text("x")
    (folder / "a.safetensors").symlink_to(tmp_path / "secret.safetensors")
    (folder / "b.safetensors").symlink_to(folder / "missing.safetensors")
    for name in ("a.safetensors", "b.safetensors"):
        with pytest.raises(Refused, match=r"which is a link"):
            path_of(name, sync_folder())


def test_the_directory_itself_may_be_reached_by_a_link(folder, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "link"))
    assert sync_folder() == str(folder)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_see_is_refused(folder, mode):
    folder.chmod(mode)
    with pytest.raises(Refused, match=rf"need a directory of mode 0700 and the server's own, got 0{mode:o}"):
        sync_folder()


def test_no_directory(folder, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(folder / "none"))
    with pytest.raises(Refused, match=r"need a directory, got"):
        sync_folder()
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(Refused, match=r"got nothing; start the server with launch/vllm_server.sh"):
        sync_folder()
