"""MLflow's LoggedModels, which the Models tab of an experiment compares.

    artifact         "smollm2-135m"                                  registered versions point at it
    measured size    "smollm2-135m, 42 percent of bytes"             bytes, KL divergence, perplexity, tasks, speed
    export           "smollm2-135m, 42 percent of bytes, exported"   where it is
    other models     "gptq, 42 percent of numbers"                   rows of an arena; models that jobs/evaluate.py measured

Weights stay in the store: the models are external. A tag of each holds its key. A job that is resumed or repeated finds the models by their
keys and adds only what is missing, so there are no duplicates. A model is READY once everything is logged.

A metric of a LoggedModel is also a metric of the run that measured it, and names the dataset it was measured on
(acip_platform.tracking.datasets). MLflow searches and plots models by metrics only, so the bytes are both a param and a metric. Its page
sorts models by their time only, the newest first: models are created from the largest to the smallest.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities import (
    Dataset,
    DatasetInput,
    Experiment,
    InputTag,
    LifecycleStage,
    LoggedModel,
    LoggedModelInput,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
)  # fmt: skip
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_MODEL_IS_EXTERNAL

from acip.artifact.artifact import Artifact
from acip.evaluate import DivergenceOn, Efficiency, PerplexityOn, TaskScore, metrics
from acip.evaluate.curve import place_of
from acip.evaluate.tasks import score as task_score
from acip.mixture import Mixture
from acip.recipe import nearest
from acip.sizing.budget import BITS_PER_WEIGHT, is_coded
from acip.sizing.domains import worst_domain
from acip.sizing.excess_loss_area import excess_loss_area
from acip_platform.settings import Settings
from acip_platform.tracking.datasets import Datasets, datasets_of, text_of
from acip_platform.tracking.registry import ModelVersion, few_retries, reached
from acip_platform.tracking.runs import BATCH, Run

KEY = "acip_key"  # tag: identifies the model
ANY_SIZE, SIZE, EXPORT, OTHER = "any-size", "size", "export", "other"  # types of models
METHOD = "acip"
PARAM_CHARACTERS = 500

Values = tuple[Mapping[str, float], Dataset | None]  # metrics, and what they were measured on


@dataclass(frozen=True)
class Description:
    """The content of a LoggedModel. Descriptions with equal keys describe the same model."""

    key: str
    name: str
    kind: str  # MLflow's model type
    params: Mapping[str, Any]
    tags: Mapping[str, str] = field(default_factory=dict)
    values: Sequence[Values] = ()


def log_models(run: Run, models: Sequence[Description], experiment_id: str = "", made: bool = True) -> list[str]:
    """Log models and their metrics in `run`, as far as they are not logged yet. Return their ids.

    New models are created in `experiment_id`, by default that of the run. They become outputs of the run if it `made` them, else inputs.
    """
    client, info = run.client, run.client.get_run(run.run_id)
    experiment_id = experiment_id or info.info.experiment_id
    found = _find(run, experiment_id, models)
    if missing := [model for model in models if model.key not in found]:
        for model in missing:
            params = {key: str(value)[:PARAM_CHARACTERS] for key, value in model.params.items() if value is not None}
            tags = {**model.tags, KEY: model.key, MLFLOW_MODEL_IS_EXTERNAL: "true"}
            client.create_logged_model(experiment_id, model_name(model.name), run.run_id, tags, params, model.kind)
        found = _find(run, experiment_id, models)  # again: another process may have created the same ones
    ids = [found[model.key].model_id for model in models]

    datasets = {(each.name, each.digest): each for model in models for _, each in model.values if each is not None}
    linked = set[str]()
    if info.inputs is not None:
        linked |= {each.model_id for each in info.inputs.model_inputs}
        for used in info.inputs.dataset_inputs:
            datasets.pop((used.dataset.name, used.dataset.digest), None)
    if info.outputs is not None:
        linked |= {each.model_id for each in info.outputs.model_outputs}
    new = [id for id in dict.fromkeys(ids) if id not in linked]
    inputs = [DatasetInput(each, [InputTag(MLFLOW_DATASET_CONTEXT, "eval")]) for each in datasets.values()]
    if inputs or (new and not made):
        client.log_inputs(run.run_id, inputs, [] if made else [LoggedModelInput(id) for id in new])
    if made and new:
        client.log_outputs(run.run_id, [LoggedModelOutput(id, 0) for id in new])

    new_metrics = [metric for model in models for metric in _new_metrics(model, found[model.key])]
    for at in range(0, len(new_metrics), BATCH):
        client.log_batch(run.run_id, metrics=new_metrics[at : at + BATCH])
    for model in models:
        logged = found[model.key]
        if logged.status != LoggedModelStatus.READY:
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return ids


def _find(run: Run, experiment_id: str, models: Sequence[Description]) -> dict[str, LoggedModel]:
    """Return the logged ones of `models` by key. If there are several with one key, all but the first are deleted."""
    found: dict[str, LoggedModel] = {}
    keys = ", ".join(f"'{key}'" for key in dict.fromkeys(model.key for model in models))
    page: Any = None
    while keys and (page is None or page.token):
        page = run.client.search_logged_models(
            [experiment_id], f"tags.{KEY} IN ({keys})", order_by=[{"field_name": "creation_timestamp"}], page_token=page and page.token
        )
        for model in page:
            if found.setdefault(model.tags[KEY], model) is not model:
                run.client.delete_logged_model(model.model_id)
    return found


def _new_metrics(model: Description, logged: LoggedModel) -> list[Metric]:
    """Return the metrics that a model does not have yet.

    MLflow keeps one value per name, time and step, whatever the dataset is, so each metric has a time of its own.
    """
    known = {(metric.key, metric.value, metric.dataset_name, metric.dataset_digest) for metric in logged.metrics or ()}
    results = {
        (name, float(value), None if dataset is None else dataset.name, None if dataset is None else dataset.digest): None
        for values, dataset in model.values
        for name, value in values.items()
        if math.isfinite(value)
    }
    new, now = [each for each in results if each not in known], int(time.time() * 1000)
    return [Metric(name, value, now + i, 0, logged.model_id, text, digest) for i, (name, value, text, digest) in enumerate(new)]


def model_name(name: str) -> str:
    """Return `name` without the characters that MLflow does not allow in the name of a LoggedModel."""
    return name.translate(dict.fromkeys(map(ord, "/:.%\"'"), "_"))


def key_of(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# ---- artifacts and their sizes


def log_artifact(run: Run, name: str, artifact: Artifact, uri: str) -> str:
    """Log the model of an artifact and those of the sizes in its curve. Return the id of the artifact's."""
    sizes = of_sizes(name, artifact, uri, artifact.curve)
    return log_models(run, [of_artifact(name, artifact, uri), *sizes])[0]


def of_artifact(name: str, artifact: Artifact, uri: str) -> Description:
    """Describe an artifact: the result of a calibration or a fine-tuning, which has every size."""
    manifest, recipe = artifact.manifest, artifact.recipe
    origin = manifest.get("provenance", {})
    tuned, data = origin.get("finetuned"), origin.get("job", {}).get("data")
    params = {
        "model": name, "method": METHOD, "base": manifest["base"]["source"], "recipe": nearest(recipe)[0],
        "data": data and str(Mixture.of(data)), "steps": manifest.get("steps"), "stop_ratio": recipe.stop_ratio,
        "finetuned_from": tuned and f"{name} {tuned['version']}", "finetuned_at": tuned and tuned["size"],
    }  # fmt: skip
    area = excess_loss_area(artifact.curve) if len(artifact.curve) > 1 and any(row["got"] == 1.0 for row in artifact.curve) else math.nan
    return Description(
        key_of(uri), _titled(name, artifact), ANY_SIZE, params, {"artifact_uri": uri}, [({"area_under_excess_nats": area}, None)]
    )


def of_sizes(name: str, artifact: Artifact, uri: str, rows: Sequence[Mapping[str, Any]]) -> list[Description]:
    """Describe sizes of an artifact: rows of its curve, or of an evaluation."""
    datasets = datasets_of(rows, artifact.tokenizer()) if rows else {}
    common = {"model": name, "method": METHOD, "base": artifact.manifest["base"]["source"]}
    base_bytes = artifact.table().base_bytes
    models = []
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        share = row["bytes"] / base_bytes if base_bytes else None
        params = {
            **common, "size": size_name(row), "bytes": row["bytes"], "share_of_bytes": share and f"{share:.4f}", "params": row["params"],
            BITS_PER_WEIGHT: row.get(BITS_PER_WEIGHT), "flops_per_token": row.get("flops"),
        }  # fmt: skip
        values = [({"bytes": row["bytes"], **({"share_of_bytes": share} if share else {})}, None), *measured(row, datasets)]
        key = key_of(uri, place_of(row))
        title = f"{_titled(name, artifact)}, {size_name(row)}"
        models.append(Description(key, title, SIZE, params, {"artifact_uri": uri}, values))
    return models


def _titled(name: str, artifact: Artifact) -> str:
    return f"{name} tuned" if "finetuned" in artifact.manifest.get("provenance", {}) else name


def size_name(row: Mapping[str, Any]) -> str:
    """Return a size as text, without characters that MLflow refuses: `42 percent of bytes`, `60 percent of numbers`."""
    share = row.get("asked", row["got"])
    return f"{share * 100:.3g} percent of {'bytes' if is_coded(row) else 'numbers'}" if share < 1 else "the base model"


def measured(row: Mapping[str, Any], datasets: Datasets) -> list[Values]:
    """Return the results of a row, each with the dataset that it was measured on."""
    results: list[Values] = []
    for part in row.get("evaluation", ()):
        values, dataset = part["values"], datasets.get(text_of(part)) if "corpus" in part else None
        if part["kind"] == DivergenceOn.kind:
            results.append(({"kl": values["kl_nats"], "same_top_share": values["same_top_share"]}, dataset))
        elif part["kind"] == PerplexityOn.kind:
            results.append(({"perplexity": values["perplexity"]}, dataset))
        elif part["kind"] == Efficiency.kind:
            results.append(({key: values[key] for key in ("tokens_per_s", "latency_s", "peak_memory_bytes") if key in values}, None))
        elif part["kind"] == TaskScore.kind:
            results.append(({task_metric(part["label"]): task_score(values)[1]}, None))
        else:
            results.append((metrics({"evaluation": [part]}), dataset))
    if "perplexity" in row:
        results.append(({"perplexity": row["perplexity"]}, datasets.get(text_of(row))))
    if worst := worst_domain(row):
        results.append(({"kl_worst_domain": worst.kl}, None))
    return results


def task_metric(label: str) -> str:
    """Return the metric of a task: `task/piqa` of the label `task/package_piqa`."""
    return label.replace(f"{TaskScore.kind}/package_", f"{TaskScore.kind}/")


def of_other(name: str, key: str, params: Mapping[str, Any], row: Mapping[str, Any], tokenizer: Any) -> Description:
    """Describe a model that is not a size of an artifact, by a row of its evaluation."""
    values = [({"bytes": row["bytes"]}, None), *measured(row, datasets_of([row], tokenizer))]
    return Description(key, name, OTHER, {"model": name, **params, "bytes": row["bytes"], "params": row["params"]}, {}, values)


def log_export(settings: Settings, version: ModelVersion, provenance: Mapping[str, Any], where: str, kind: str = "transformers") -> None:
    """Log an export of a registered version in the run that made the version. `provenance` is that of the export, at `where`.

    A version without a LoggedModel is skipped. RegistryAwayError if MLflow fails.
    """
    if not version.model_id:
        return
    with reached(settings), few_retries():
        client = MlflowClient(tracking_uri=settings.tracking_uri)
        parent, size = client.get_logged_model(version.model_id), provenance["size"]
        row = {"got": size["sizes"]["bytes" if size["bits_per_weight"] else "linear"], BITS_PER_WEIGHT: size["bits_per_weight"]}
        shown = size_name({key: value for key, value in row.items() if value is not None})
        params = {
            **{key: parent.params.get(key) for key in ("model", "method", "base")}, "exported_from": f"{version.name} {version.version}",
            "size": shown, "bytes": provenance["weight_bytes"], "format": kind, "quantize": provenance.get("quantize"), "folder": where,
        }  # fmt: skip
        values = [({"bytes": provenance["weight_bytes"]}, None)]
        key = key_of(EXPORT, version.uri, where, params)
        export = Description(key, f"{version.name}, {shown}, exported", EXPORT, params, {"artifact_uri": version.uri}, values)
        log_models(Run(client, parent.source_run_id or ""), [export], parent.experiment_id)


def experiment_of(run: Run, artifact: Artifact | None) -> str:
    """Return the id of the experiment of the run that made an artifact, or of the one of `run` if MLflow does not have that one."""
    experiment = _maker_experiment(run.client, artifact) if artifact is not None else None
    return run.experiment_id if experiment is None else str(experiment.experiment_id)


def experiment_name(settings: Settings, artifact: Artifact, otherwise: str) -> str:
    """Return the name of the experiment of the run that made an artifact, or `otherwise` if MLflow does not have it."""
    experiment = _maker_experiment(MlflowClient(tracking_uri=settings.tracking_uri), artifact)
    return otherwise if experiment is None else str(experiment.name)


def _maker_experiment(client: MlflowClient, artifact: Artifact) -> Experiment | None:
    """Return the experiment of the run that made an artifact, unless it was deleted."""
    maker = artifact.manifest.get("provenance", {}).get("mlflow_run")
    try:
        experiment = client.get_experiment(client.get_run(maker).info.experiment_id) if maker else None
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
    return experiment if experiment is not None and experiment.lifecycle_stage == LifecycleStage.ACTIVE else None
