"""How far the versions have learned of the log: an aggregator asks before it takes events, and waits for no storage.

A log that ends before (an old copy that was restored) would give new events offsets that were learned already. Where
the versions cannot be read now, events are taken all the same, the status says what is not known, and the versions are
read again until they can be.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from lib.errors import InputError
from lib.log.layout import LogLayout
from lib.log.shard import Shard
from lib.versions.accounts import Accounts
from lib.versions.registry import Registry

LONGEST_WAIT = 5.0  # seconds for storage that does not answer
UNKNOWN = (
    "state: whether the log reaches as far as versions have learned of it is not known, and is looked at again: {}"
)


class LearnedEnd:
    """The log offset that the newest version has learned up to."""

    def __init__(self, state: str, shard: Shard):
        self.state = state
        self.shard = shard
        self.unknown: str | None = None  # why it is not known
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="learned")  # of its own: storage may hang for long

    async def read(self) -> int | None:
        """Return the offset, or None where it cannot be had now and `unknown` says why."""
        try:
            async with asyncio.timeout(LONGEST_WAIT):
                learned = await asyncio.get_running_loop().run_in_executor(self.thread, self._read)
        except TimeoutError:
            self.unknown = UNKNOWN.format("the storage of the versions does not answer")
        except Exception as error:  # away, or no version can be read: neither keeps events from being taken
            self.unknown = UNKNOWN.format(str(error) or repr(error))
        else:
            self.unknown = None
            return learned
        return None

    def _read(self) -> int:
        if self.shard.count > 1:
            return 0  # the order of all shards says how far each must reach
        registry = Registry.of(self.state)
        if (versions := LogLayout.of(self.state).versions) is not None and registry.head() is None:
            raise InputError(f"versions: there are none in {versions}; mount its disk, or restore them")
        return Accounts(registry).newest_log_offset()
