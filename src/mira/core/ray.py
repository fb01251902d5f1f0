"""Connection to a Ray cluster, and what its errors mean. Ray, an extra, is imported only when it is asked for."""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mira.core.errors import UserError
from mira.core.threads import usable_cores

log = logging.getLogger(__name__)

AUTO = "auto"
_LOCAL = "local"  # Ray's word for a new cluster
_CLIENT = "ray://"
_MODE = "RAY_AUTH_MODE"
_LIMIT = 10.0  # seconds that a cluster has to answer; Ray itself waits for minutes
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_OUT_OF_MEMORY = ("NODE_OUT_OF_MEMORY", "low on memory", "due to memory pressure")
_ERROR = re.compile(r"[\w.]+(Error|Exception)\b")


@dataclass(frozen=True)
class Connection:
    """A connection of this process to a Ray cluster, for ``with``. ``ours``: it was made here and not before by the caller.
    ``mode``: the kind of authentication that this process had before; None: none was set."""

    ours: bool
    mode: str | None = None

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect; a cluster that ``connect`` started ends, with all of its processes. Nothing where the caller connected."""
        if self.ours:
            import ray

            ray.shutdown()
            _use_mode(self.mode)


def connect(address: str | None, key: str) -> Connection:
    """Connect this process to a Ray cluster.

    ``address``: HOST:PORT, from a node of the cluster; auto, the cluster at RAY_ADDRESS or the one that ``ray start`` began on
    this machine, and where none runs a new one for this process. None: always a new one.
    ``key``: name of the setting, for messages. A process that is connected already keeps its connection.

    Raises UserError: Ray is not installed, the address is none, no cluster answers there within 10 s, or it refuses.
    """
    ray = _ray(key)
    if ray.is_initialized():
        return Connection(ours=False)
    mode = os.environ.get(_MODE)
    try:
        if address == AUTO:
            _find_or_start(ray)
        elif address is None:
            _start(ray)
        else:
            _check_answers(address, key)
            _join(ray, address)
    except UserError:
        raise
    except BaseException as error:
        ray.shutdown()
        _use_mode(mode)
        if not isinstance(error, Exception):
            raise
        raise UserError(f"{key}{f'={address}' if address else ''}: {_reason(error)}") from None
    return Connection(ours=True, mode=mode)


def reason_of(error: Exception) -> str:
    """The reason of an ``error`` that Ray raises, in one line. Where it quotes a traceback, this is the error at its end."""
    cause = getattr(error, "cause", None)  # the exception of the call, where there is one
    if isinstance(cause, UserError):
        return str(cause)
    lines = (str(error) if cause is None else f"{type(cause).__name__}: {cause}").splitlines()
    begins = [n for n, line in enumerate(lines) if _ERROR.match(line)]
    text = " ".join(" ".join(lines[begins[-1] :] if begins else lines).split())
    return text[:300] or type(error).__name__


def failed_start(error: Exception) -> str | None:
    """'on 10.0.0.3: ModuleNotFoundError: …' where ``error`` says that an actor could not be built; else None."""
    if not getattr(error, "actor_init_failed", False):
        return None
    address = re.search(r"\bip=([^,)]+)", str(error))
    return f"{f'on {address[1]}: ' if address else ''}{reason_of(error)}"


def cause_of_death(error: Exception) -> str:
    """The cause of an actor's death in a few words."""
    from ray.exceptions import OutOfMemoryError, RayActorError

    # Of a process that was killed Ray tells in many words that it might have been for memory; so the words of its own guard.
    if isinstance(error, OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
        return "its node ran out of memory"
    return "killed, or its node is gone" if isinstance(error, RayActorError) else reason_of(error)


def _use_mode(mode: str | None) -> None:
    """Let this process use the authentication ``mode``, "token" or none.

    Ray turns tokens on for the whole process when it starts a cluster. A cluster without them could then not call this process:
    its workers would be taken for unused and end.
    """
    if os.environ.get(_MODE) == mode:
        return
    os.environ.pop(_MODE, None)
    if mode is not None:
        os.environ[_MODE] = mode
    raylet: Any = import_module("ray._raylet")  # no public function reads the environment again
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()


def _ray(key: str) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UserError(f"{key}: Ray is not installed; pip install 'mira-fl[ray]'") from None
    return ray


def _find_or_start(ray: Any) -> None:
    told = os.environ.get("RAY_ADDRESS", "")
    if told not in ("", AUTO, _LOCAL):
        _check_answers(told, "RAY_ADDRESS")
        _join(ray, told)
        return
    running = None if told == _LOCAL else _recorded()
    if running is not None and _answers(running):
        _join(ray, running)  # not AUTO: with it Ray also takes a cluster that another process started for itself alone
        return
    _start(ray)


def _join(ray: Any, address: str) -> None:
    if _MODE not in os.environ and _asks_for_token(address):
        _use_mode("token")
    ray.init(address=address, **_QUIET)


def _asks_for_token(address: str) -> bool:
    """True where this machine's node of the cluster at ``address`` uses tokens, as ``ray start`` does by itself where one exists.
    It refuses a process that does not. False where it cannot be told: elsewhere, or a node of another user."""
    place = _place(address)
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if place and any(word.startswith(b"--gcs-address=") and word.endswith(b":%d" % place[1]) for word in words):
                return b"RAY_AUTH_MODE=token" in (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
    return False


def _start(ray: Any) -> None:
    # Ray gives a cluster of this kind a token: without it nobody on the network can run code here.
    ray.init(address=_LOCAL, num_cpus=usable_cores(), include_dashboard=False, **_QUIET)
    log.info("started Ray on this machine: %d cores", usable_cores())


def _recorded() -> str | None:
    """The address of the cluster that ``ray start`` began on this machine; the cluster may have ended since."""
    place = Path(os.environ.get("RAY_TMPDIR", tempfile.gettempdir()), "ray", "ray_current_cluster")
    return place.read_text().strip() or None if place.is_file() else None


def _check_answers(address: str, key: str) -> None:
    """Raises UserError unless ``address`` names a host and a port that accepts connections."""
    if address.startswith(_CLIENT):
        raise UserError(
            f"{key}={address}: Ray Client is not supported; run the command on a node of the cluster, with auto or with HOST:PORT"
            " (usual port 6379)"
        )
    if _place(address) is None:
        raise UserError(f"{key}={address}: give auto or HOST:PORT (usual port 6379)")
    if not _answers(address):
        raise UserError(
            f"{key}={address}: no Ray cluster answers there; start one with 'ray start --head', or give auto for this machine"
        )


def _answers(address: str) -> bool:
    place = _place(address)
    if place is None:
        return False
    try:
        socket.create_connection(place, timeout=_LIMIT).close()
    except OSError:
        return False
    return True


def _place(address: str) -> tuple[str, int] | None:
    """Host and port; None where ``address`` has another form."""
    try:
        parts = urlsplit(f"//{address}")
        port = parts.port
    except ValueError:
        return None
    return (parts.hostname, port) if parts.hostname and port else None


def _reason(error: Exception) -> str:
    """The reason for a refusal, in one line, with its fix where it is a common one."""
    text = " ".join(str(error).split())
    if type(error).__name__ == "AuthenticationError":
        return "the cluster asks for its token; set RAY_AUTH_MODE=token and copy the token of its head to ~/.ray/auth_token"
    if "ersion mismatch" in text:
        return f"{text[:300]}; install the same Python and Ray here and on all nodes"
    return f"Ray cannot connect ({text[:300] or type(error).__name__})"
