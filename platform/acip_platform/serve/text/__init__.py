"""Between tokens and text: detokenizer, token bytes, grammars, tools, log-probabilities."""
