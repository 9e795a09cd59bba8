"""Augmentation of an epoch batch by batch, for one run or for K runs in one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from hpo.data import transfer
from hpo.data.augment.drawn import STAGES, Company, Drawn, Stage
from hpo.data.augment.mixing import Mixing, mix
from hpo.data.augment.tone import Tone

ROWS = "rows"  # of the images that a part of the augmentation changes; not there if it changes all


@dataclass(frozen=True, kw_only=True)
class MixedLabels:
    """The targets of mixed images, of K runs or of one."""

    own: Tensor  # classes int64 [K, B] or [B], or others [K, B, T] or [B, T]
    partners: Tensor  # as `own`
    weight: Tensor  # [..., B + filling]: weight of the own label, 1 - weight is the partner's; 1 where nothing is mixed

    def losses(self, losses_for: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the loss of each image, in the shape of `weight`.

        Args:
            losses_for: returns the loss of each image for given labels, in the shape of `weight`.
        """
        own, partners = losses_for(self.own), losses_for(self.partners)
        return torch.where(self.weight == 1, own, self.weight * own + (1 - self.weight) * partners)

    def pieces(self, count: int) -> list[MixedLabels]:
        """Split the batch of one run into `count` parts and return the targets of each."""
        parts = (torch.tensor_split(part, count) for part in (self.own, self.partners, self.weight))
        return [MixedLabels(own=own, partners=other, weight=weight) for own, other, weight in zip(*parts, strict=True)]


class Augmentation:
    """The augmentation of K runs in an epoch, ready on their device."""

    def __init__(
        self, drawn: Sequence[Drawn | None], batch: int, filling: int, tone: Tone, device: torch.device
    ) -> None:
        """Move the drawn changes of K runs to the device.

        Args:
            drawn: the changes of each run, None for none. All runs have the same batch size.
            batch: images per batch.
            filling: number of filler images behind each batch; they only need to stay finite.
        """
        at = _Place(len(drawn), batch, filling)
        self._passes: list[_Pass] = []
        for name, stage in STAGES.items():
            users = {row: run for row, run in enumerate(drawn) if run is not None and name in run.stages}
            if users:
                of = Company(strengths=[run.strength for run in users.values()], tone=tone)
                self._passes.append(_Pass(stage, {row: run.stages[name] for row, run in users.items()}, of, at))
        mixing = {row: run.mixing for row, run in enumerate(drawn) if run is not None and run.mixing is not None}
        self._mixing = _Mixer(mixing, at) if mixing else None
        parts: list[_Pass | _Mixer] = [*self._passes, *([self._mixing] if self._mixing else [])]
        there = iter(transfer.sent([tensor for part in parts for tensor in part.tensors.values()], device))
        for part in parts:
            part.tensors = {name: next(there) for name in part.tensors}

    def images(self, images: Tensor, batch: int) -> Tensor:
        """Return the augmented images of a batch. The given images may be overwritten.

        Args:
            images: normalised floats [K * (B + filling), C, H, W].
            batch: number of the batch in the epoch, from 0.
        """
        for one in self._passes:
            images = one.images(images, batch)
        return images if self._mixing is None else self._mixing.images(images, batch)

    def labels(self, labels: Tensor, batch: int) -> MixedLabels | None:
        """Return the mixed targets of a batch; None if nothing is mixed.

        Args:
            labels: classes int64 [K, B] or others [K, B, T], without K for one run.
            batch: number of the batch in the epoch, from 0.
        """
        return None if self._mixing is None else self._mixing.labels(labels, batch)


@dataclass(frozen=True)
class _Place:
    """The layout of a call: K runs, each with B images and filler images."""

    runs: int
    batch: int
    filling: int

    @property
    def size(self) -> int:
        return self.batch + self.filling

    def by_step(self, numbers: Sequence[Tensor]) -> Tensor:
        """Return numbers of some runs, each [steps * B, ...], as [steps, runs * (B + filling), ...]."""
        apart = torch.stack([one.view(-1, self.batch, *one.shape[1:]) for one in numbers], 1)  # [steps, runs, B, ...]
        more = (0, 0) * (apart.ndim - 3) + (0, self.filling)
        return F.pad(apart, more).flatten(1, 2)

    def rows(self, runs: Sequence[int]) -> dict[str, Tensor]:
        """Return the rows of the images of some runs in a call under the name ROWS; nothing if these are all runs."""
        if len(runs) == self.runs:
            return {}
        first = torch.tensor(runs) * self.size
        return {ROWS: (first[:, None] + torch.arange(self.size)).flatten()}


class _Pass:
    """One stage, for the runs that use it."""

    def __init__(self, stage: Stage, drawn: dict[int, Tensor], of: Company, at: _Place) -> None:
        self._stage = stage
        self._of = of
        numbers = at.by_step(list(drawn.values()))
        found = [stage.rows(of_step) for of_step in numbers]
        self._alike = [{name: len(rows) for name, rows in of_step.items()} for of_step in found]  # how many, by step
        of_steps = [torch.cat(list(of_step.values())) if of_step else torch.empty(0).long() for of_step in found]
        self._starts = list(accumulate(map(len, of_steps), initial=0))
        self.tensors = {"numbers": numbers, "alike": torch.cat(of_steps), **at.rows(list(drawn))}

    def images(self, images: Tensor, batch: int) -> Tensor:
        """Return images with the stage applied to those of its runs."""
        rows = self.tensors.get(ROWS)
        if rows is None:
            return self._applied(images, batch)
        return images.index_copy_(0, rows, self._applied(images.index_select(0, rows), batch))

    def _applied(self, images: Tensor, batch: int) -> Tensor:
        counts = self._alike[batch]
        of_step = self.tensors["alike"][self._starts[batch] : self._starts[batch + 1]]
        alike = dict(zip(counts, torch.split(of_step, list(counts.values())), strict=True)) if counts else {}
        return self._stage.apply(images, self.tensors["numbers"][batch], self._of, alike)


class _Mixer:
    """Mixes images with others of their own run's batch."""

    def __init__(self, mixing: dict[int, Mixing], at: _Place) -> None:
        self._at = at
        users = list(mixing)
        share = at.by_step([run.share for run in mixing.values()])
        first = torch.tensor(users).repeat_interleave(at.size) * at.size
        steps = len(share)
        itself, whole = torch.arange(at.batch).repeat(steps), torch.ones(steps * at.batch)
        runs = [mixing.get(row) for row in range(at.runs)]
        partner = at.by_step([itself if run is None else run.partner for run in runs])
        weight = at.by_step([whole if run is None else run.weight for run in runs])
        self.tensors = {
            "share": share,
            "box": at.by_step([run.box for run in mixing.values()]),
            "partners": at.by_step([run.partner for run in mixing.values()]) + first,  # rows of the call
            "partner": partner.view(steps, at.runs, at.size)[..., : at.batch],  # places in the batch
            "weight": weight.view(steps, at.runs, at.size),
            **at.rows(users),
        }

    def images(self, images: Tensor, batch: int) -> Tensor:
        """Return images, those of its runs mixed with their partners."""
        partners = images.index_select(0, self.tensors["partners"][batch])
        how = self.tensors["share"][batch], self.tensors["box"][batch]
        rows = self.tensors.get(ROWS)
        if rows is None:
            return mix(images, partners, *how)
        return images.index_copy_(0, rows, mix(images.index_select(0, rows), partners, *how))

    def labels(self, labels: Tensor, batch: int) -> MixedLabels:
        """Return the mixed targets of a batch, see `Augmentation.labels`."""
        rows = labels.view(self._at.runs, self._at.batch, -1)  # [K, B, T]
        partner = self.tensors["partner"][batch].unsqueeze(2).expand_as(rows)
        runs = labels.shape[: -1 if labels.dtype == torch.int64 else -2]
        weight = self.tensors["weight"][batch].view(*runs, -1)
        partners = rows.gather(1, partner).view_as(labels)
        return MixedLabels(own=labels, partners=partners, weight=weight)
