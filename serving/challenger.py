"""A challenger beside the live model in one replica: it answers the users of its arm, or is asked behind their backs.

The users of its arm are answered by it in the same batches. In shadow mode it is asked on a thread of its own, after
the live answer was given, and what it has no time for is left out. Once a second the replica tells the actor
(serving/experiment.py) what it has seen, and hears whether the experiment goes on; what it has not told when it is
killed is not counted. A challenger does not learn: its histories grow, its weights stay as they are.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from ray.exceptions import RayError

from lib.data.events import Event
from lib.data.ratings import is_dislike
from lib.errors import InputError
from lib.experiments.results import CHALLENGER, SHADOW, Impression, Reaction, Records, Shadow, arm_in, tagged
from lib.ranking.recommender import Question, RankedItem, Recommender
from lib.ranking.rules import RankingRules
from lib.versions.folder import load_folder
from serving.experiment import PreparedChallenger, start_experiments

TELL_SECONDS = 1.0
SHADOW_BATCH = 16  # answers that the challenger is asked for at once
SHADOWS_WAITING = 256  # at most; the newest are left out
logger = logging.getLogger("ray.serve")


class Answer(NamedTuple):
    """What was answered, by which version, and of which arm of an experiment."""

    version: int
    items: list[RankedItem]
    arm: str | None = None  # None where the user takes no part in one
    question: Question | None = None  # with the history that it was answered from, for the shadow


def load_challenger(state: str, prepared: PreparedChallenger, rules: RankingRules) -> "Challenger | None":
    """Load the challenger for one replica, and start the actor that counts if need be.

    A challenger whose files were damaged meanwhile takes no replica with it: it is None, and said in the log.
    """
    try:
        loaded = load_folder(prepared.model)
        recommender = Recommender(loaded.encoder, loaded.catalog, loaded.version, loaded.log_offset, rules)
        recommender.prepare(None)
        return Challenger(prepared, recommender, start_experiments(state))
    except InputError as error:
        logger.error("the challenger cannot be loaded, so the live model answers its users, too: %s", error)
        return None


class Challenger:
    """The challenger in one replica."""

    def __init__(self, prepared: PreparedChallenger, recommender: Recommender, actor: Any):
        self.prepared = prepared
        self.name = prepared.name
        self.recommender = recommender
        self.ratings = recommender.encoder.config.ratings  # the scale is the live model's, too
        self.actor = actor
        self.records = Records.none()
        self.waiting: deque[tuple[str, Question, list[str]]] = deque()
        self.unchanging = threading.Lock()  # held by the shadow's thread, and by whoever changes the recommender
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="shadow")

    def change_items(self, items: Mapping[str, Mapping[str, Any] | None]) -> None:
        """Give items other attributes, or remove them (None); long texts are left for later."""
        with self.unchanging:
            self.recommender.change_items(items, texts_later=True)

    def caught_up(self) -> None:
        """Answer by texts that were left for later."""
        with self.unchanging:
            self.recommender.caught_up()

    def arm_of(self, user_id: str | None) -> str | None:
        """Return the arm of a user, None for who takes no part."""
        return self.prepared.config.arm_of(user_id, self.name)

    def answer(self, live: Recommender, questions: Sequence[Question], user_ids: Sequence[str | None]) -> list[Answer]:
        """Answer each question by its user's arm."""
        arms = [self.arm_of(user_id) for user_id in user_ids]
        answers: dict[int, Answer] = {}
        for recommender in (live, self.recommender):
            places = [place for place, arm in enumerate(arms) if (arm == CHALLENGER) == (recommender is not live)]
            ranked = recommender.recommend([questions[place] for place in places]) if places else []
            for place, items in zip(places, ranked, strict=True):
                answers[place] = Answer(recommender.version, items, arms[place], questions[place])
        return [answers[place] for place in range(len(questions))]

    def note(self, request_id: str, user_id: str, answer: Answer) -> str:
        """Count an answer that is shown; returns the id that names its arm."""
        assert answer.arm is not None
        request_id = tagged(request_id, self.name, answer.arm)
        if answer.arm != SHADOW:
            self.records.impressions.append(Impression(user_id, answer.arm))
        elif len(self.waiting) < SHADOWS_WAITING and answer.question is not None:
            self.waiting.append((request_id, answer.question, [item.item_id for item in answer.items]))
        return request_id

    def react(self, events: Sequence[Event]) -> None:
        """Count events that were accepted and name an answer of this experiment; what was turned down is no reward."""
        for event in events:
            arm = arm_in(event.request_id, self.name)
            if arm is not None and event.request_id is not None and not is_dislike(event, self.ratings):
                reaction = Reaction(event.user_id, arm, event.request_id, event.event, event.item_id)
                self.records.reactions.append(reaction)

    async def run(self) -> None:
        """Ask for shadows and tell the actor what was seen; returns when the experiment has ended."""
        while await self.tell():
            await asyncio.sleep(TELL_SECONDS)
            until = time.monotonic() + TELL_SECONDS
            while self.waiting and time.monotonic() < until:
                asked = [self.waiting.popleft() for _ in range(min(SHADOW_BATCH, len(self.waiting)))]
                shadows = await asyncio.get_running_loop().run_in_executor(self.executor, self._shadows, asked)
                self.records.shadows += shadows

    def _shadows(self, asked: Sequence[tuple[str, Question, list[str]]]) -> list[Shadow]:
        # copies: a history keeps what a recommender read of it, and this is another thread
        histories = [question.history.newest(len(question.history)) for _, question, _ in asked]
        questions = [q._replace(history=copy, explain=False) for (_, q, _), copy in zip(asked, histories, strict=True)]
        with self.unchanging:
            answers = self.recommender.recommend(questions)
        return [
            Shadow(request_id, live, [item.item_id for item in items])
            for (request_id, _, live), items in zip(asked, answers, strict=True)
        ]

    async def tell(self) -> bool:
        """Hand over the records; whether the experiment goes on."""
        records, self.records = self.records, Records.none()
        try:
            return await self.actor.record.remote(self.prepared, records)
        except RayError as error:  # an actor that died is restarted, and goes on from its file
            logger.warning("what was seen for a second is not counted: %s", error)
            return True
