"""The artifacts that vLLM is given as a model: a folder, s3://BUCKET/PREFIX, or models:/NAME@ALIAS of the registry.

vLLM gets a local folder with the small files of the artifact, such as its config and tokenizer. The processes that compute read tensors
where they are, by memory mapping or ranged requests.
"""

import os
from functools import lru_cache
from pathlib import Path

from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from vllm.config import ModelConfig
from vllm.engine import arg_utils

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST

REGISTERED = "models:/"  # MLflow's scheme of registered models
SIZE_TRACKER = "acip_vllm.native:SizeTracker"

_uris: dict[str, str] = {}  # of artifacts, by the folder that vLLM is given; the last one is served


def uri_of(folder: str) -> str:
    """Return the URI of the artifact whose small files are in `folder`."""
    return _uris.get(folder, folder)


def served_uri() -> str:
    """Return the URI of the artifact that this process serves."""
    return list(_uris.values())[-1]


@lru_cache(maxsize=4)
def opened(uri: str) -> Artifact:
    """Open the artifact at `uri`. Raise ArtifactError or StoreError if there is none."""
    return Store.of(Settings.from_env()).open(uri)


def find(model: str) -> str | None:
    """Return the URI of the artifact that `model` names; None if it names something else, which vLLM may know.

    Raise RegistryError if the registry has no such version, and RegistryAwayError if it does not answer.
    """
    if model.startswith(REGISTERED):
        from acip_platform.tracking.registry import Registry, few_retries, reached

        with reached(), few_retries():
            return Registry(Settings.from_env()).named(model.removeprefix(REGISTERED).replace("/", "@")).uri
    if model.startswith("s3://"):
        return model if Store.of(Settings.from_env()).exists(model) else None
    return model if (Path(model) / MANIFEST).is_file() else None


_pull, _is_remote = ModelConfig.maybe_pull_model_tokenizer_for_runai, arg_utils.is_cloud_storage


def register() -> None:
    """Make vLLM find artifacts where it finds models in object storage."""
    arg_utils.is_cloud_storage = lambda model: model.startswith(REGISTERED) or _is_remote(model)
    ModelConfig.maybe_pull_model_tokenizer_for_runai = pull


def pull(config: ModelConfig, model: str, tokenizer: str) -> None:
    """Give vLLM the folder of an artifact, and the logits processor that follows the sizes of requests."""
    uri = find(model)
    if uri is None:
        _pull(config, model, tokenizer)
        return
    artifact = opened(uri)
    artifact.tokenizer()  # copies all small files to the folder
    config.model = str(artifact.folder)
    config.tokenizer = config.model if tokenizer == model else tokenizer
    _uris.pop(config.model, None)
    _uris[config.model] = uri
    config.logits_processors = [*(config.logits_processors or []), SIZE_TRACKER]
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # that runner has another interface for logits processors
