"""Rows of the trade-off curve: what a model of one size is worth."""

from acip.evaluate.perplexity import Perplexity, perplexity, trade_off

__all__ = ["Perplexity", "perplexity", "trade_off"]
