"""Which point to look at next: a grid, golden section along a range, or CMA-ES. Pure: no models, no files.

A strategy is a generator: it yields a point and is sent the point's cost, of which only the order counts. It depends on
nothing but the configuration and the costs, so an interrupted search is repeated from its journal to where it was.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator

import numpy as np

from .search_config import Point, SearchConfig, grid_values

Proposals = Generator[Point, float, None]
INVERSE_GOLDEN = (math.sqrt(5) - 1) / 2
NARROW = 1e-3  # of the range: golden section ends there
FIRST_STEP = 0.25  # of every range: CMA-ES' first standard deviation, about the middle


def propose(config: SearchConfig) -> Proposals:
    """The points of a search, as many as its budget allows at most.

    Golden section and CMA-ES run once for every combination of the choices and share the budget evenly.
    """
    if config.strategy == "grid":
        for values in itertools.product(*map(grid_values, config.space.values())):
            yield dict(zip(config.space, values))
        return
    combinations = config.combinations()
    assert config.budget is not None
    for number, fixed in enumerate(combinations):
        share = config.budget // len(combinations) + (number < config.budget % len(combinations))
        if config.strategy == "golden":
            yield from golden(config, fixed, share)
        else:
            yield from cmaes(config, fixed, share)


def _point(config: SearchConfig, fixed: Point, shares: list[float]) -> Point:
    ranges = {key: dimension.at(share) for (key, dimension), share in zip(config.ranges.items(), shares)}
    return {key: fixed[key] if key in fixed else ranges[key] for key in config.space}


def golden(config: SearchConfig, fixed: Point, budget: int) -> Proposals:
    """Golden section search (Kiefer 1953): the interval shrinks to 0.618 of its length with every point.

    Finds the best point if the cost falls and then rises along the range; of equal costs the left side is kept.
    """
    low, high = 0.0, 1.0
    left, right = high - INVERSE_GOLDEN, low + INVERSE_GOLDEN
    cost_left = yield _point(config, fixed, [left])
    cost_right = yield _point(config, fixed, [right])
    for _ in range(budget - 2):
        if high - low <= NARROW:
            return
        if cost_left <= cost_right:
            high, right, cost_right = right, left, cost_left
            left = high - INVERSE_GOLDEN * (high - low)
            cost_left = yield _point(config, fixed, [left])
        else:
            low, left, cost_left = left, right, cost_right
            right = low + INVERSE_GOLDEN * (high - low)
            cost_right = yield _point(config, fixed, [right])


def cmaes(config: SearchConfig, fixed: Point, budget: int) -> Proposals:
    """CMA-ES (Hansen and Ostermeier 2001) through the library `cma`, each range scaled to [0, 1].

    Its random numbers are its own: what an objective draws from numpy's global generator does not matter.

    Raises:
        ImportError: the library is not there.
    """
    cma = import_cma()
    generator = np.random.default_rng(config.seed)
    options = {
        "bounds": [0, 1],
        "seed": np.nan,  # numpy's global generator is left alone
        "randn": lambda *shape: generator.standard_normal(shape),
        "verbose": -9,
        "verb_log": 0,
    }
    strategy = cma.CMAEvolutionStrategy([0.5] * len(config.ranges), FIRST_STEP, options)
    left = budget
    while left > 0 and not strategy.stop():
        population = strategy.ask()
        costs = []
        for shares in population[:left]:
            costs.append((yield _point(config, fixed, [float(share) for share in shares])))
        left -= len(population)
        if len(costs) == len(population):
            strategy.tell(population, costs)


def import_cma():  # type: ignore[no-untyped-def]
    """The library `cma`, an extra.

    Raises:
        ImportError: saying what to install.
    """
    try:
        import cma
    except ImportError:
        raise ImportError("strategy: cmaes needs the library cma: pip install 'steep[search]'") from None
    return cma
