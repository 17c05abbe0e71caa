"""Contenders in turn, and what their values come to."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Spread:
    """Where values lie; all in the unit of the values."""

    median: float
    minimum: float
    maximum: float
    quartile1: float
    quartile3: float
    count: int

    @property
    def iqr(self) -> float:
        """Distance of the quartiles."""
        return self.quartile3 - self.quartile1

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def spread(values: Sequence[float]) -> Spread:
    """The spread of at least one value."""
    if len(values) == 1:
        quartiles = [values[0]] * 3
    else:
        quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(
        median=quartiles[1],
        minimum=min(values),
        maximum=max(values),
        quartile1=quartiles[0],
        quartile3=quartiles[2],
        count=len(values),
    )


def take_turns(
    contenders: Mapping[str, Callable[[], T]], rounds: int, *, warm_up: int = 0
) -> dict[str, list[T]]:
    """Results of ``rounds`` runs of each contender, A B A B...; ``warm_up`` rounds are not kept."""
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for number in range(-warm_up, rounds):
        for name, run in contenders.items():
            _progress(f"round {number + 1} of {rounds}: {name}")
            result = run()
            if number >= 0:
                results[name].append(result)
    _progress("")
    return results


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Ratio of the medians."""
    return statistics.median(numerator) / statistics.median(denominator)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios within each round: it forgives a machine that grows slower."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios."""
    return statistics.geometric_mean(values)


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()
