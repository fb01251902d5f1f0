"""The files in deploy/: what Docker would be told exists, is allowed and can be parsed. No image is built here."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.commands import check_command
from mira import config
from mira.fleet.site.source import source_of

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
SITES = ("hospital-1", "hospital-2", "hospital-3")
HEALTH = runpy.run_path(str(DEPLOY / "health.py"))


def mounts(service: str) -> dict[str, str]:
    """The mounts, by place."""
    return {
        place: source for source, place in (each.split(":")[:2] for each in COMPOSE["services"][service]["volumes"])
    }


@pytest.mark.parametrize("service", COMPOSE["services"])
def test_a_service_can_write_to_its_volumes_alone(service: str) -> None:
    given = COMPOSE["services"][service]
    assert given["read_only"] is True
    assert given["user"] == "10001:10001"
    assert given["cap_drop"] == ["ALL"]
    assert given["security_opt"] == ["no-new-privileges:true"]
    assert not {"privileged", "cap_add", "environment", "env_file", "network_mode", "pid"} & given.keys()
    for place, source in mounts(service).items():
        if source.startswith("."):
            assert (DEPLOY / source).exists()
            assert f"{source}:{place}:ro" in given["volumes"]
        else:
            assert source in COMPOSE["volumes"]
            assert re.search(rf"mkdir .*{place}\b", DOCKERFILE), "a volume has the owner of its place in the image"


def test_nobody_shares_a_key_or_a_state() -> None:
    owned = [
        source for name in COMPOSE["services"] for place, source in mounts(name).items() if place in ("/kit", "/state")
    ]
    assert len(owned) == len(set(owned)) == 7


@pytest.mark.parametrize("run", [None, "--resume /runs/trial"])
@pytest.mark.parametrize("service", COMPOSE["services"])
def test_the_commands_are_those_of_mira(service: str, run: str | None) -> None:
    command = re.sub(r"\$\{MIRA_RUN:-([^}]*)\}", run or r"\1", COMPOSE["services"][service]["command"])
    check_command(f"mira {command}")
    paths = [word for word in shlex.split(command) if word.startswith("/")]
    assert paths
    assert all(any(Path(path).is_relative_to(place) for place in mounts(service)) for path in paths)


def test_the_commands_for_the_keys_are_those_of_mira() -> None:
    commands = re.findall(r"mira [^\"&]+", (DEPLOY / "keys.sh").read_text(encoding="utf-8"))
    assert len(commands) == 4
    for command in commands:
        check_command(command.replace("$site", SITES[0]))


def test_an_image_is_pinned_and_copies_what_there_is() -> None:
    targets = dict(re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)[::-1])
    bases = {base for base in targets if ":" in base}
    assert bases
    assert all(re.fullmatch(r"\S+:\d+\.\d+\.\d+-\S+", base) for base in bases)
    asked = {service["build"]["target"] for service in COMPOSE["services"].values()}
    assert asked <= set(re.findall(r" AS (\S+)$", DOCKERFILE, re.MULTILINE))
    allowed = (DEPLOY.parent / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [line.split()[1:-1] for line in re.findall(r"^(COPY (?!--from).*)$", DOCKERFILE, re.MULTILINE)]
    for file in (name.removeprefix("./") for names in copied for name in names):
        assert (DEPLOY.parent / file).exists()
        assert f"!{file}" in allowed


def test_a_new_volume_of_the_page_is_its_users_own() -> None:
    """Docker gives a new volume the owner of its place in the image, and to root where the image has no such place."""
    page = (DEPLOY.parent / "docs" / "containers.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:docker run|confined) .*$", page, re.MULTILINE)
    volumes = [(command, place) for command in commands for place in re.findall(r" -v [\w-]+:(/[^ :]+)", command)]
    assert {place for _, place in volumes} == {"/home/mira/.cache", "/kit", "/state", "/cache"}
    for command, place in volumes:
        image = (DEPLOY if " mira-site " in command else DEPLOY.parent) / "Dockerfile"
        assert re.search(rf"mkdir .*{re.escape(place)}(\s|$)", image.read_text(encoding="utf-8"), re.MULTILINE), command


def test_a_site_on_its_own_is_confined_as_in_the_trial() -> None:
    page = (DEPLOY.parent / "docs" / "containers.md").read_text(encoding="utf-8")
    [alias] = re.findall(r"^alias confined='(.*)'$", page, re.MULTILINE)
    assert {"--read-only", "--cap-drop ALL", "--security-opt no-new-privileges"} <= set(
        re.findall(r"--\S+(?: [^-]\S+)?", alias)
    )
    commands = re.findall(r"^confined .* mira-site ([a-z].*)$", page, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        check_command(f"mira {command}")


def test_models_of_the_page_are_put_where_an_image_looks() -> None:
    page = (DEPLOY.parent / "docs" / "containers.md").read_text(encoding="utf-8")
    [home] = re.findall(r"^ENV .*\bHOME=(\S+)", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"-xf - -C (\S+) < models.tar", page) == [home, home]


def test_the_trial_has_enough_data() -> None:
    split = config.load(DEPLOY / "trial.yaml").split
    for name in SITES:
        [client] = source_of(DEPLOY / mounts(name)["/data"]).load(0)
        assert client.name == name
        assert len(client.examples) >= split.train + split.validation + split.test


def test_the_health_of_a_server_is_its_gate() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert HEALTH["server"](port) is None
    assert HEALTH["server"](port).startswith(f"no gate at port {port}: ")


def test_the_health_of_a_site_is_its_worker_and_its_node(tmp_path: Path) -> None:
    """A part that ends at its start and is started again does not count."""
    (tmp_path / "uptime").write_text("1000.00 1.00\n")

    def running(number: int, module: str, seconds: int) -> None:
        (tmp_path / str(number)).mkdir(exist_ok=True)
        (tmp_path / str(number) / "cmdline").write_text("\0".join(["python", "-P", "-m", module, "--name", "x"]) + "\0")
        ticks = (1000 - seconds) * os.sysconf("SC_CLK_TCK")
        (tmp_path / str(number) / "stat").write_text(f"{number} (a (b) c) {'S ' * 19}{ticks} 0 0\n")

    running(7, "mira.fleet.site.worker", seconds=60)
    assert HEALTH["site"](tmp_path) == "not running: node"
    running(9, "mira.fleet.flower.node", seconds=3)
    assert HEALTH["site"](tmp_path) == "not running: node"
    running(9, "mira.fleet.flower.node", seconds=60)
    assert HEALTH["site"](tmp_path) is None
    assert HEALTH["_started"](Path("/proc/self")) > 0
    assert all(find_spec(module) for module in HEALTH["_PARTS"])
