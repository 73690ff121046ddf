"""The engine: token ids in, token ids out.

It continues sequences of token ids with resident models, at any size. It contains no code for text, HTTP or status codes:

    request.py              GenerationRequest, with the hooks that a caller may add
    events.py, errors.py    the events and errors of a request
    engine.py               the thread that steps the models
    resident_model.py       one model in memory; resident_weights.py: the weights of the sizes that are requested
    resident_loader.py      reads its weights, or maps them from files that replicas share
    model_cache.py          which models are in memory
    batch.py, kv_cache.py, sampling.py    one step; speculation.py: when a small size drafts tokens

Use it as a library:

    engine = Engine()
    engine.add(model := ResidentModel(version, artifact))
    for event in engine.events(model, GenerationRequest(prompts=[[1, 2, 3]], budget=Budget(ratio=0.6), max_tokens=16)):
        ...
"""

import importlib
from typing import Any

import transformers.utils

from acip import renamed


def _import_generation() -> None:
    """Import transformers' generation without scikit-learn, if it is installed: its import takes a second, and nothing here needs it."""
    is_available = transformers.utils.is_sklearn_available
    transformers.utils.is_sklearn_available = lambda: False
    try:
        importlib.import_module("transformers.generation.candidate_generator")  # which asks whether it is installed
    finally:
        transformers.utils.is_sklearn_available = is_available


_import_generation()


def __getattr__(name: str) -> Any:
    return renamed.name_of_package(__name__, name)
