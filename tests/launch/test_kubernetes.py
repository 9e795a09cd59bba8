"""What is rendered for Kubernetes, and what kubectl is asked for. The schemas are held in tests/engines/test_kubernetes.py."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpo.errors import LaunchError, SpecError
from hpo.launch import exit_codes
from hpo.launch.engines import kubernetes
from hpo.launch.engines.kubernetes import ENGINE
from hpo.spec import usercode
from hpo.spec.launch import Launch
from tests.support.requests import PASSWORD, STORAGE, request

Manifest = dict[str, Any]


def rendered(folder: Path, **more: Any) -> dict[str, Manifest]:
    asked = request(folder, **more)
    ENGINE.check(asked)
    return {f"{one['kind']} {one['metadata']['name']}": one for one in yaml.safe_load_all(ENGINE.render(asked))}


def only_job(found: dict[str, Manifest]) -> Manifest:
    [job] = [one for one in found.values() if one["kind"] == "Job"]
    return job


def worker_of(job: Manifest) -> Manifest:
    [container] = job["spec"]["template"]["spec"]["containers"]
    return dict(container)


def test_the_job_is_indexed_and_knows_which_pods_have_failed(tmp_path: Path) -> None:
    found = rendered(tmp_path, kubernetes={"retries": 5, "queue": "team", "namespace": "ml"})
    job = only_job(found)
    assert len(found) == 1
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert job["metadata"]["namespace"] == "ml"
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 4, 4)
    assert (spec["backoffLimitPerIndex"], spec["podReplacementPolicy"]) == (5, "Failed")
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": {"operator": "In", "values": [75, 138, 140, 143]}},
        {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
    ]
    assert set(exit_codes.RUN_AGAIN) == {75, 138, 140, 143}
    pod = spec["template"]["spec"]
    assert (pod["restartPolicy"], pod["automountServiceAccountToken"]) == ("Never", False)
    assert pod["terminationGracePeriodSeconds"] == 45
    assert pod["volumes"] == [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}]
    container = worker_of(job)
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 1}}


def test_nodes_are_chosen_and_resources_asked_for(tmp_path: Path) -> None:
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
    options = {
        "node_selector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
        "tolerations": [toleration],
        "cpu": "8",
        "memory": "32Gi",
        "service_account": "hpo",
        "image": "registry.lab/hpo:1",
        "pull_secrets": ["registry"],
        "env_from": ["hpo-s3"],
        "volumes": {"datasets": "/data"},
    }
    job = only_job(rendered(tmp_path, gpus=2, kubernetes=options))
    pod, container = job["spec"]["template"]["spec"], worker_of(job)
    assert pod["nodeSelector"] == options["node_selector"]
    assert pod["tolerations"] == [toleration]
    assert (pod["serviceAccountName"], pod["automountServiceAccountToken"]) == ("hpo", True)
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert container["image"] == "registry.lab/hpo:1"
    assert container["envFrom"] == [{"secretRef": {"name": "hpo-s3"}}]
    limits = {"memory": "32Gi", "nvidia.com/gpu": 2}
    assert container["resources"] == {"requests": {"cpu": "8", "memory": "32Gi"}, "limits": limits}
    assert {"name": "claim-datasets", "mountPath": "/data"} in container["volumeMounts"]
    assert {"name": "claim-datasets", "persistentVolumeClaim": {"claimName": "datasets"}} in pod["volumes"]


def test_the_password_comes_from_a_secret_and_is_nowhere_else(tmp_path: Path) -> None:
    text = ENGINE.render(request(tmp_path))
    assert PASSWORD not in text
    assert (
        'printf %s "$PGPASSWORD" | kubectl create secret generic hpo-storage --from-file=PGPASSWORD=/dev/stdin' in text
    )
    assert worker_of(yaml.safe_load(text))["env"] == [
        {"name": "HPO_STORAGE", "value": "postgresql://hpo@db.lab:5433/hpo"},
        {"name": "HPO_CHECKPOINTS", "value": "s3://bucket/hpo"},
        {"name": "PGPASSWORD", "valueFrom": {"secretKeyRef": {"name": "hpo-storage", "key": "PGPASSWORD"}}},
    ]
    assert "PGPASSWORD" not in ENGINE.render(request(tmp_path, kubernetes={"secret": ""}))


def test_a_pod_knows_its_slot_and_no_variable_is_found_in_a_name(tmp_path: Path) -> None:
    name = "it's $(PGPASSWORD)"
    first = worker_of(only_job(rendered(tmp_path, study=name)))["command"]
    assert first[:6] == ["hpo", "worker", "--supervised", "--launch", "7", "--slot"]
    assert first[6] == "$(JOB_COMPLETION_INDEX)"
    assert first[-1] == "it's $$(PGPASSWORD)"
    shell, option, later = worker_of(only_job(rendered(tmp_path, study=name, slots=range(4, 6))))["command"]
    assert (shell, option) == ("sh", "-c")
    as_run = later.replace("$$", "$").replace("$((4 + JOB_COMPLETION_INDEX))", "SLOT")  # as a pod's shell gets it
    assert shlex.split(as_run) == ["exec", *first[:6], "SLOT", *first[7:-5], "6", *first[-4:-1], name]


def test_each_launch_and_each_of_its_parts_has_a_name_of_its_own(tmp_path: Path) -> None:
    long, other = "x" * 200, "X" * 200
    asked = [{"launch": None}, {"launch": 1}, {"launch": 1, "slots": range(4, 8)}, {"launch": 2}]
    asked += [{"launch": 1, "uid": "of a deleted study"}]
    names = [
        only_job(rendered(tmp_path, study=study, **more))["metadata"]["name"]
        for study in (long, other)
        for more in asked
    ]
    assert len(set(names)) == 10
    assert max(map(len, names)) <= 57


def test_code_reaches_pods_as_it_is_and_is_read_as_on_this_machine(tmp_path: Path) -> None:
    """A ConfigMap is mounted as links into a folder of links."""
    folder = tmp_path / "code"
    (folder / "lib").mkdir(parents=True)
    content = {
        "mine.py": "from lib.more import x\n\tobjective = 1\n",
        "lib/more.py": "x = 1  # \u200bé\x7f\n",
        "a b.txt": "\0\n",
    }
    content["mine.py"] = "from lib.more import x\n\n\ndef objective(trial):\n\treturn x\n"
    for path, text in content.items():
        (folder / path).write_text(text)
    (folder / "weights.bin").write_bytes(b"\xff\x00")
    (folder / "unnamed.py").write_text("")
    patterns = ["mine.py", "lib/*.py", "a b.txt", "*.bin"]
    found = rendered(folder, needs_code=True, kubernetes={"code_files": patterns})
    job = only_job(found)
    config = found[f"ConfigMap {job['metadata']['name']}"]
    assert config["immutable"] is True
    assert config["binaryData"] == {"weights.bin": "/wA="}
    [volume] = [one["configMap"] for one in job["spec"]["template"]["spec"]["volumes"] if one["name"] == "code"]
    assert volume["name"] == config["metadata"]["name"]
    texts = {item["path"]: config["data"][item["key"]] for item in volume["items"] if item["key"] in config["data"]}
    assert texts == content
    assert {"name": "code", "mountPath": "/code", "readOnly": True} in worker_of(job)["volumeMounts"]
    assert worker_of(job)["command"][7:9] == ["--code", "/code"]

    mounted = tmp_path / "mounted"
    (mounted / "..2026_11_30" / "lib").mkdir(parents=True)
    (mounted / "..data").symlink_to("..2026_11_30")
    for path, text in texts.items():
        (mounted / "..2026_11_30" / path).write_text(text)
    for name in ("mine.py", "lib"):
        (mounted / name).symlink_to(f"..data/{name}")
    here, there = (usercode.digest(["mine.py:objective"], one) for one in (folder, mounted))
    assert here == there
    assert usercode.load_objective("mine.py:objective", mounted)(None) == 1


def test_a_study_without_code_of_its_own_and_one_in_the_image_need_no_config_map(tmp_path: Path) -> None:
    assert len(rendered(tmp_path)) == 1
    found = rendered(tmp_path, needs_code=True, kubernetes={"code_path": "/app"})
    assert len(found) == 1
    assert worker_of(only_job(found))["command"][7:9] == ["--code", "/app"]


def test_a_database_and_a_dashboard_are_started_for_those_who_have_none(tmp_path: Path) -> None:
    file = tmp_path / "digits.toml"
    file.write_text('name = "digits"\n')
    options = {"postgres": True, "dashboard": True, "postgres_size": "50Gi"}
    found = rendered(tmp_path, launch=None, making=file, storage="sqlite:////studies.db", kubernetes=options)
    job = only_job(found)
    name = job["metadata"]["name"]
    assert list(found) == [
        f"ConfigMap {name}",
        "Service hpo-postgres",
        "StatefulSet hpo-postgres",
        f"Job {name}",
        "Service hpo-dashboard",
        "Deployment hpo-dashboard",
    ]
    pod = job["spec"]["template"]["spec"]
    waiting, making = pod["initContainers"]
    assert waiting["command"][-1].startswith("until pg_isready --host=hpo-postgres ")
    assert making["command"] == ["hpo", "run", "/code/digits.toml", "--workers", "0", "--name", "digits"]
    assert making["env"][0] == {"name": "HPO_STORAGE", "value": "postgresql://hpo@hpo-postgres/hpo"}
    [claim] = found["StatefulSet hpo-postgres"]["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "50Gi"
    [server] = found["StatefulSet hpo-postgres"]["spec"]["template"]["spec"]["containers"]
    assert server["env"][-1]["valueFrom"] == {"secretKeyRef": {"name": "hpo-storage", "key": "PGPASSWORD"}}
    for kind, of in (("StatefulSet", "hpo-postgres"), ("Deployment", "hpo-dashboard")):
        labels = found[f"{kind} {of}"]["spec"]["template"]["metadata"]["labels"]
        assert found[f"Service {of}"]["spec"]["selector"] == labels
    [shown] = found["Deployment hpo-dashboard"]["spec"]["template"]["spec"]["containers"]
    assert "--write" not in shown["command"]


@pytest.mark.parametrize(
    ("gpus", "resource", "units"), [(0, None, None), (0.25, "nvidia.com/gpu.shared", 1), (3, None, 3)]
)
def test_gpus_are_whole_units(tmp_path: Path, gpus: float, resource: str | None, units: int | None) -> None:
    options = {"gpu_resource": resource} if resource else {}
    job = only_job(rendered(tmp_path, gpus=gpus, kubernetes=options))
    limits = {"limits": {resource or "nvidia.com/gpu": units}} if units else {}
    assert worker_of(job).get("resources", {}) == limits


WRONG = {
    "a part of a whole GPU": (
        {"gpus": 0.25},
        "gpus_per_worker = 0.25: Kubernetes gives whole GPUs of nvidia.com/gpu; use 1, or name a shared resource",
    ),
    "two and a half": ({"gpus": 2.5}, "gpus_per_worker = 2.5: Kubernetes counts GPUs in whole numbers; use 2 or 3"),
    "SQLite": (
        {"storage": "sqlite:////s.db"},
        "storage sqlite:////s.db: pods cannot use a SQLite file; name a Postgres",
    ),
    "this machine": (
        {"storage": "postgresql://hpo@localhost/hpo"},
        "storage postgresql://hpo@localhost/hpo: is this machine's own address, which pods do not reach",
    ),
    "a secret in the URL": (
        {"storage": f"{STORAGE}?sslpassword=***"},
        "storage postgresql://hpo@db.lab:5433/hpo?sslpassword=***: its URL may hold a secret",
    ),
    "a password in the file": (
        {"kubernetes": {"storage": "postgresql://hpo:hunter2@db/hpo"}},
        "launch.kubernetes.storage: holds a password, which would be shown",
    ),
    "a token in the file": (
        {
            "kubernetes": {
                "env": {"TOKENIZERS_PARALLELISM": "0", "AWS_WEB_IDENTITY_TOKEN_FILE": "/t", "HF_TOKEN": PASSWORD}
            }
        },
        "launch.kubernetes.env.HF_TOKEN: its name is that of a secret",
    ),
    "a key in the file": (
        {"kubernetes": {"env": {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": PASSWORD}}},
        "launch.kubernetes.env.AWS_SECRET_ACCESS_KEY: its name is that of a secret",
    ),
    "two databases": (
        {"kubernetes": {"storage": "postgresql://hpo@db/hpo", "postgres": True}},
        "launch.kubernetes.storage = 'postgresql://hpo@db/hpo': contradicts postgres = true",
    ),
    "a database without a password": (
        {"kubernetes": {"postgres": True, "secret": ""}},
        'launch.kubernetes.secret = "": postgres = true needs a Secret',
    ),
    "a folder of this machine": (
        {"checkpoints": "/home/me/ckpt"},
        "checkpoints /home/me/ckpt: pods do not see this folder; "
        'mount it: launch.kubernetes.volumes = { CLAIM = "/home/me/ckpt" }, or use object storage',
    ),
    "no folder": ({"checkpoints": None}, "checkpoints: not given, so they would lie in pods and go with them"),
    "no code": (
        {"needs_code": True},
        """launch.kubernetes.code_files = ["*.py"]: '*.py' fits no file in """,
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_pods_cannot_do_is_refused_with_the_mend(tmp_path: Path, case: str) -> None:
    more, said = WRONG[case]
    with pytest.raises(LaunchError) as error:
        ENGINE.check(request(tmp_path, **more))
    assert str(error.value).startswith(said)
    assert PASSWORD not in str(error.value)


def test_code_that_a_config_map_cannot_hold_is_refused_with_its_size(tmp_path: Path) -> None:
    (tmp_path / "large.py").write_bytes(b"#" * 999_992)
    ENGINE.check(request(tmp_path, needs_code=True))
    (tmp_path / "small.py").write_bytes(b"#")
    said = (
        r"2 files of 1,000,009 bytes, and a ConfigMap holds 1,000,000; the largest is large\.py; .*code_path = \"/app\""
    )
    with pytest.raises(LaunchError, match=said):
        ENGINE.check(request(tmp_path, needs_code=True))


def test_a_key_that_is_no_option_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(SpecError) as error:
        Launch.checked({"kubernetes": {"node_selectr": {}, "memory": "16 GB", "tolerations": [{"ky": "x"}]}})
    memory, toleration, unknown = str(error.value).splitlines()
    assert unknown.startswith("launch.kubernetes.node_selectr: launch.kubernetes takes no 'node_selectr'")
    assert "did you mean 'node_selector'?" in unknown
    assert (
        memory
        == """launch.kubernetes.memory = '16 GB': input should be a quantity of Kubernetes, such as "500m" or "16Gi\""""
    )
    assert toleration == (
        "launch.kubernetes.tolerations.0.ky: launch.kubernetes.tolerations.0 takes no 'ky' (did you mean 'key'?)"
    )


# --- kubectl: a script in its place writes down what it is asked for, since no cluster is to be had ---------------------

Kubectl = Callable[..., list[list[str]]]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kubectl:
    """Put a script in the place of kubectl that answers by its first two arguments; the result tells what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=":")

    def answering(**answers: str) -> list[list[str]]:
        cases = "".join(
            f"'{key.replace('_', ' ')}') echo {shlex.quote(answer)} ;;\n" for key, answer in answers.items()
        )
        (folder / "kubectl").write_text(
            f'#!/bin/sh\n(printf "%s\\n" "$@"; echo) >> {folder}/asked\n'
            f'case " $* " in *--filename=-*) cat >> {folder}/given;; esac\ncase "$1 $2" in\n{cases}esac\n'
        )
        (folder / "kubectl").chmod(0o755)
        return []

    return answering


def asked(folder: Path) -> list[list[str]]:
    return [call.splitlines() for call in (folder / "bin/asked").read_text().split("\n\n") if call]


def test_jobs_are_created_and_what_launches_share_is_applied(tmp_path: Path, kubectl: Kubectl) -> None:
    kubectl(get_secret="secret/hpo-storage")
    handles = ENGINE.submit(request(tmp_path, kubernetes={"dashboard": True, "namespace": "ml"}))
    [handle] = handles
    assert (handle["first"], handle["last"], handle["namespace"]) == (0, 3, "ml")
    assert [call[0] for call in asked(tmp_path)] == ["get", "apply", "create"]
    given = list(
        yaml.safe_load_all((tmp_path / "bin/given").read_text().replace("apiVersion: batch", "---\napiVersion: batch"))
    )
    assert [one["kind"] for one in given] == ["Service", "Deployment", "Job"]
    ENGINE.cancel(handles)
    selected = f"--selector=hpo/job={handle['job']}"
    assert asked(tmp_path)[-1] == ["delete", "job,configmap", "--namespace=ml", selected, "--wait=false"]
    shown = ENGINE.log_command(handles, 2)
    assert shown == f"kubectl logs --namespace=ml {selected},batch.kubernetes.io/job-completion-index=2 --tail=-1"
    assert ENGINE.log_command(handles, 4) is None


def test_a_launch_that_is_refused_leaves_nothing_behind(tmp_path: Path, kubectl: Kubectl) -> None:
    """kubectl makes one part after the other. What is left would stand in the way of the next launch of this number."""
    kubectl(get_secret="secret/hpo-storage")
    script = tmp_path / "bin/kubectl"
    script.write_text(script.read_text() + 'case "$1" in create) echo "exceeded quota" >&2; exit 1;; esac\n')
    asked_for = request(tmp_path, kubernetes={"namespace": "ml"})
    with pytest.raises(LaunchError, match=r"kubectl create --filename=-: failed with exit code 1\n  exceeded quota"):
        ENGINE.submit(asked_for)
    selected = f"--selector=hpo/job={only_job(rendered(tmp_path))['metadata']['name']}"
    assert asked(tmp_path)[-1] == ["delete", "job,configmap", "--namespace=ml", selected, "--wait=false"]


def test_a_missing_secret_is_told_before_anything_is_made(tmp_path: Path, kubectl: Kubectl) -> None:
    kubectl()
    with pytest.raises(
        LaunchError, match=r"the cluster has no such Secret; .* kubectl create secret generic hpo-storage"
    ):
        ENGINE.submit(request(tmp_path))
    assert [call[0] for call in asked(tmp_path)] == ["get"]


def test_without_kubectl_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LaunchError, match=r"kubectl: not found on this machine; install kubectl .*--print"):
        ENGINE.submit(request(tmp_path))
    assert ENGINE.present([{"job": "x", "namespace": "", "first": 0, "last": 0, "queue": ""}]) is None


def pods(**phases: str) -> str:
    labels = {index: {"batch.kubernetes.io/job-completion-index": index.removeprefix("i")} for index in phases}
    return json.dumps(
        {"items": [{"metadata": {"labels": labels[i]}, "status": {"phase": phase}} for i, phase in phases.items()]}
    )


def test_slots_run_or_are_to_come_until_their_index_has_ended(tmp_path: Path, kubectl: Kubectl) -> None:
    handles = [{"job": "j", "namespace": "", "first": 8, "last": 15, "queue": ""}]
    job = {"spec": {"completions": 8}, "status": {"completedIndexes": "0-2,4", "failedIndexes": "5"}}
    kubectl(get_job=json.dumps(job), get_pods=pods(i3="Running", i6="Pending", i4="Succeeded"))
    assert ENGINE.present(handles) == {11: "running", 14: "pending", 15: "pending"}
    job["status"]["conditions"] = [{"type": "Complete", "status": "True"}]
    kubectl(get_job=json.dumps(job))
    assert ENGINE.present(handles) == {}
    kubectl()
    assert ENGINE.present(handles) == {}


@pytest.mark.parametrize(
    ("queue", "slots", "called"),
    [
        ("", [6, 7], ["patch", '--patch={"spec": {"completions": 2, "parallelism": 2}}']),
        ("", [5, 7], ["patch", '--patch={"spec": {"completions": 3, "parallelism": 3}}']),
        ("", [4, 5, 6, 7], ["delete", "--wait=false"]),
        ("", [5], None),
        ("team", [6, 7], None),
    ],
)
def test_a_job_is_made_smaller_from_its_end(
    tmp_path: Path, kubectl: Kubectl, queue: str, slots: list[int], called: list[str] | None
) -> None:
    kubectl()
    ENGINE.dismiss([{"job": "j", "namespace": "", "first": 4, "last": 7, "queue": queue}], slots)
    assert (tmp_path / "bin/asked").exists() == (called is not None)
    if called:
        [call] = asked(tmp_path)
        assert [call[0], call[-1]] == called


def test_the_range_of_indexes_of_a_job_is_read() -> None:
    assert list(kubernetes._indexes("")) == []
    assert list(kubernetes._indexes("0,3-5,9")) == [0, 3, 4, 5, 9]
