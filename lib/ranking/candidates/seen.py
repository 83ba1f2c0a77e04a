"""What the person had before, where people come back to items."""

import numpy as np

from lib.ranking.candidates.asked import Asked, Found

MOST = 50  # items, those that were seen last


def find(asked: Asked) -> Found:
    """Return what each person has seen, how often and how long ago; nobody's whose seen items stay out."""
    lines, rows, times, ago = [], [], [], []
    for line, (person, again) in enumerate(zip(asked.people, asked.repeats, strict=True)):
        if not again or not len(person.seen):
            continue
        latest = np.argsort(person.ago, kind="stable")[:MOST]
        lines.append(np.full(len(latest), line))
        rows.append(person.seen[latest])
        times.append(person.times[latest])
        ago.append(person.ago[latest])
    if not lines:
        nothing = np.zeros(0, dtype=np.int64)
        return Found(nothing, nothing)
    since = np.concatenate(ago)
    values = {"seen": np.concatenate(times), "seen_recently": 1 / (1 + since), "is_newest": since == 0}
    values = {name: own.astype(np.float32) for name, own in values.items()}
    return Found(np.concatenate(lines), np.concatenate(rows).astype(np.int64), values)
