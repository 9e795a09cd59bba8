"""`hpo report`: what the file holds, what it leaves out, and that wrong use writes nothing."""

from __future__ import annotations

import csv
import json
import platform
import re
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from benchmarks import large_study
from hpo.spec.failures import Kind
from hpo.storage.connect import Storage, plain_url
from hpo.view.report import output, page
from hpo.view.report.figures import of_curves, of_parameters
from tests.analysis.test_confirmation import enlisted, own_study, read, worked
from tests.cli.test_commands import Hpo, hpo
from tests.support import trials

__all__ = ["hpo"]
EVIL = "</script><script>window.evil = 1</script><img src=x onerror='window.evil = 2'>&%{x}$x$"
SECTIONS = [
    "verdict",
    "leaders",
    "health",
    "history",
    "curves",
    "importance",
    "slices",
    "contours",
    "parallel",
    "pruning",
    "winner",
]
SECTIONS += ["failures", "cost", "receipts"]


def made(place: Storage, folder: Path, count: int = 120) -> str:
    """Make a declared study of so many trials, of which 30 run; return the storage's URL."""
    large_study.make(plain_url(place.url), folder, count)
    return plain_url(place.url)


def figures_in(written: str) -> dict[str, Any]:
    (block,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', written, re.DOTALL)
    found: dict[str, Any] = json.loads(block)
    return found


def sections_in(written: str, place: int = 0) -> list[str]:
    return re.findall(rf'<section id="s{place}-([a-z]+)"', written)


def rows_in(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def evil_study(place: Storage, folder: Path) -> None:
    """Make a study with markup in its name, in a parameter, its choices and a failure's message."""
    study = trials.make(place, folder, name=f"demo {EVIL}", budget={"trials": 40}, direction="minimize")
    for number in range(24):
        _, _, trial = trials.begin(study)
        trial.suggest_categorical(f"kind {EVIL}", [EVIL, "/home/somebody/data.csv", "plain"])
        trial.suggest_float("x", 0.0, 1.0)
        trial.report(float(number), 1)
        trials.end_trial(trial, TrialState.COMPLETE, float(number))
    trials.run(study, kind=Kind.EXCEPTION, reason=f"{EVIL} in /home/somebody/project/train.py on {platform.node()}")


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_a_page_holds_each_section_and_asks_for_nothing(hpo: Hpo, lite: Storage, tmp_path: Path) -> None:
    """The demo's kind of study: curves, failures, pruned, running and parked trials, receipts."""
    url = made(lite, tmp_path)
    code, said, err = hpo("report", "large", "--storage", url)
    assert (code, err) == (0, "")
    written = (tmp_path / "report.html").read_text()
    assert said == f"wrote report.html: large, {len(written.encode()) / 1e6:.1f} MB\n"
    assert sections_in(written) == SECTIONS
    assert "30 running" in written
    assert "Not confirmed" in written
    assert "<strong>failures</strong>" in written, "of the health checks"
    found = figures_in(written)
    shown = re.findall(r'data-figure="([^"]+)"', written)
    assert sorted(found) == sorted(shown) == sorted(set(shown))
    assert {name.split("-")[1] for name in found} == {
        "by",
        "curves",
        "importance",
        "slice",
        "contour",
        "parallel",
        "winner",
    }
    assert [
        link for link in re.findall(r"(?:src|href)=[\"']?([^\"'>\s]+)", written.partition("<main>")[0]) if ":" in link
    ] == ["data:,"]
    assert hpo("report", "large", "--storage", url)[1].startswith("replaced report.html")


def test_figures_are_capped_however_many_trials_there_are(lite: Storage, tmp_path: Path) -> None:
    """600 trials: 300 curves in three traces, 500 points in a slice, a grid of 40 by 40."""
    from hpo.study import plain
    from hpo.view.report import reading

    study = optuna.create_study(storage=lite.optuna, study_name="theirs")
    space = {name: FloatDistribution(0.0, 1.0) for name in "abc"}
    study.add_trials(
        [
            create_trial(
                params={"a": (n % 97) / 97, "b": (n % 31) / 31, "c": (n % 7) / 7},
                distributions=space,
                value=(n % 97) / 97 + 0.1 * ((n * 7919) % 13),
                intermediate_values={0: 3.0, 1: 2.0},
            )
            for n in range(600)
        ]
    )
    report = reading.read(plain.open_any(lite, "theirs"))
    assert len(report.curves) == 300
    (curves,) = of_curves.curves(report)
    assert [len(trace["x"]) for trace in curves.data] == [299 * 3, 3], "each curve has two points and a gap"
    assert {len(one.data[0]["x"]) for one in of_parameters.slices(report)} == {of_parameters.MOST_IN_SLICE}
    assert [one.data[0]["z"].shape for one in of_parameters.contours(report)] == [(40, 40)] * 3
    (lines,) = of_parameters.parallel(report)
    assert sum(len(trace["x"]) for trace in lines.data) == of_parameters.MOST_LINES * 5


def test_several_studies_stand_beside_each_other(hpo: Hpo, lite: Storage, tmp_path: Path) -> None:
    for name, values in (("one", [3.0, 2.0, 1.0]), ("two", [2.5, 2.0])):
        study = trials.make(lite, tmp_path, name=name)
        for value in values:
            trials.run(study, value)
    assert hpo("report", "one", "two", "-o", "both.html", "--storage", plain_url(lite.url))[0] == 0
    written = (tmp_path / "both.html").read_text()
    assert sections_in(written, 2) == ["compared"]
    assert "verdict" in sections_in(written, 0)
    assert "verdict" in sections_in(written, 1)
    lines = figures_in(written)["2-compared-0-epochs"]["data"]
    assert [(line["name"], line["y"]) for line in lines] == [("one", [3, 3]), ("two", [2.5, 2.5])]


def test_several_objectives_have_a_front_and_no_winner(hpo: Hpo, lite: Storage, tmp_path: Path) -> None:
    study = optuna.create_study(storage=lite.optuna, study_name="theirs", directions=["minimize", "maximize"])
    space = {"x": FloatDistribution(0.0, 1.0)}
    study.add_trials(
        [create_trial(params={"x": n / 30}, distributions=space, values=[n / 30, (n % 10) / 10]) for n in range(30)]
    )
    assert hpo("report", "theirs", "--storage", plain_url(lite.url))[0] == 0
    written = (tmp_path / "report.html").read_text()
    assert sections_in(written)[:3] == ["verdict", "leaders", "front"]
    assert "winner" not in sections_in(written)
    (front,) = [trace for trace in figures_in(written)["0-front-0-1"]["data"] if trace["name"] == "Pareto front"]
    assert front["customdata"] == list(range(10))
    assert [name for name in figures_in(written) if "importance" in name] == ["0-importance-0", "0-importance-1"]


def test_a_study_without_a_complete_trial_is_told_with_its_failures(hpo: Hpo, lite: Storage, tmp_path: Path) -> None:
    trials.run(trials.make(lite, tmp_path), kind=Kind.EXCEPTION, reason="no luck")
    assert hpo("report", "demo", "--storage", plain_url(lite.url))[0] == 0
    written = (tmp_path / "report.html").read_text()
    assert sections_in(written) == ["verdict", "importance", "failures", "cost", "receipts"]
    assert "There is no result: no trial is complete yet." in written
    assert "no luck" in written


OWN = 'def objective(trial):\n    return trial.suggest_float("x", 0.0, 1.0)\n'


def test_a_confirmation_leads_with_its_verdict(hpo: Hpo, lite: Storage, tmp_path: Path) -> None:
    source = own_study(lite, tmp_path, OWN, trials=4)
    sister = enlisted(source, top=2, runs=3, delta=0.001)
    assert hpo("report", "own", "--storage", plain_url(lite.url))[0] == 0
    assert "The confirmation is not over: 0 of 6 runs have ended." in (tmp_path / "report.html").read_text()
    worked(sister)
    leader = read(source).verdict.leader
    assert hpo("report", "own", "--storage", plain_url(lite.url))[0] == 0
    written = (tmp_path / "report.html").read_text()
    assert sections_in(written)[:3] == ["verdict", "confirmed", "leaders"]
    assert f"Trial {leader} is the best of the leaders (error at most 10%)." in written
    assert "hpo export own --confirmed" in written
    runs, seen, means = figures_in(written)["0-confirmed-0"]["data"]
    assert (len(runs["x"]), len(seen["x"]), len(means["x"])) == (6, 2, 2)
    assert hpo("report", "own", "--format", "json", "--storage", plain_url(lite.url))[0] == 0
    (told,) = json.loads((tmp_path / "report.json").read_text())["studies"]
    assert told["confirmation"]["verdict"]["leader"] == leader
    assert hpo("report", "own/confirm", "-o", "sister.html", "--storage", plain_url(lite.url))[0] == 0
    of_sister = (tmp_path / "sister.html").read_text()
    assert "These are the runs that confirm study own." in of_sister
    assert "hpo confirm" not in of_sister


def test_the_other_formats_hold_the_same_numbers(hpo: Hpo, lite: Storage, tmp_path: Path) -> None:
    url = made(lite, tmp_path, 60)
    assert hpo("report", "large", "-o", "large.csv", "--storage", url)[0] == 0
    rows = rows_in(tmp_path / "large.csv")
    assert [int(row["trial"]) for row in rows] == list(range(60))
    assert hpo("report", "large", "--format", "json", "--storage", url)[0] == 0
    (told,) = json.loads((tmp_path / "report.json").read_text())["studies"]
    complete = [row for row in rows if row["state"] == "complete"]
    assert told["summary"]["counts"]["complete"] == len(complete)
    best = max(complete, key=lambda row: (float(row["accuracy"]), -int(row["trial"])))
    assert told["leaders"][0]["trial"] == int(best["trial"])
    assert told["leaders"][0]["params"]["optimizer.lr"] == float(best["optimizer.lr"])
    assert told["cost"]["epochs"] == sum(int(row["steps"]) for row in rows)
    assert hpo("report", "large", "-o", "large.png", "--storage", url)[0] == 0
    assert (tmp_path / "large.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_cell_is_no_formula_for_a_spreadsheet(hpo: Hpo, lite: Storage, tmp_path: Path) -> None:
    study = optuna.create_study(storage=lite.optuna, study_name="=cmd()")
    space = {"c": CategoricalDistribution(["+1", "-"])}
    study.add_trial(create_trial(params={"c": "+1"}, distributions=space, value=-1.0))
    assert hpo("report", "-o", "t.csv", "--storage", plain_url(lite.url), "--", "=cmd()")[0] == 0
    (row,) = rows_in(tmp_path / "t.csv")
    assert (row["study"], row["c"], row["value"]) == ("'=cmd()", "'+1", "-1.0")


# --- what is not in it ------------------------------------------------------------------------------------------------


def test_hosts_users_paths_and_the_storage_are_left_out_unless_asked_for(
    hpo: Hpo, lite: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "alice-of-r-and-d")
    url = made(lite, tmp_path, 60)
    study = trials.make(lite, tmp_path, name="own", direction="minimize")
    message = f"{tmp_path}/mine.py of alice-of-r-and-d on host-2: {url} /home/bob/secret/data.csv"
    trials.run(study, kind=Kind.EXCEPTION, reason=message)
    hidden = [
        platform.node(),
        str(tmp_path),
        "alice-of-r-and-d",
        "host-0",
        "host-2",
        "bob",
        "sqlite://",
        "/no-such-folder",
    ]
    for format in ("html", "json", "csv"):
        file = tmp_path / f"report.{format}"
        assert hpo("report", "large", "own", "--format", format, "--storage", url)[0] == 0
        written = file.read_text().replace(page.PLOTLY.read_text(), "")
        assert [word for word in hidden if word in written] == [], format
        if format != "csv":
            assert "data.csv" in written, "the last part of a path is kept"
            assert hpo("report", "large", "own", "--format", format, "--storage", url, "--full")[0] == 0
            assert [word for word in ("host-", "bob", str(tmp_path)) if word not in file.read_text()] == []


def test_foreign_text_is_escaped_wherever_it_stands(hpo: Hpo, lite: Storage, tmp_path: Path) -> None:
    evil_study(lite, tmp_path)
    name = f"demo {EVIL}"
    assert hpo("report", name, "--storage", plain_url(lite.url))[0] == 0
    written = (tmp_path / "report.html").read_text()
    assert "window.evil = 1</script>" not in written
    assert "<img" not in written.replace(page.PLOTLY.read_text(), "")
    assert len(re.findall(r"<script[ >]", written.replace(page.PLOTLY.read_text(), ""))) == 3, "data, plotly, our own"
    for figure in figures_in(written).values():
        assert "<script" not in json.dumps(figure)
        assert "<img" not in json.dumps(figure)
    assert "&lt;/script&gt;&lt;script&gt;window.evil = 1" in written


# --- bad use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "pdf"], "error: --format pdf: there is no such format (known: csv, html, json, png)\n"),
        (["-o", "a.htlm"], "error: a.htlm: the suffix .htlm: there is no such format (did you mean 'html'?)\n"),
        (["-o", "none/a.html"], "error: none/a.html: there is no folder none; make it, or name another file with -o\n"),
        (
            ["-o", "/sys/a.html"],
            "error: /sys/a.html: cannot be written: Permission denied; name another file with -o\n",
        ),
        (["-o", "."], "error: .: is a folder; name a file with -o\n"),
        (["demo"], "error: study 'demo' is named twice; name each study once\n"),
        (["other"], "error: there is no study 'other' in "),
        (["empty"], "error: study 'empty' has no trial that has begun, so there is nothing to report; "),
    ],
)
def test_wrong_use_gets_a_clear_error_and_writes_nothing(
    hpo: Hpo, lite: Storage, tmp_path: Path, arguments: list[str], message: str
) -> None:
    trials.run(trials.make(lite, tmp_path), 0.5)
    trials.make(lite, tmp_path, name="empty")
    before = sorted(tmp_path.iterdir())
    code, said, err = hpo("report", "demo", *arguments, "--storage", plain_url(lite.url))
    assert (code, said) == (2, "")
    assert err.startswith(message), err
    assert sorted(tmp_path.iterdir()) == before


def test_without_matplotlib_a_picture_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.spec.extras.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(output, "find_spec", lambda name: None)
    with pytest.raises(Exception, match=r"png: needs matplotlib, which is not installed: pip install"):
        output.choose(None, "png")
