"""Rows of the trade-off curve: what a model of one size is worth."""

from acip.evaluate.perplexity import Perplexity, curve, perplexity, trade_off

__all__ = ["Perplexity", "curve", "perplexity", "trade_off"]
