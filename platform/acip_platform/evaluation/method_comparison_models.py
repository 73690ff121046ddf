"""The rows of an arena as LoggedModels of MLflow, in the experiment of the fleet of the same name: one chart shows rivals and sizes."""

from collections.abc import Mapping, Sequence

from mlflow.entities import Dataset

from acip.base import outline
from acip_platform.evaluation.method_comparison import DENSE, Arena, Row, measurements
from acip_platform.settings import Settings
from acip_platform.tracking.datasets import dataset_of
from acip_platform.tracking.logged_models import OTHER, Description, Values, key_of, log_models, size_name, task_metric
from acip_platform.tracking.runs import Run, Tracking


def log_arena(settings: Settings, arena: Arena, rows: Sequence[Row]) -> Run:
    """Log the rows of an arena as models. Return the run that holds them, which is the same for the same arena."""
    fingerprints = {method: arena.fingerprint(method) for method in (DENSE, *arena.methods)}
    run = Tracking(settings, f"acip/{arena.name}").start(f"arena {arena.name}", f"arena-{key_of(fingerprints)}", {"arena": arena.name})
    run.params({"base": arena.base, "dtype": arena.dtype, "data": arena.data, "methods": ", ".join(arena.methods)})
    with run.ending():
        base = outline(arena.base, arena.dtype)
        base_bytes = sum(parameter.numel() * parameter.itemsize for parameter in base.model.parameters())
        itemsize = next(base.model.parameters()).itemsize
        texts, tasks = measurements(arena)
        datasets: dict[str, Dataset | None] = {
            f"perplexity {on.text.source.removeprefix('package:')}": dataset_of(on.text.read_by(base.tokenizer), base.tokenizer)
            for on in texts
        }
        scores = {task.task.removeprefix("package:"): task_metric(task.label) for task in tasks}
        models = []
        for row in sorted(rows, key=lambda row: -row["stored_bytes"]):
            rest_bytes = base_bytes - row["dense_params"] * itemsize  # of what no method compresses, such as the embeddings
            models.append(_of_row(arena, row, rest_bytes + row["stored_bytes"], base_bytes, datasets, scores))
        log_models(run, models)
    return run


def _of_row(
    arena: Arena, row: Row, model_bytes: int, base_bytes: int, datasets: Mapping[str, Dataset | None], scores: Mapping[str, str]
) -> Description:
    """Describe the model of a row. Its metrics have the names that those of an artifact's sizes have."""
    share = model_bytes / base_bytes
    values: list[Values] = [({"bytes": model_bytes, "share_of_bytes": share, "seconds": row["seconds"]}, None)]
    values += [({"perplexity": row["metrics"][name]}, dataset) for name, dataset in datasets.items() if name in row["metrics"]]
    values.append(({metric: row["metrics"][name] for name, metric in scores.items() if name in row["metrics"]}, None))
    size = size_name(row)
    params = {
        "model": row["title"], "method": row["method"], "base": arena.base, "size": size, "bytes": model_bytes,
        "share_of_bytes": f"{share:.4f}", "counted": row["counted"],
    }  # fmt: skip
    name = f"{row['title']}, {size}" if row["method"] != DENSE else f"{arena.name}, {size}"
    return Description(key_of(row["fingerprint"], row["method"], row["asked"]), name, OTHER, params, {}, values)
