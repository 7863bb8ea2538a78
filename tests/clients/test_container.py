"""What can be checked of Dockerfile and compose.yaml without Docker: their commands are parsed, their probes run."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from qpeft.cli import read

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVICE = COMPOSE["services"]["qpeft"]


def instruction(name):
    """Return the last instruction of that name, whose arguments must be in exec form."""
    return json.loads(re.findall(rf"^{name}\b.*?(\[.*\])$", DOCKERFILE, re.M)[-1])


def settings(arguments):
    assert arguments[0] == "serve"
    _, configs = read([re.sub(r"\$\{\w+:-(.*?)\}", r"\1", argument) for argument in arguments])
    return configs


def test_the_server_is_the_first_process_and_listens_on_the_exposed_port():
    assert instruction("ENTRYPOINT") == ["qpeft"]
    for arguments in (instruction("CMD"), SERVICE["command"]):
        config, model = settings(arguments)
        assert (config.host, config.port, model.model) == ("0.0.0.0", 8080, "tiny-lm")
    assert re.search(r"^EXPOSE 8080$", DOCKERFILE, re.M)
    assert SERVICE["ports"] == ["${QPEFT_PUBLISH:-127.0.0.1:8080}:8080"]


def test_mounts_are_where_the_command_looks():
    config, _ = settings(SERVICE["command"])
    assert SERVICE["volumes"] == ["models:/models", f"${{QPEFT_ADAPTERS:-./adapters}}:{config.adapters}:ro"]
    assert config.api_key_file == f"/run/secrets/{SERVICE['secrets'][0]}"
    assert SERVICE["secrets"] == list(COMPOSE["secrets"])
    assert "HF_HOME=/models" in DOCKERFILE


def test_there_is_time_to_drain():
    config, _ = settings(SERVICE["command"])
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > config.drain_timeout


@pytest.mark.parametrize(
    ("command", "path"),
    [(instruction("HEALTHCHECK"), "/health"), (SERVICE["healthcheck"]["test"][1:], "/ready")],
    ids=["Dockerfile", "compose.yaml"],
)
def test_probes(command, path, url):
    assert command[:2] == ["python", "-c"]
    assert f"'{path}'" in command[2]

    def outcome(port):
        code = command[2].replace("8080", str(port))
        return subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode

    assert outcome(url.rpartition(":")[2]) == 0
    assert outcome(1) != 0, "nobody listens there"


def test_the_image_gets_what_it_copies_and_extras_that_exist():
    kept = set(re.findall(r"^!(.*)$", (ROOT / ".dockerignore").read_text(), re.M))
    copied = {name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M) for name in line.split()}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= copied
    (extras,) = re.findall(r"'\.\[(.*)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


def test_no_root_and_no_address_of_an_index():
    assert int(re.findall(r"^USER (.*)$", DOCKERFILE, re.M)[-1]) > 0
    assert "://" not in DOCKERFILE
