"""Manifests against the schemas of Kubernetes, in which a key too many is an error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpo.launch.engines.kubernetes import ENGINE
from tests.engines.needed import module
from tests.support.requests import request

pytestmark = pytest.mark.engines

FULL: dict[str, Any] = {
    "postgres": True,
    "dashboard": True,
    "namespace": "ml",
    "service_account": "hpo",
    "pull_secrets": ["registry"],
    "env_from": ["hpo-s3"],
    "env": {"HPO_DATA_DIR": "/data", "NUMBER": "1e3"},
    "volumes": {"data.sets": "/data", "checkpoints": "/checkpoints"},
    "node_selector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB", "slot": "12"},
    "tolerations": [
        {"key": "spot", "operator": "Equal", "value": "true", "effect": "NoExecute", "tolerationSeconds": 60}
    ],
    "queue": "team",
    "priority_class": "low",
    "cpu": "500m",
    "memory": "1.5Gi",
}


def test_all_manifests_follow_the_schemas(tmp_path: Path) -> None:
    module("kubernetes_validate", "engines")
    import kubernetes_validate

    version = kubernetes_validate.latest_version()
    file = tmp_path / "digits.toml"
    file.write_text('name = "digits"\n')
    (tmp_path / "weights.py").write_bytes(b"\xff")
    asked = request(tmp_path, launch=None, making=file, needs_code=True, checkpoints="/checkpoints/x", kubernetes=FULL)
    ENGINE.check(asked)
    kinds = []
    for text in (ENGINE.render(asked), ENGINE.render(request(tmp_path, slots=range(4, 6)))):
        for manifest in yaml.safe_load_all(text):
            kubernetes_validate.validate(manifest, version, strict=True)
            kinds.append(manifest["kind"])
    assert kinds == ["ConfigMap", "Service", "StatefulSet", "Job", "Service", "Deployment", "Job"]

    for spoil in (
        lambda job: job["spec"].update(backoffLimitPerIndx=3),
        lambda job: job["spec"].update(completions="4"),
        lambda job: job["spec"]["podFailurePolicy"]["rules"][0].pop("action"),
    ):
        wrong = copy.deepcopy(manifest)
        spoil(wrong)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, version, strict=True)
