"""Log the models of MLflow 3 (the Models tab of an experiment) for the runs and versions of earlier releases of acip.

    python jobs/migrate.py

Each artifact in the registry or in a run, and each of its measured sizes, becomes a model, and versions are linked with theirs. Nothing
else is changed, and what exists is not logged again: the command may be repeated. The artifacts are read, and must still exist.

Exit codes: 0 everything is logged, 1 some artifacts cannot be read, 2 wrong arguments, or MLflow fails, 130 interrupted.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from acip_platform import cli
from acip_platform.evaluation.measure import Model, log_models
from acip_platform.reporting.console import console
from acip_platform.settings import Settings
from acip_platform.storage.store import Store
from acip_platform.tracking import logged_models
from acip_platform.tracking.registry import Registry, reached
from acip_platform.tracking.runs import Run

from acip.errors import AcipError


def main(argv: Sequence[str] | None = None) -> int:
    cli.parse(cli.parser(__doc__), argv)
    return cli.exit_code(lambda: run(Settings.from_env()))


@reached()
def run(settings: Settings) -> int:
    out, registry, store = console(), Registry(settings), Store.of(settings)
    client, failed = registry.client, 0
    versions = [version for name in registry.models() for version in registry.versions(name, {})]
    makers: dict[str, tuple[str, str]] = {}  # artifact -> (model, run)
    evaluations, tunings = list[Any](), list[Any]()
    for found in _runs(client):
        tags = found.data.tags
        if tags.get("acip_fingerprint", "").startswith("evaluation-"):
            evaluations.append(found)
        elif uri := tags.get("artifact_uri"):
            makers[uri] = tags.get("model", found.info.run_name), found.info.run_id
            tunings += [found] if "finetuned_from" in tags else []
    ids = dict[str, str]()
    for uri, (name, run_id) in makers.items():
        try:
            ids[uri] = logged_models.log_artifact(Run(client, run_id), name, artifact := store.open(uri), uri)
            out.print(f"[{name}] {len(artifact.curve)} sizes of {uri}")
        except AcipError as error:
            failed += 1
            out.print(f"[{name}] {uri} is left out: {error}")
    for version in versions:
        if version.uri in ids:
            registry.link(version, ids[version.uri])
            out.print(f"[{version.name}] version {version.version} is linked with its model")
        elif version.uri not in makers:
            failed += 1
            out.print(f"[{version.name}] version {version.version} is left out: MLflow has no run with its artifact")
    of_number = {(version.name, version.version): ids.get(version.uri) for version in versions}
    for tuning in tunings:
        if parent := of_number.get((tuning.data.tags.get("model", ""), tuning.data.tags["finetuned_from"])):
            Run(client, tuning.info.run_id).uses(parent)
    for evaluation in evaluations:
        failed += not _log_evaluation(Run(client, evaluation.info.run_id), evaluation.data.tags, store, out)
    return cli.FAILED if failed else 0


def _runs(client: Any) -> Iterator[Any]:
    """Yield all runs of acip, oldest first."""
    experiments = [each.experiment_id for each in client.search_experiments(filter_string="name LIKE 'acip/%'")]
    page: Any = None
    while experiments and (page is None or page.token):
        page = client.search_runs(experiments, order_by=["attributes.start_time ASC"], page_token=page and page.token)
        yield from page


def _log_evaluation(run: Run, tags: dict[str, str], store: Store, out: Any) -> bool:
    """Log the models of an evaluation; return False, with a message, if that is not possible."""
    name, uri, rows = tags.get("model", ""), tags.get("artifact_uri", ""), run.read_json("evaluation.json")
    if not rows:
        return True
    if not uri:
        out.print(f"[{name}] run {run.run_id} is left out: repeat jobs/evaluate.py --base, which measures nothing twice")
        return True
    try:
        log_models(run, name, Model(uri), store.open(uri), rows)
    except AcipError as error:
        out.print(f"[{name}] run {run.run_id} is left out: {error}")
        return False
    out.print(f"[{name}] {len(rows)} evaluated sizes of {uri}")
    return True


if __name__ == "__main__":
    sys.exit(main())
