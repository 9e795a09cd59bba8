"""There is no Docker engine where tests run, so what can be known without one is held here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from hpo import cli

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text())["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "hpo"}
COMMANDS = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]


def read_by_code() -> set[str]:
    """Return the HPO_* variables that our packages name."""
    sources = [file.read_text() for package in ("hpo", "data", "models") for file in (ROOT / package).rglob("*.py")]
    return set(re.findall(r"""["'](HPO_[A-Z_]+)["']""", "\n".join(sources)))


def options_of(command: click.Command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts if option.startswith("-")}


def test_the_file_follows_the_compose_specification() -> None:
    arguments = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_there_are_a_database_a_study_workers_and_a_dashboard() -> None:
    assert set(SERVICES) == {"postgres", "study", "worker", "dashboard"}


@pytest.mark.parametrize("service", sorted(OURS))
def test_each_command_and_option_exists(service: str) -> None:
    name, *arguments = OURS[service]["command"]
    assert name in COMMANDS
    used = {argument for argument in arguments if argument.startswith("-")}
    assert used <= options_of(COMMANDS[name])


@pytest.mark.parametrize("service", sorted(OURS))
def test_each_command_line_is_accepted_by_the_parser(service: str) -> None:
    name, *arguments = OURS[service]["command"]
    COMMANDS[name].make_context(name, [filled(argument) for argument in arguments])


def filled(text: str) -> str:
    """Return a value of the file as Compose fills it in when nothing is set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def test_each_variable_of_ours_is_read_by_the_code() -> None:
    set_for_services = {name for service in OURS.values() for name in service["environment"]}
    set_in_image = set(re.findall(r"\b(HPO_\w+)=", DOCKERFILE))
    assert {name for name in set_for_services | set_in_image if name.startswith("HPO_")} <= read_by_code()


def test_each_variable_that_is_filled_in_is_explained_at_the_top() -> None:
    head, _, body = COMPOSE.read_text().partition("\nname: hpo")
    for name in set(re.findall(r"\$\{(\w+)", body)):
        assert re.search(rf"\b{name}\b", head), name


def test_the_study_file_that_is_meant_when_nothing_is_set_is_there() -> None:
    path = Path(filled(OURS["study"]["command"][1]))
    folder = filled(next(volume for volume in OURS["study"]["volumes"] if ":/code" in volume)).split(":")[0]
    assert path.parent == Path("/code")
    assert (ROOT / folder / path.name).is_file()


def test_the_password_is_asked_for_and_never_stands_in_the_file() -> None:
    assert SERVICES["postgres"]["environment"]["POSTGRES_PASSWORD"].startswith("${POSTGRES_PASSWORD:?")
    for service in OURS.values():
        assert service["environment"]["PGPASSWORD"].startswith("${POSTGRES_PASSWORD:?")
        assert service["environment"]["HPO_STORAGE"] == "postgresql://hpo@postgres/hpo"


def test_only_the_dashboard_is_published_and_only_on_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert list(published) == ["dashboard"]
    (port,) = published["dashboard"]
    assert port.startswith("127.0.0.1:")
    inside = OURS["dashboard"]["command"][OURS["dashboard"]["command"].index("--port") + 1]
    assert port.endswith(f":{inside}")
    assert "--write" not in OURS["dashboard"]["command"]


def test_workers_can_be_scaled_have_a_gpu_and_time_to_park() -> None:
    worker = OURS["worker"]
    assert "container_name" not in worker
    assert "ports" not in worker
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert worker["stop_signal"] == "SIGTERM"
    assert worker["stop_grace_period"] == "5m"


def test_the_study_is_made_before_anything_uses_it() -> None:
    """The study is made on a ready database and before anything uses it."""
    assert OURS["study"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert "healthcheck" in SERVICES["postgres"]
    for name in ("worker", "dashboard"):
        assert OURS[name]["depends_on"] == {"study": {"condition": "service_completed_successfully"}}


def test_what_must_last_is_in_named_volumes_and_user_code_is_read_only() -> None:
    volumes = yaml.safe_load(COMPOSE.read_text())["volumes"]
    assert set(volumes) == {"postgres", "checkpoints"}
    assert SERVICES["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]
    for service in OURS.values():
        assert f"checkpoints:{service['environment']['HPO_CHECKPOINTS']}" in service["volumes"]
        assert "${HPO_CODE:-./examples}:/code:ro" in service["volumes"]


def test_the_image_copies_every_package_of_the_wheel_and_what_pip_needs() -> None:
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert sources == {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "docker-compose.yml",
        "hpo",
        "models",
        "data",
        "constraints.txt",
    }
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == sources
    assert all((ROOT / source).exists() for source in sources)


def test_the_image_runs_hpo_as_an_ordinary_user() -> None:
    assert re.search(r"^FROM python:3\.12-slim$", DOCKERFILE, re.MULTILINE)
    assert DOCKERFILE.rstrip().endswith('ENTRYPOINT ["hpo"]')
    assert re.search(r"^USER hpo$", DOCKERFILE, re.MULTILINE)
    assert "PYTHONSAFEPATH=1" in DOCKERFILE
