"""Speculative decoding: a small size of a model drafts tokens, and one pass at the requested size verifies them.

    last token --> draft 1 --> draft 2 --> draft 3                   one pass per draft, at the size that drafts
    last token, draft 1, draft 2, draft 3 --> t1, t2, t3, t4         one pass at the requested size

The sequence's own sampler samples every t from the logits of the requested size. Tokens are taken up to the first t that is not its draft.
The text is therefore that of plain decoding, with every setting of a request, except for rounding differences between passes. Drafts are
sampled with the random numbers of t, so that a draft is right with a probability of at least (1 - d) / (1 + d), where d is the total
variation distance between the distributions of the two sizes.

Both sizes share one KV cache. A draft sees the keys and values that the requested size has computed for the text before the last token,
and the verifying pass overwrites those of the drafts.

Whether to draft, and how many tokens, is decided before each step from what was measured so far: seconds of a pass by size and rows, and
the share of right drafts. Drafts are made only for steps in which every sequence decodes at the same size.
"""

import statistics
from collections import defaultdict, deque
from dataclasses import dataclass, field

from acip.layers.mixed_sizes import Size, padded

DRAFTS = (1, 3, 5)  # tokens; with the token before them, they are a number of rows that needs no padding
MAX_SEQUENCES = 4  # that draft at the same time: with more rows, passes are limited by arithmetic, and drafts save nothing
MIN_GAIN = 1.05  # expected tokens/s with drafts, relative to plain decoding
MEASURED = 9  # passes whose median counts
RETRY_STEPS = 128  # plain steps after which one draft is tried again
PLAIN_STEPS = 64  # steps with drafts after which a plain one is measured again
PRIOR = 4.0  # drafts that are taken as right before the first one, so that a few wrong ones at the beginning do not decide
MEMORY = 0.98  # weight of the past in the share of right drafts, per step

Key = tuple[int, int]


@dataclass
class Speculation:
    """The measurements of one model whose tokens are drafted at the size `draft`."""

    draft: Size
    seconds: dict[tuple[Key, int], deque[float]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=MEASURED)))
    _right: dict[Key, float] = field(default_factory=lambda: defaultdict(lambda: PRIOR))  # drafts by verifying size, decayed
    _tried: dict[Key, float] = field(default_factory=lambda: defaultdict(lambda: PRIOR))
    _since: int = 0  # steps of the present kind, with drafts or plain, in a row
    _drafts: bool = False  # the present kind

    def count(self, size: Size, sequences: int, most: int) -> int:
        """Return how many tokens to draft for each sequence in the next step, up to `most`; 0 = decode plainly."""
        best = self._best(size, sequences, most)
        if best and self._since >= PLAIN_STEPS:
            return 0
        if not best and self._since >= RETRY_STEPS and self._allowed(size, sequences) and most:
            return DRAFTS[0]
        return best

    def measured(self, size: Size, sequences: int, drafted: int, right: list[int], draft_s: float, verify_s: float) -> None:
        """Add the measurements of a step with `drafted` tokens per sequence, of which `right` were right; 0 = a plain step."""
        self._add(size.key, sequences * (1 + drafted), verify_s)
        if drafted:
            self._add(self.draft.key, sequences, draft_s / drafted)
            self._right[size.key] = MEMORY * self._right[size.key] + sum(right)
            self._tried[size.key] = MEMORY * self._tried[size.key] + sum(min(count + 1, drafted) for count in right)
        self._since = self._since + 1 if self._drafts == bool(drafted) else 1
        self._drafts = bool(drafted)

    def share(self, size: Size) -> float:
        """Return the share of right drafts among those whose predecessors were right."""
        return self._right[size.key] / self._tried[size.key]

    def gain(self, size: Size, sequences: int, drafted: int) -> float | None:
        """Return the expected tokens/s with so many drafts, relative to plain decoding. None = a pass has not been measured."""
        plain, verify = self._median(size.key, sequences), self._median(size.key, sequences * (1 + drafted))
        draft = self._median(self.draft.key, sequences)
        if plain is None or verify is None or draft is None:
            return None
        share = self.share(size)
        tokens = sum(share**i for i in range(drafted + 1))
        return tokens * plain / (drafted * draft + verify)

    def _allowed(self, size: Size, sequences: int) -> bool:
        return sequences <= MAX_SEQUENCES and size.key != self.draft.key

    def _best(self, size: Size, sequences: int, most: int) -> int:
        if not self._allowed(size, sequences) or self._median(size.key, sequences) is None:
            return 0
        best, largest = 0, MIN_GAIN
        for count in DRAFTS:
            if count > most or self.share(size) ** count < 0.5:  # most of such drafts would be wrong
                break
            gain = self.gain(size, sequences, count)
            if gain is None:
                return count  # measure it
            if gain > largest:
                best, largest = count, gain
        return best

    def _add(self, key: Key, rows: int, seconds: float) -> None:
        self.seconds[key, padded(rows)].append(seconds)

    def _median(self, key: Key, rows: int) -> float | None:
        """Return the median seconds of a pass. The first passes are slow, so that it needs several."""
        found = self.seconds.get((key, padded(rows)), ())
        return statistics.median(found) if len(found) > 2 else None
