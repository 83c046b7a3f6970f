"""What was measured along a run: named columns of one value an experiment and recorded step."""

from __future__ import annotations

import torch


class History:
    """Columns of (T, E) values (or (T, E, …), such as a spectrum's rings), recorded at T of the run's steps.

    Values stay on their device until a column is read, so that recording does not wait for a GPU.
    """

    def __init__(self):
        self.step: list[int] = []
        self._columns: dict[str, list[torch.Tensor]] = {}

    @classmethod
    def restored(cls, steps: list[int], columns: dict[str, torch.Tensor]) -> History:
        """A history from its steps and columns of (T, …), as a checkpoint holds them.

        Raises:
            ValueError: a column has more or fewer rows than there are steps.
        """
        history = cls()
        for name, column in columns.items():
            if len(column) != len(steps):
                raise ValueError(f"expected {len(steps)} rows in the column {name}, got {len(column)}")
        history.step = list(steps)
        history._columns = {name: list(column) for name, column in columns.items()}
        return history

    def record(self, step: int, **values: torch.Tensor) -> None:
        """Add a row: one (E, …) tensor a column, the same columns in every row."""
        if self.step and values.keys() != self._columns.keys():
            raise ValueError(f"expected the columns {', '.join(self._columns)}, got {', '.join(values)}")
        self.step.append(step)
        for name, value in values.items():
            self._columns.setdefault(name, []).append(value.detach())

    def cut(self, step: int) -> None:
        """Forget what was recorded at this step and later."""
        rows = sum(recorded < step for recorded in self.step)
        self.step = self.step[:rows]
        self._columns = {name: values[:rows] for name, values in self._columns.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> torch.Tensor:
        """One column as (T, E, …) on the CPU.

        Raises:
            KeyError: no such column was recorded.
        """
        if name not in self._columns:
            raise KeyError(f"expected a column out of {', '.join(self._columns) or 'none'}, got {name!r}")
        values = self._columns[name]
        if len({value.device for value in values}) == 1:
            return torch.stack(values).cpu()  # one wait instead of one a row
        return torch.stack([value.cpu() for value in values])  # rows of a checkpoint and newer ones

    def last(self) -> dict[str, float]:
        """The newest row, averaged over experiments; columns that hold more than one number each are left out."""
        newest = {name: values[-1] for name, values in self._columns.items()}
        return {name: value.mean().item() for name, value in newest.items() if value.ndim == 1}

    def __len__(self) -> int:
        return len(self.step)
