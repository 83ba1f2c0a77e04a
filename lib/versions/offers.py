"""Offers: models that the learner is to take over as its next version, such as a fine-tuned one.

    offers/<name>/         a model folder, whose manifest comes last

An offer is withdrawn when its version is live everywhere; the version keeps its name, so that none is taken over twice.
"""

from pathlib import Path

from lib.model.folder import MANIFEST
from lib.versions.attempts import ATTEMPT_FILE, Attempts
from lib.versions.folder import LoadedVersion, load_folder
from lib.versions.store import Store

OFFERS = "offers"


class Offers:
    """The offers of one registry."""

    def __init__(self, store: Store):
        self.store = store

    def names(self) -> list[str]:
        """Return the names of the models that wait to be taken over, ascending."""
        return [name for name in self.store.folders(OFFERS) if self.store.is_file(f"{OFFERS}/{name}/{MANIFEST}")]

    def add(self, name: str, model: Path) -> None:
        """Offer a model folder; one of this name is replaced."""
        self.store.upload(model, f"{OFFERS}/{name}", last=MANIFEST)

    def load(self, name: str) -> LoadedVersion:
        """Load a model that waits to be taken over; its version is that of its manifest.

        Raises:
            InputError: it is damaged.
        """
        with self.store.downloaded(f"{OFFERS}/{name}") as folder:
            return load_folder(folder)

    def attempts(self, name: str) -> Attempts:
        """Return the record of how often an offer was tried; it goes with the offer."""
        return Attempts(self.store, f"{OFFERS}/{name}/{ATTEMPT_FILE}")

    def withdraw(self, name: str) -> None:
        """Take an offer back, whether it was taken over or not."""
        self.store.delete_folder(f"{OFFERS}/{name}", first=MANIFEST)
