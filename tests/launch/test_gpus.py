"""Which GPUs a run uses, and which workers get which of them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hpo.errors import SpecError
from hpo.launch import gpus
from hpo.launch.gpus import chosen, listed, visible
from hpo.launch.placement import Place, default_workers, place, sharers, spread
from hpo.worker.gpu_share import SHARE, given_devices, gpu_sharers
from tests.support.nvidia_smi import DIVIDED, MIG, A, B, install

CORES = len(os.sched_getaffinity(0))


def names(wanted: str | None) -> list[str]:
    return [gpu.name for gpu in chosen(wanted)[0]]


def test_gpus_are_named_by_uuid_as_the_driver_lists_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = install(tmp_path, monkeypatch)
    assert visible() == names(None) == names("all") == [A, B]
    assert names("1") == names(B[:12]) == [B]
    assert names("1,0") == [B, A]
    assert names("none") == []
    assert default_workers() == 2
    program.write_text("#!/bin/sh\nexit 9\n")
    assert visible() == names(None) == []
    assert default_workers() == CORES


def test_a_gpu_that_mig_has_divided_stands_as_its_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, DIVIDED)
    assert [(gpu.name, gpu.number) for gpu in listed()] == [(MIG[0], "0:0"), (MIG[1], "0:1"), (B, "1")]
    assert names("0") == [*MIG]
    assert names("0:1,1") == [MIG[1], B]
    with pytest.raises(SpecError, match="processes_per_trial = 2: CUDA shows a process one MIG device only"):
        place(None, processes=2)


@pytest.mark.parametrize(
    ("given", "devices"),
    [("1,3", ["1", "3"]), ("", []), ("-1", []), ("GPU-x", ["GPU-x"]), ("2,-1,3", ["2"]), (f" {B} ", [B])],
)
def test_the_user_s_own_choice_of_gpus_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, devices: list[str]
) -> None:
    """As CUDA reads it. GPUs that others use are taken then, since they were asked for."""
    install(tmp_path, monkeypatch, used=(90_000, 90_000))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible() == names(None) == devices
    assert [gpu.number for gpu in listed()] == [str(place) for place in range(len(devices))]


def test_numbers_count_within_the_user_s_own_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert names("1") == ["7"]


def test_gpus_that_others_use_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = f"{A}, 2147483001, 3084, /usr/bin/python3"
    install(tmp_path, monkeypatch, used=(3088, 4), apps=[other])
    found = place(None)
    assert found.places == (Place(devices=(B,)),)
    assert found.notes() == [
        "GPU 0 is left alone, others use it: process 2147483001 (python3) holds 3.0 GiB; --gpus 0 takes it"
    ]
    assert names("0") == [A]
    assert place(None, wanted="all").notes() == []


def test_the_memory_in_use_tells_what_a_container_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, used=(2048, 2049), apps=[f"{A}, {os.getpid()}, [N/A], [Not Found]"])
    assert [gpu.used_by for gpu in listed()] == ["", "2.0 GiB of its memory are in use"]


def test_what_this_process_holds_itself_is_no_use_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook that has trained on the GPU may search on it."""
    install(tmp_path, monkeypatch, used=(9000, 4), apps=[f"{A}, {os.getpid()}, 8996, /usr/bin/python3"])
    assert names(None) == [A, B]


def test_a_run_without_a_free_gpu_does_not_train_on_the_cpu_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, used=(3000, 3000))
    with pytest.raises(SpecError) as caught:
        place(None)
    assert str(caught.value).splitlines() == [
        "others use all 2 GPUs of this machine; --gpus all takes them too, --gpus none trains on the CPU",
        "  GPU 0: 2.9 GiB of its memory are in use",
        "  GPU 1: 2.9 GiB of its memory are in use",
    ]
    assert place(0).places == ()  # which starts none


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("2", "--gpus '2': there is no GPU '2'; there are 0, 1; write numbers or UUIDs such as 0,1"),
        ("0,", "--gpus '0,': there is no GPU ''; there are 0, 1"),
        ("GPU-9", "--gpus 'GPU-9': there is no GPU 'GPU-9'; there are 0, 1"),
        ("GPU-", "--gpus 'GPU-': 2 UUIDs begin with 'GPU-', such as GPU-"),
        ("gpu0", "--gpus 'gpu0': there is no GPU 'gpu0'"),
    ],
)
def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, message: str) -> None:
    install(tmp_path, monkeypatch)
    with pytest.raises(SpecError) as caught:
        chosen(wanted)
    assert str(caught.value).startswith(message)


def test_gpus_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SpecError, match="CUDA_VISIBLE_DEVICES is '', which shows none"):
        chosen("all")
    with pytest.raises(SpecError, match="--per-gpu 2: there is no GPU to share"):
        place(None, per_gpu=2)
    assert place(None).places == (Place(devices=None),) * CORES
    assert place(None, wanted="none").places == (Place(devices=()),) * CORES
    assert place(None, processes=CORES + 1).places == (Place(devices=None),)


def test_workers_share_gpus_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    assert place(None, per_gpu=2).places == (Place(devices=(A,), sharers=2), Place(devices=(B,), sharers=2)) * 2
    three = (Place(devices=(A,), sharers=2), Place(devices=(B,)), Place(devices=(A,), sharers=2))
    assert place(3).places == spread(3).places == three
    assert place(None, processes=2).places == (Place(devices=(A, B)),)
    with pytest.raises(SpecError, match="--workers 5: --per-gpu 2 on 2 GPUs makes 4 workers"):
        place(5, per_gpu=2)
    with pytest.raises(SpecError, match="processes_per_trial = 3: a trial needs 3 GPUs, and 2 are free"):
        place(None, processes=3)


def test_gpu_hours_count_workers_of_one_gpu_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch)
    assert [spread(workers).counted_gpus for workers in (1, 2, 5)] == [1, 2, 2]
    assert [spread(workers).most_sharers for workers in (1, 2, 5)] == [1, 1, 3]
    assert place(None, processes=2).counted_gpus == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")  # numbers, which may be others in another job
    assert spread(5).counted_gpus == 5
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert spread(5).counted_gpus == 5


def test_how_many_share_is_a_number_or_auto() -> None:
    assert [sharers(given, "--per-gpu") for given in ("auto", "3", 4)] == [None, 3, 4]
    for wrong in ("0", "many", True, "257", -1):
        with pytest.raises(SpecError, match="is neither auto nor a number from 1 to 256"):
            sharers(wrong, "--per-gpu")


def test_a_worker_knows_how_many_share_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(devices=(A, B), sharers=4)
    assert place.environment == {"CUDA_VISIBLE_DEVICES": f"{A},{B}", "HPO_WORKER_GPUS": "0.5"}
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    assert gpu_sharers() == 4
    monkeypatch.delenv(SHARE)  # as in a worker that a cluster started
    assert gpu_sharers() == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,-1,3")
    assert given_devices() == ["2"]
    for share, workers in (("0.5", 2), ("1.0", 1), ("0.0", 1)):
        monkeypatch.setenv(SHARE, share)
        assert gpu_sharers() == workers
    assert Place(devices=None).environment == {}
    assert Place(devices=()).environment == {"CUDA_VISIBLE_DEVICES": "", "HPO_WORKER_GPUS": "0.0"}


def test_the_memory_of_gpus_is_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, used=(1024, 2048))
    assert gpus.memory() == (3 * 2**30, 2 * 143771 * 2**20)
