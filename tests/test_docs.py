"""README and the documentation say what is so: each command line is one of ours, each TOML block is read."""

from __future__ import annotations

import contextlib
import doctest
import functools
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

from hpo import cli
from hpo.cli.app import ClickException
from hpo.spec.failures import Kind, Policies
from hpo.spec.study_file import StudySpec
from hpo.study import resolve
from tests.support import prose
from tests.support.pages import CONSOLES, blocks, commands, files, pages, spans
from tests.support.paths import ROOT

PAGES = pages()
RELIABILITY = PAGES["docs/reliability.md"].read_text()
GROUP: Any = typer.main.get_command(cli.app)
#: Completes a block that shows a part of a study file.
BASE = tomllib.loads("""
name = "base"
data.name = "digits"
model.name = "mlp"
optimizer = { name = "sgd", lr = { low = 1e-3, high = 1e-1 } }
""")
LANGUAGES = {*CONSOLES, "toml", "python", "pycon"}
of_each_page = pytest.mark.parametrize("page", PAGES.values(), ids=list(PAGES))


# --- blocks -----------------------------------------------------------------------------------------------------------


@of_each_page
def test_every_study_file_is_read_and_every_part_of_one_completes_another(page: Path, tmp_path: Path) -> None:
    for code in (ROOT / "examples").glob("*.py"):
        shutil.copy(code, tmp_path)
    for name, content in files(page).items():
        (tmp_path / name).write_text(content)
    for block in blocks(page):
        if block.language == "toml" and block.title:
            assert resolve.read(tmp_path / block.title).spec.name == tomllib.loads(block.text)["name"]
        elif block.language == "toml":
            part = tomllib.loads(block.text)
            assert part
            resolve.resolve(StudySpec.from_document(BASE | part), tmp_path)
        elif block.language == "python":
            compile(block.text, page, "exec")


def test_a_wrong_part_of_a_study_file_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"data\.rot"):
        resolve.resolve(StudySpec.from_document(BASE | tomllib.loads('data = { name = "digits", rot = 1 }')), tmp_path)


@of_each_page
def test_every_block_is_of_a_language_that_is_checked_or_of_none(page: Path) -> None:
    marked = re.findall(r"^```(\w+)", page.read_text(), re.MULTILINE)
    assert [language for language in marked if language not in LANGUAGES] == []
    assert len(blocks(page)) == len(marked)


@pytest.mark.parametrize("page", [page for page in PAGES.values() if "```pycon" in page.read_text()], ids=str)
def test_a_session_of_python_gives_what_the_page_shows(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page are one session, in a folder with the page's files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPO_STORAGE", raising=False)
    for name, content in files(page).items():
        (tmp_path / name).write_text(content)
    session = "\n".join(block.text for block in blocks(page) if block.language == "pycon")
    test = doctest.DocTestParser().get_doctest(session, {"__name__": "__main__"}, page.name, str(page), 0)
    told: list[str] = []
    found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=told.append)
    assert (found.failed, found.attempted > 0) == (0, True), "".join(told)


# --- commands -------------------------------------------------------------------------------------------------------


def parsed(words: list[str]) -> dict[str, Any]:
    """Return the parameters of a command line of ours, as the command would get them."""
    name, *rest = words
    return dict(GROUP.commands[name].make_context(name, rest).params)


@functools.cache
def made() -> set[str]:
    """Return the files and folders that command lines of the pages write."""
    found: set[str] = set()
    for words in itertools.chain.from_iterable(map(commands, PAGES.values())):
        if words[0] == "hpo" and words[1] in GROUP.commands:
            params = parsed(words[1:])
            found |= {str(params.get("output"))} | ({str(params["file"])} if words[1] == "init" else set())
    return found


def of_ours(words: list[str], page: Path) -> None:
    """Check a command line of `hpo`: its command, its options, and that the files it reads are there or were made."""
    if words[0].startswith("-"):
        assert words[0] in {option for parameter in GROUP.params for option in parameter.opts}
        return
    params = parsed(words)
    read = [str(params[name]) for name in ("file", "config", "folder") if params.get(name)]
    known = made() | set(files(page))
    assert [name for name in read if name not in known and not (ROOT / name).exists()] == []


def of_make(words: list[str], page: Path) -> None:
    (targets,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert words[0] in targets.split()
    assert all(word.startswith("PYTEST=") for word in words[1:])


def of_pip(words: list[str], page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"^\.\[(\w+)\]$", words[2])
    assert (words[:2], wanted in extras) == (["install", "--editable"], True)


def of_python(words: list[str], page: Path) -> None:
    script = ROOT / words[0]
    known = "\n".join(file.read_text() for file in script.parent.glob("*.py"))
    assert script.is_file()
    assert [word for word in words if word.startswith("--") and f'"{word}"' not in known] == []


def of_docker(words: list[str], page: Path) -> None:
    assert (words[0], words[1] in ("up", "run", "stop")) == ("compose", True)
    services = re.findall(r"^  (\w+):", (ROOT / "docker-compose.yml").read_text().partition("\nservices:")[2], re.M)
    named = [word.partition("=")[0] for word in words[2:] if not word.startswith("-")]
    if named:
        assert named[0] in services
        assert words[1] != "run" or parsed(named[1:]) is not None


def of_export(words: list[str], page: Path) -> None:
    source = "".join(file.read_text() for file in (ROOT / "hpo").rglob("*.py"))
    source += (ROOT / "docker-compose.yml").read_text()
    assert words[0].partition("=")[0] in source


def of_others(words: list[str], page: Path) -> None:
    """Getting the repository, activating the environment, and what comes with our dependencies."""


CHECKS: dict[str, Callable[[list[str], Path], None]] = {
    "hpo": of_ours,
    "make": of_make,
    "pip": of_pip,
    "python": of_python,
    "docker": of_docker,
    "export": of_export,
    "git": of_others,
    "source": of_others,
    "tensorboard": of_others,
}


@of_each_page
def test_every_command_line_is_one_that_there_is(page: Path) -> None:
    for program, *words in commands(page):
        CHECKS[program](words, page)


@pytest.mark.parametrize(
    "line", ["run examples/no.toml", "run examples/digits.toml --wrkers 2", "serch", "stop", "status --trial x"]
)
def test_a_wrong_command_line_is_noticed(line: str) -> None:
    with pytest.raises((AssertionError, KeyError, ClickException)):
        of_ours(line.split(), PAGES["README.md"])


@of_each_page
def test_every_command_in_a_sentence_is_one_that_there_is(page: Path) -> None:
    everywhere = {option for parameter in GROUP.params for option in parameter.opts}
    for _, name, *words in spans(page):
        known = {option for one in GROUP.commands[name].params for option in one.opts} if name[0] != "-" else everywhere
        given = [word for word in (name, *words) if word.startswith("-")]
        assert [option for option in given if option not in known] == [], (name, given)


# --- commands that cost little, run for real ------------------------------------------------------------------------

#: Commands that train nothing, once their study is there. `hpo check` measures an epoch and `hpo export` wants a result.
CHEAP = ("init", "status", "pause", "resume", "stop", "doctor", "fork")


def is_cheap(words: list[str]) -> bool:
    if words[0] != "hpo" or "--trial" in words:
        return False
    return words[1] in CHEAP or words[-2:] == ["--workers", "0"]


def write_data(folder: Path) -> None:
    """Write the data that the pages take as an example of one's own: photos of two classes, and a table of prices."""
    for number, name in enumerate(("cat", "dog")):
        (folder / "photos" / name).mkdir(parents=True)
        for photo in range(8):
            Image.new("RGB", (8, 8), (200 * number, 20 * photo, 0)).save(folder / "photos" / name / f"{photo}.png")
    rows = [f"{30 + row * 7 % 40},{'ABC'[row % 3]},{row * 13 % 97}.5" for row in range(60)]
    (folder / "prices.csv").write_text("\n".join(["size,district,price", *rows, ""]))


Hpo = Callable[..., int]


@contextlib.contextmanager
def shell_in(folder: Path) -> Iterator[Hpo]:
    """Give what runs a command in this folder and returns its exit code."""

    def run(*arguments: str) -> int:
        patch.setattr(sys, "argv", ["hpo", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("hpo.storage.connect.PROBE_SECONDS", 0.05)
        for name in ("HPO_STORAGE", "HPO_CHECKPOINTS"):
            patch.delenv(name, raising=False)
        yield run


@pytest.fixture(scope="module")
def made_studies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the studies that the pages speak of, in which nothing has been trained."""
    folder = tmp_path_factory.mktemp("studies")
    for name, content in files(PAGES["docs/own-training.md"]).items():
        (folder / name).write_text(content)
    with shell_in(folder) as hpo:
        assert hpo("init", "my-study.toml") == 0
        for file in (ROOT / "examples" / "digits.toml", Path("my-objective.toml"), Path("my-study.toml")):
            assert hpo("run", str(file), "--workers", "0") == 0
    (folder / "my-study.toml").unlink()  # the pages write it themselves
    return folder


@pytest.fixture
def hpo(tmp_path: Path) -> Iterator[Hpo]:
    """Run a command in an empty folder and return its exit code."""
    with shell_in(tmp_path) as run:
        yield run


@pytest.mark.parametrize("page", [name for name, page in PAGES.items() if any(map(is_cheap, commands(page)))])
def test_the_commands_that_train_nothing_do_as_the_page_says(
    page: str, hpo: Hpo, made_studies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the page's order, in one folder, with the page's files and the studies that it speaks of."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    for name, content in files(PAGES[page]).items():
        (tmp_path / name).write_text(content)
    shutil.copytree(made_studies, tmp_path, dirs_exist_ok=True)
    write_data(tmp_path)
    for words in [words[1:] for words in commands(PAGES[page]) if is_cheap(words)]:
        capsys.readouterr()
        assert (hpo(*words), "error" in capsys.readouterr().err) == (0, False), words


@pytest.mark.parametrize(
    ("line", "completed"),
    [("hpo ru", ["run"]), ("hpo run --st", ["--storage"]), ("hpo s", ["scale", "status", "stop"])],
)
def test_the_shell_completes_commands_and_options(
    line: str,
    completed: list[str],
    hpo: Hpo,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {
        "_HPO_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": len(line.split()) - 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    assert hpo() == 0
    assert capsys.readouterr().out.split() == completed


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_the_readme_is_short_and_names_the_two_commands_of_a_new_machine() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9 * 1024
    assert [words for words in commands(ROOT / "README.md") if words[0] == "make"] == [
        ["make", "demo"],
        ["make", "test"],
    ]


@of_each_page
def test_every_module_that_a_page_names_is_there(page: Path) -> None:
    """Paths stand from the top of the repository or from `hpo/`."""
    assert [
        name for name in modules_in(page.read_text()) if not any((ROOT / top / name).exists() for top in ("", "hpo"))
    ] == []


def modules_in(text: str) -> set[str]:
    return set(re.findall(r"`(\w+(?:/\w+)+\.py)`", text))


def test_the_way_of_one_trial_is_as_short_as_its_page_says() -> None:
    way, _, rest = PAGES["docs/architecture.md"].read_text().partition("\nOnce a trial:\n")[2].partition("\nThese are ")
    assert len(modules_in(way)) == int(rest.split()[0]) <= 20


def test_the_pages_are_in_short_sentences() -> None:
    _, words, semicolons = prose.measure("\n\n".join(page.read_text() for page in PAGES.values()))
    assert (words <= 16, semicolons <= 0.1) == (True, True), (words, semicolons)


def test_how_sentences_are_counted() -> None:
    page = "# Head\n\nOne two `a b c` four. Five; six!\n\n| a | table |\n\n```toml\nx = 1\n```\n\n- An item of [five words](x.md)"
    assert prose.sentences(page) == ["One two code four.", "Five; six!", "An item of five words"]
    assert prose.measure(page) == (3, 11 / 3, 1 / 3)


@pytest.mark.parametrize("name", ["README.md", "docs/commands.md"])
def test_a_table_has_the_commands_in_the_order_of_the_help(name: str) -> None:
    table = PAGES[name].read_text().partition("| command |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1] for row in table.splitlines()[2:]]
    assert list(GROUP.commands) == [name for row in rows for name in re.findall(r"`(?:hpo )?([a-z]+)", row)]


@pytest.mark.parametrize("prefix", sorted(set(re.findall(r"`(test_\w+?)_?\.\.\.`", RELIABILITY))))
def test_every_test_that_the_table_of_faults_names_is_there(prefix: str) -> None:
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert re.search(rf"def {prefix}\w*\(", tests)


def test_every_kind_of_failure_stands_on_the_page_with_its_policy() -> None:
    for kind in Kind:
        (row,) = re.findall(rf"^\| `{kind}`.*", RELIABILITY, re.MULTILINE)
        if kind is Kind.LEASE_LOST:
            continue
        policy = Policies().of(kind)
        _, _, attempts, then, *_ = (cell.strip() for cell in row.split("|"))
        assert attempts.startswith(str(policy.retries) if policy.retries else "none"), row
        assert then.startswith("FAIL" if policy.then == "fail" else "PRUNED"), row


def test_the_template_shows_the_defaults(tmp_path: Path) -> None:
    template = (ROOT / "hpo" / "spec" / "template.toml").read_text()
    file = tmp_path / "study.toml"
    plain = StudySpec.load(_written(file, template))
    shown = re.sub(r"^# ?", "", template[template.index("# [recovery]") :], flags=re.MULTILINE)
    assert StudySpec.load(_written(file, template + shown)).document == plain.document


def _written(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(re.findall(r": (\S+\.md)$", menu, re.MULTILINE)) == sorted(
        page.name for page in (ROOT / "docs").glob("*.md")
    )


def test_the_built_pages_load_nothing_from_another_host(tmp_path: Path) -> None:
    """mermaid would be fetched by a page that has a diagram of it."""
    command = [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--quiet", "--site-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = "\n".join(file.read_text() for file in tmp_path.rglob("*.html"))
    assert re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>", built) == []
    assert re.findall(r"class=[\"']?mermaid", built) == []
    assert len(re.findall(r"<script\b[^>]*src=[\"']?assets/iframe-worker", built)) == len(
        list((ROOT / "docs").glob("*.md"))
    )
