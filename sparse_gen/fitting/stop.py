"""Stopping rules that need no clean image: the output's variance along the run turns up when noise comes in."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from sparse_gen.engine.checks import check_count


class _Rule:
    """What rules share: they stop each experiment on its own, and all they know is in tensors."""

    stopped_at: torch.Tensor | None = None  # (E,) steps done when the experiment stopped, -1 before

    def ended(self, device: torch.device | str) -> torch.Tensor:
        """Whether every experiment has stopped: () bool, on the device."""
        if self.stopped_at is None:
            return torch.zeros((), dtype=torch.bool, device=device)
        return (self.stopped_at >= 0).all()

    @property
    def over(self) -> bool:
        """Whether every experiment has stopped."""
        return self.stopped_at is not None and bool((self.stopped_at >= 0).all())

    def stopped_after(self) -> int | list[int | None] | None:
        """The number of steps after which the run was stopped, None if it was not; a list for several experiments."""
        if self.stopped_at is None:
            return None
        steps = [step if step >= 0 else None for step in self.stopped_at.tolist()]
        return steps if len(steps) > 1 else steps[0]

    def state(self) -> dict[str, torch.Tensor]:
        """Everything the rule has gathered, for a checkpoint; empty before the first update."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}

    def restore(self, state: dict[str, torch.Tensor], device: torch.device | str) -> None:
        """Continue from what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value.to(device))


class _PatientMinimum(_Rule, ABC):
    """Selects the output at which a statistic was smallest, and stops when that is `patience` steps ago.

    Everything stays on the outputs' device; nothing but one flag is read back, and by `advance` not even that. Each
    experiment is selected and stopped on its own: one that has stopped no longer changes, as if it had been run alone.
    """

    def __init__(self, patience: int):
        check_count(patience, "patience")
        self.patience = patience
        self._image: torch.Tensor | None = None

    @abstractmethod
    def _statistic(self, step: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Take the output of a step, () int64 from 0 on; return the statistic, (E,), infinite while there is none."""

    def update(self, step: int, image: torch.Tensor) -> bool:
        """Take the output of a step, (E, C, H, W), and say whether every experiment has stopped.

        Steps come one by one from 0 on.
        """
        self.advance(torch.tensor(step, device=image.device), image)
        return self.over

    def advance(self, step: torch.Tensor, image: torch.Tensor) -> None:
        """The same with the step as () int64 on the image's device, and without asking whether to stop."""
        image = image.detach()
        if self._image is None:
            self._start(image)
        statistic = self._statistic(step, image)
        better = (statistic < self._smallest) & (self.stopped_at < 0)
        _put(better, statistic, self._smallest)
        _put(better, step, self.selected_step)
        # Until there is a statistic, the newest output is the best there is.
        take = better | (self._smallest.isinf() & (self.stopped_at < 0))
        _put(take[:, None, None, None], image, self._image)
        waited = step - self.selected_step
        over = (waited >= self.patience) & (self.selected_step >= 0) & (self.stopped_at < 0)
        _put(over, step + 1, self.stopped_at)

    def _start(self, image: torch.Tensor) -> None:
        self._image = image.clone()
        self._smallest = torch.full((len(image),), torch.inf, dtype=torch.float64, device=image.device)
        self.selected_step = torch.full((len(image),), -1, device=image.device)
        self.stopped_at = torch.full((len(image),), -1, device=image.device)

    @property
    def image(self) -> torch.Tensor:
        """The selected output, (E, C, H, W).

        Raises:
            RuntimeError: the rule has not seen any output.
        """
        if self._image is None:
            raise RuntimeError("expected at least one update before the selected image is asked for, got none")
        return self._image


def _put(where: torch.Tensor, value: torch.Tensor, into: torch.Tensor) -> None:
    """In place, so that a captured step finds it where it was."""
    torch.where(where, value, into, out=into)


class WMV(_PatientMinimum):
    """Windowed moving variance: var_t = (1/W) Σ_w ‖x_{t-w} - mean‖² / N over the last W outputs.

    Args:
        window: W, at least 2.
        patience: stop when the variance has not fallen for so many steps.

    A step costs the same whatever W is: the window's sum and sum of squares are updated by the output that comes
    and the one that goes, in double, where their difference keeps ten digits. The window itself is W outputs.

    Wang et al., "Early stopping for deep image prior" (TMLR 2023), eq. 4 and algorithm 1.
    """

    def __init__(self, window: int = 100, patience: int = 1000):
        super().__init__(patience)
        check_count(window, "window", 2)
        self.window = window

    def _start(self, image: torch.Tensor) -> None:
        super()._start(image)
        flat = image.flatten(1)
        self._outputs = flat.new_zeros(self.window, *flat.shape)
        self._sum = torch.zeros_like(flat, dtype=torch.float64)
        self._squares = torch.zeros(len(flat), dtype=torch.float64, device=flat.device)

    def _statistic(self, step: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        flat = image.flatten(1)
        slot = (step % self.window)[None]
        comes, goes = flat.double(), self._outputs.index_select(0, slot)[0].double()
        self._sum += comes - goes
        self._squares += (comes.square() - goes.square()).sum(dim=1)
        self._outputs.index_copy_(0, slot, flat[None])
        variance = self._squares / self.window - (self._sum / self.window).square().sum(dim=1)
        return torch.where(step < self.window - 1, torch.inf, variance / flat.shape[1])


class EMV(_PatientMinimum):
    """Exponential moving variance: d = x - ema; ema += α d; emv = (1 - α)(emv + α ‖d‖² / N). Memory of one output.

    Args:
        alpha: α, between 0 and 1.
        patience: stop when the variance has not fallen for so many steps.

    Wang et al., "Early stopping for deep image prior" (TMLR 2023), section 3.3.
    """

    def __init__(self, alpha: float = 0.1, patience: int = 1000):
        super().__init__(patience)
        if not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
            raise ValueError(f"expected alpha between 0 and 1, got {alpha!r}")
        self.alpha = alpha

    def _start(self, image: torch.Tensor) -> None:
        super()._start(image)
        self._average = torch.zeros_like(image.flatten(1), dtype=torch.float64)
        self._variance = torch.zeros(len(image), dtype=torch.float64, device=image.device)

    def _statistic(self, step: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        flat = image.flatten(1).double()
        difference = flat - self._average
        self._average += self.alpha * difference
        squared = difference.square().mean(dim=1)
        self._variance.copy_((1 - self.alpha) * (self._variance + self.alpha * squared))
        return self._variance


class Settled(_Rule):
    """For searches: stop when the set of kept weights hardly changes any more.

    Args:
        window: compare the kept set with that of so many steps before.
        tolerance: stop when at most this fraction of the kept weights was exchanged.

    Attributes:
        exchanged: (E,) the fraction that the last window exchanged, 1 before there were two; None before any step.

    Each experiment keeps the logits at which it settled.
    """

    def __init__(self, window: int = 100, tolerance: float = 0.01):
        check_count(window, "window")
        if not isinstance(tolerance, (int, float)) or not 0 <= tolerance < 1:
            raise ValueError(f"expected tolerance from 0 to below 1, got {tolerance!r}")
        self.window, self.tolerance = window, tolerance
        self.logits: torch.Tensor | None = None
        self.exchanged: torch.Tensor | None = None

    def update(
        self, step: int, logits: torch.Tensor, count: int | torch.Tensor, sizes: torch.Tensor | None = None
    ) -> bool:
        """Take the logits after a step, (E, N), of which the `count` largest are kept; steps come from 0 on.

        A count an experiment is (E,) int64, on the logits' device.
        With `sizes`, (N,), a logit stands for so many weights, and the largest are kept that have `count` in all.
        """
        if self.logits is None:
            self.logits = logits.clone()
            self.stopped_at = torch.full((len(logits),), -1, device=logits.device)
            self.exchanged = torch.ones(len(logits), device=logits.device)
            self._kept = torch.zeros_like(logits, dtype=torch.bool)
        if (step + 1) % self.window:
            return False
        running = self.stopped_at < 0
        each = isinstance(count, torch.Tensor)
        if sizes is None and not each:
            threshold = logits.kthvalue(logits.shape[1] - count + 1, dim=1, keepdim=True).values
        else:
            ranked, order = logits.sort(dim=1, descending=True, stable=True)
            number = count[:, None] if each else count
            if sizes is not None:
                number = (sizes[order].cumsum(dim=1) <= number).sum(dim=1, keepdim=True).clamp(min=1)
            threshold = ranked.gather(1, number - 1)
        kept, weight = logits >= threshold, 1 if sizes is None else sizes
        exchanged = (weight * (kept & ~self._kept)).sum(dim=1) / (weight * kept).sum(dim=1)
        self.logits = torch.where(running[:, None], logits, self.logits)
        self.exchanged = torch.where(running, exchanged, self.exchanged)
        self.stopped_at = torch.where(running & (exchanged <= self.tolerance), step + 1, self.stopped_at)
        self._kept = kept
        return self.over

    def selected(self, logits: torch.Tensor) -> torch.Tensor:
        """Each experiment's logits where it settled, and the given newest ones where it has not."""
        if self.logits is None:
            return logits
        return torch.where((self.stopped_at >= 0)[:, None], self.logits, logits)
