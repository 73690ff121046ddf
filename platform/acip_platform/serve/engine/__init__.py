"""The engine: token ids in, token ids out.

It continues sequences of token ids with resident models, at any size. It has no notion of text, of HTTP or of status codes:

    request.py              GenerationRequest: what a caller submits, and what it may plug in
    events.py, errors.py    what comes back
    engine.py               the thread that steps the models
    resident_model.py       one model in memory at all sizes; model_cache.py: which models are in memory
    batch.py, kv_cache.py, sampling.py    one step

Use it as a library:

    engine = Engine()
    engine.add(model := ResidentModel(version, artifact))
    for event in engine.events(model, GenerationRequest(prompts=[[1, 2, 3]], budget=Budget(ratio=0.6), max_tokens=16)):
        ...
"""

from typing import Any

from acip import renamed


def __getattr__(name: str) -> Any:
    return renamed.name_of_package(__name__, name)
