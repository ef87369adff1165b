"""How a budget is dealt to layers: more slots to the first, fewer to the last, the same sum (PyramidKV, arXiv
2406.02069). Plain integers: admission and capacity know the counts beforehand."""

import functools
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Pyramid:
    """The place of a layer among `num_layers` whose slots fall linearly, the last layer's to a `beta`-th of the
    mean."""

    layer: int
    num_layers: int
    beta: int

    def __post_init__(self) -> None:
        if not 0 <= self.layer < self.num_layers:
            raise ValueError(f"layer = {self.layer}: must be in [0, {self.num_layers - 1}]")
        if self.beta < 1:
            raise ValueError(f"beta = {self.beta}: must be at least 1")

    def slots(self, mean: int, most: int) -> int:
        """The layer's slots if all layers hold num_layers * mean of them in sum, none more than `most`."""
        return shares(mean, most, self.num_layers, self.beta)[self.layer]

    def most_slots(self, mean: int) -> int:
        """The most that `slots` ever is for a mean of up to `mean`, whatever the limit: layers of the lower half hold
        most where there is none, those of the upper half where everybody holds the mean."""
        return max(mean, self.slots(mean, 2 * mean))


@functools.lru_cache(maxsize=4096)
def shares(mean: int, most: int, num_layers: int, beta: int) -> tuple[int, ...]:
    """Slots of every layer, none of them more than the layer before. What does not fit below `most` goes to the last
    layers, as published. Whole slots by largest remainder, so that the sum is num_layers * mean."""
    if num_layers == 1 or mean >= most:
        return (mean,) * num_layers
    first = min(2 * mean - Fraction(mean, beta), Fraction(most))
    step = 2 * (first - mean) / (num_layers - 1)
    exact = [first - layer * step for layer in range(num_layers)]
    whole = [share.numerator // share.denominator for share in exact]
    by_remainder = sorted(range(num_layers), key=lambda layer: (whole[layer] - exact[layer], layer))
    for layer in by_remainder[: num_layers * mean - sum(whole)]:
        whole[layer] += 1
    return tuple(whole)
