"""Measure the quality and the cost of a model at one size: the rows of the trade-off curve.

row = evaluate(any_size, tokenizer, [PerplexityOn(Text("wikitext2", "field")), TaskScore("package:piqa", limit=500), Efficiency()])
"""

from acip.evaluate.curve import CurveSetup, divergence_of, extended, improbable, place_of, recorded, streamed_trade_off, trade_off
from acip.evaluate.divergence import DivergenceOn
from acip.evaluate.efficiency import Efficiency
from acip.evaluate.generated_tasks import GeneratedTask
from acip.evaluate.heldout_text import Text
from acip.evaluate.measurement import Measurement, Part, evaluate, metrics
from acip.evaluate.on_domains import OnDomains
from acip.evaluate.perplexity import Perplexity, PerplexityOn, QuantizedOn, perplexity
from acip.evaluate.samples import Samples
from acip.evaluate.tasks import TaskScore

__all__ = [
    "CurveSetup", "DivergenceOn", "Efficiency", "GeneratedTask", "Measurement", "OnDomains", "Part", "Perplexity", "PerplexityOn",
    "QuantizedOn", "Samples", "TaskScore", "Text", "divergence_of", "evaluate", "extended", "improbable", "metrics", "perplexity",
    "place_of", "recorded", "streamed_trade_off", "trade_off",
]  # fmt: skip
