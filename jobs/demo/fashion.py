"""What changes in the synthetic shop while it is open: which items are on trend, and which go together."""

from dataclasses import dataclass

import numpy as np

from jobs.demo.assortment import Assortment
from jobs.demo.behaviour import Behaviour

HOUR = 3_600_000  # milliseconds
LEAST_PULL = 0.1  # a trend that has faded below it is over


@dataclass(frozen=True)
class Trend:
    """Items that many want for a while; `start` in milliseconds of simulated time."""

    items: np.ndarray
    start: int


class Fashion:
    """The trends and pairs of the moment.

    `pull` float (items,) is above 0 for what is on trend; `partners` int (items, partners) are the rows of the items
    that go well with each, the likeliest first.
    """

    def __init__(self, assortment: Assortment, behaviour: Behaviour, random: np.random.Generator):
        self.assortment, self.random = assortment, random
        count = len(behaviour.partner_weights)
        self.partners = np.array([self._draw_partners(row, count) for row in range(len(assortment))])
        self.pull = np.zeros(len(assortment))
        self._trends: list[Trend] = []

    def change(self, now: int, behaviour: Behaviour) -> None:
        """Start a trend, and give some popular items another best partner."""
        self._start_trend(now, behaviour.trend_items)
        self._shift_pairs(behaviour.shifts)

    def fade(self, now: int, behaviour: Behaviour) -> None:
        """Set what each trend still pulls."""
        self.pull[:] = 0.0
        going_on = []
        for trend in self._trends:
            hours = (now - trend.start) / HOUR
            pull = 0.5 ** (hours / behaviour.trend_half_life_hours)
            if pull > LEAST_PULL:
                self.pull[trend.items] = pull
                going_on.append(trend)
        self._trends = going_on

    def _start_trend(self, now: int, count: int) -> None:
        popularity = self.assortment.popularity
        unpopular = np.flatnonzero((popularity < np.median(popularity)) & (self.pull == 0))
        self._trends.append(Trend(self.random.choice(unpopular, count, replace=False), now))

    def _shift_pairs(self, count: int) -> None:
        chances = self.assortment.popularity / self.assortment.popularity.sum()
        for row in self.random.choice(len(chances), count, replace=False, p=chances):
            partner = self.assortment.draw_partner(row, self.random)
            while partner in self.partners[row]:
                partner = self.assortment.draw_partner(row, self.random)
            self.partners[row, 0] = partner

    def _draw_partners(self, row: int, count: int) -> list[int]:
        """Draw the partners of an item: those of complementary categories first, a similar item last."""
        partners: list[int] = []
        while len(partners) < count:
            partner = self.assortment.draw_partner(row, self.random, similar=len(partners) == count - 1)
            if partner not in partners:
                partners.append(partner)
        return partners
