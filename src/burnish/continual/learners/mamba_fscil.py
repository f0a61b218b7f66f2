from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...blocks.state.map_projector import Projector, class_sensitive
from ...blocks.state.simplex import aligned, dot_regression, simplex
from ...core.errors import ConfigError, RecipeError
from ...core.method import setting
from ..bank import check_alone
from ..learner import Learner, Stored, Study, count
from ..maps import Maps
from ..training import Given, batches


@dataclass
class MambaFscil(Learner):
    """Mamba-FSCIL: selective scans of a picture's map before a head that never trains, and one
    branch more for the classes that come later.

        f = branch_b(F) + R pool(F) + branch_n(F)       F (channels, h, w): the backbone's last map
        loss = (1 - m_y . f / |f|)^2 / 2                M: a simplex of `width` x all classes

    On the first task the recipe trains (the backbone; the paper at a tenth of `step_rate`) beside
    branch_b and R. From the second on maps are fixed: branch_n is added, which leaves answers as
    they were, and trains beside branch_b at `behind` of its rate, for `updates` of SGD, on the
    task's maps and one map a class seen before, the mean of its rows. Maps are mixed there within
    old and within new rows, and ``quiet |z_old| / size - loud |z_new| / size + apart sum
    mean|I - S|`` is added (blocks/state/map_projector.py, class_sensitive).

    Stores what the recipe trains, the branches, and a map a class; no rows. Any recipe whose
    tensors keep their sizes; streams of pictures by class, whose number is known beforehand. The
    paper: ResNet-18, ``full + sgd(momentum=0.9)``.

    When: base classes with many rows, then few rows of each new one. When not: texts or tables;
    classes whose number is open. Unconfirmed: that means of maps are what is replayed, that maps
    are mixed by a Beta(mix, mix), how S is averaged (over rows); the norm of new rows counts up to
    a root mean square of 1, as it has no bound.
    """

    paper: ClassVar[str] = "Mamba-FSCIL (2024), arXiv:2407.06136"
    tier: ClassVar[str] = "from the text"

    width: int | None = setting(None, "of features, at least the classes; None: twice the channels")
    state: int | None = setting(None, "of a scan, for each channel; None: a quarter of the width")
    rank: int | None = setting(None, "of the map that makes steps; None: a quarter of the width")
    step_rate: float = setting(0.2, "learning rate of the branch on the first task")
    later_rate: float = setting(0.05, "learning rate of the branch that is added")
    behind: float = setting(0.2, "share of that at which the first branch goes on")
    updates: int = setting(200, "on each later task")
    mix: float = setting(0.5, "both parameters of the Beta that maps are mixed by; 0: none")
    quiet: float = setting(100.0, "n_b, of the added branch on old classes")
    loud: float = setting(10.0, "n_v, of the added branch on new classes")
    apart: float = setting(1e-3, "of the cosines between what scans read of old and of new")

    def __post_init__(self) -> None:
        for name in ("width", "state", "rank", "step_rate", "later_rate"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ConfigError(f"mamba_fscil: {name}={value}: expected above 0")
        if self.updates < 1 or min(self.behind, self.mix, self.quiet, self.loud, self.apart) < 0:
            raise ConfigError("mamba_fscil: updates of at least 1, and behind, mix, quiet, loud "
                              "and apart of at least 0 are expected")

    def check(self, study: Study) -> None:
        super().check(study)
        check_alone(study, "mamba_fscil")
        if study.stream.scenario != "class":
            raise RecipeError("mamba_fscil has a direction a class and adds a branch for new ones: "
                              f"a stream of scenario 'class', not {study.stream.scenario!r}")
        for m in study.recipe:
            if "controller" in m.axes():
                raise RecipeError(f"{m.name} counts on all that trains, and mamba_fscil trains "
                                  "branches beside the recipe: leave it out")

    def joined(self, name: str = "default", head: bool | str | None = None) -> Any:
        return super().joined(name, False)           # the model's own head has no part in it

    def begin(self, study: Study) -> None:
        super().begin(study)
        first = study.stream.tasks[0].train[:2]
        self.maps = Maps(self.tuned, self.given(list(first), 0).inputs, "mamba_fscil")
        width = self.width or 2 * self.maps.shape[0]
        part = max(1, width // 4)
        draw = torch.Generator().manual_seed(study.seed)
        self.M = simplex(width, study.stream.width, draw).to(self.device)
        self.projector = Projector(self.maps.shape, width, self.state or part,
                                   self.rank or part).to(self.device)
        self.memory: dict[int, Tensor] = {}

    # -- learning ---------------------------------------------------------------------------------
    def learn(self, t: int) -> None:
        rows = self.study.stream.tasks[t].train
        if t == 0:
            optimizer = torch.optim.SGD(self.projector.parameters(), self.step_rate, momentum=0.9)
            self.projector.train()

            def after() -> None:
                optimizer.step()
                optimizer.zero_grad()

            with self.maps.seen():
                self.teach(rows, t, after=after)
        seen = [self.maps.of(self.given(list(rows[i:i + 64]), t).inputs)
                for i in range(0, len(rows), 64)]
        maps, labels = torch.cat(seen), torch.tensor([int(y) for _, y in rows], device=self.device)
        if t:
            self._later(t, maps, labels)
        self.memory |= {c: maps[labels == c].mean(0) for c in labels.unique().tolist()}

    def loss(self, z: Tensor, given: Given, t: int) -> Tensor:
        f, _ = self.projector(self.maps.last)
        return dot_regression(aligned(f, self.M), given.labels.to(f.device)).mean()

    def _later(self, t: int, maps: Tensor, labels: Tensor) -> None:
        """Branches on fixed maps: those of the task, and one of every class before."""
        draw = Random(31 * self.study.seed + t)
        if self.projector.later is None:
            self.projector.grow()
        assert self.projector.later is not None
        optimizer = torch.optim.SGD(
            [{"params": self.projector.later.parameters()},
             {"params": self.projector.first.parameters(), "lr": self.behind * self.later_rate}],
            self.later_rate, momentum=0.9)
        old = torch.stack(list(self.memory.values()))
        classes = torch.tensor(list(self.memory), device=self.device)
        base = torch.tensor(self.study.stream.tasks[0].classes, device=self.device)
        for some, _ in zip(self._endless(len(maps), t), range(self.updates), strict=False):
            x, y = torch.cat([maps[some], old]), torch.cat([labels[some], classes])
            optimizer.zero_grad()
            self.objective(x, y, ~torch.isin(y, base), draw).backward()
            optimizer.step()

    def _endless(self, n: int, t: int) -> Iterator[list[int]]:
        epoch = 0
        while True:
            yield from batches(range(n), self.study.training.batch,
                               10_007 * (self.study.seed * 101 + t) + epoch)
            epoch += 1

    def objective(self, maps: Tensor, y: Tensor, novel: Tensor, draw: Random) -> Tensor:
        """Of maps with their classes on a later task."""
        share, other = 1.0, torch.arange(len(y), device=y.device)
        if self.mix:
            share = draw.betavariate(self.mix, self.mix)
            for side in (novel, ~novel):
                at = side.nonzero().flatten()
                other[at] = at[draw.sample(range(len(at)), len(at))]
        f, seen = self.projector(torch.lerp(maps[other], maps, share))
        cosines = aligned(f, self.M)
        fit = share * dot_regression(cosines, y) + (1 - share) * dot_regression(cosines, y[other])
        return fit.mean() + class_sensitive(seen, novel, (self.quiet, self.loud, self.apart))

    # -- answering --------------------------------------------------------------------------------
    @torch.no_grad()
    def scores(self, inputs: Any, allowed: Tensor, task: int | None) -> Tensor:
        """Cosines with the vertices of all classes."""
        self.projector.eval()
        return aligned(self.projector(self.maps.of(inputs))[0], self.M)

    def stored(self) -> Stored:
        return count([*self.held().values(), *self.projector.parameters(), self.M,
                      *self.memory.values()])
