"""What a model of one size is worth, and costs: rows of the trade-off curve.

row = evaluate(any_size, tokenizer, [PerplexityOn(Text("wikitext2", "field")), TaskScore("package:piqa", limit=500), Efficiency()])
"""

from acip.evaluate.curve import extended, improbable, recorded, trade_off
from acip.evaluate.divergence import DivergenceOn
from acip.evaluate.efficiency import Efficiency
from acip.evaluate.perplexity import Perplexity, PerplexityOn, QuantisedOn, perplexity
from acip.evaluate.rows import Measurement, Part, evaluate, metrics
from acip.evaluate.samples import Samples
from acip.evaluate.tasks import TaskScore
from acip.evaluate.text import Text

__all__ = [
    "DivergenceOn", "Efficiency", "Measurement", "Part", "Perplexity", "PerplexityOn", "QuantisedOn", "Samples", "TaskScore", "Text",
    "evaluate", "extended", "improbable", "metrics", "perplexity", "recorded", "trade_off",
]  # fmt: skip
