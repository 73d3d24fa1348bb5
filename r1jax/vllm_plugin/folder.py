"""The one directory that a server takes weights from: private, named when the server starts, never left by a name."""

import os
import re
import stat

VARIABLE = "R1JAX_VLLM_SYNC_DIR"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.safetensors")


class Refused(Exception):
    """Something that a caller may not do, or a file that does not fit; its text goes back to the caller."""


def sync_folder() -> str:
    """The directory's real path; raises `Refused` unless it is this user's alone."""
    given = os.environ.get(VARIABLE)
    if not given:
        raise Refused(f"{VARIABLE}: need a directory, got nothing; start the server with launch/vllm_server.sh")
    folder = os.path.realpath(given)
    if not os.path.isdir(folder):
        raise Refused(f"{VARIABLE}: need a directory, got {given}; make it with mode 0700")
    about = os.stat(folder)
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
        mode = f"{stat.S_IMODE(about.st_mode):04o} of user {about.st_uid}"
        raise Refused(f"{VARIABLE}: need a directory of mode 0700 and the server's own, got {mode}; chmod 700 {folder}")
    return folder


def path_of(name: object, folder: str) -> str:
    """Where a file of this name lies in the directory; raises `Refused` for a name that could lead out of it."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise Refused("file: need a plain name that ends in .safetensors, got another; nothing else is opened")
    path = os.path.join(folder, name)
    # The directory is real already, so only the file itself can be a link.
    if os.path.realpath(path) != path:
        raise Refused(f"file: need a file of the directory itself, got {name}, which is a link; write the file there")
    return path
