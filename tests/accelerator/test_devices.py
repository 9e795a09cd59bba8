"""What training asks of its device, on the CPU and on the twin device, which stands for a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hpo.train import devices
from hpo.train.randomness import Randomness
from hpo.train.user_state import UserState
from tests.support import twin

CPU = torch.device("cpu")


@pytest.fixture
def accelerator() -> Iterator[torch.device]:
    with twin.plugged_in():
        yield twin.DEVICE


def test_without_a_gpu_the_cpu_is_picked() -> None:
    assert devices.pick().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert devices.name(CPU) == "cpu"
    assert devices.free_bytes(CPU) is devices.peak_bytes(CPU) is None


def test_an_accelerator_is_asked_by_the_names_of_torchs_cuda(accelerator: torch.device) -> None:
    assert devices.pick() == torch.device("twin")
    assert devices.name(accelerator) == "Twin"
    with twin.counting() as counts:
        devices.synchronize(accelerator)
    assert counts.waits == 1
    before = devices.free_bytes(accelerator)
    kept = torch.zeros(1000, device=accelerator)
    assert devices.free_bytes(accelerator) == before - 4000
    assert devices.free_bytes(accelerator, 4) == twin.TOTAL_MEMORY // 4 - (twin.TOTAL_MEMORY - before) - 4000
    devices.begin_peak(accelerator)
    assert devices.peak_bytes(accelerator) == twin.TOTAL_MEMORY - before + kept.nbytes
    assert devices.pinned(torch.ones(2), accelerator).is_pinned()


def test_every_name_that_is_asked_of_an_accelerator_is_one_of_torchs_cuda() -> None:
    asked = {name for name in dir(twin.Backend) if not name.startswith("_")}
    assert {name for name in asked if not hasattr(torch.cuda, name)} == {"plugged_in", "get_amp_supported_dtype"}


def draws(randomness: Randomness, device: torch.device) -> list[list[float]]:
    own = torch.empty(3, device=device).uniform_(generator=randomness.dropout)
    return [own.tolist(), torch.rand(3, device=device).tolist(), torch.rand(3).tolist()]


def test_random_states_resume_on_the_same_type_of_device(accelerator: torch.device) -> None:
    for device in (CPU, accelerator):
        randomness = Randomness(7, device)
        randomness.begin(2)
        draws(randomness, device)
        states = randomness.states()
        assert list(states) == ["dropout", "global", *([] if device == CPU else ["twin"])]
        expected = draws(randomness, device)
        randomness.restore(states, 2, 5)
        assert draws(randomness, device) == expected


@pytest.mark.parametrize("back", [False, True])
def test_amid_an_epoch_another_type_of_device_gets_random_numbers_of_its_own(
    accelerator: torch.device, back: bool
) -> None:
    """The states of a GPU's generators are no states of the CPU's. What it draws depends on seed, epoch and batch."""
    saved_on, resumed_on = (CPU, accelerator) if back else (accelerator, CPU)
    saved, resumed = Randomness(7, saved_on), Randomness(7, resumed_on)
    saved.begin(2)
    first = draws(saved, saved_on)
    resumed.restore(saved.states(), 2, 5)
    drawn = draws(resumed, resumed_on)
    assert drawn not in (first, draws(saved, saved_on))
    torch.rand(9)
    resumed.restore(saved.states(), 2, 5)
    assert draws(resumed, resumed_on) == drawn
    resumed.restore(saved.states(), 2, 6)
    assert draws(resumed, resumed_on) != drawn


def test_a_users_loop_keeps_the_random_numbers_of_the_accelerator(accelerator: torch.device) -> None:
    state = UserState({"settings": {}})
    saved = state.state_dict()
    drawn = torch.rand(3, device=accelerator).tolist()
    UserState({"settings": {}}).load_state_dict(saved)
    assert torch.rand(3, device=accelerator).tolist() == drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "ACCELERATORS", ())  # as on a machine without it
        UserState({"settings": {}}).load_state_dict(saved)
