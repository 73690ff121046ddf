"""The keys of infra/serve.yaml and the arguments of `build`."""

from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from acip_platform.serve.api import BUILD_ARGS, build
from acip_platform.serve.served_versions import registered
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry, RegistryError
from acip_platform.tracking.runs import Tracking
from mlflow.tracking import MlflowClient
from ray.serve.schema import ServeDeploySchema

from acip.artifact.artifact import Artifact
from acip.errors import AcipError

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")
CONFIG = Path(__file__).parents[2] / "infra" / "serve.yaml"


def test_config_file_has_only_known_keys() -> None:
    """Serve ignores unknown keys, so the test compares them with the schema."""
    config = yaml.safe_load(CONFIG.read_text())
    schema = ServeDeploySchema.model_validate(config)
    assert set(config) <= set(ServeDeploySchema.model_fields)
    (application,) = config["applications"]
    assert set(application) <= set(type(schema.applications[0]).model_fields)
    assert set(application["args"]) == set(BUILD_ARGS)
    assert config["http_options"]["host"] == "127.0.0.1", "without API keys only this machine may connect"


def test_unknown_argument_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown argument 'max_request' \(did you mean 'max_requests'\?\)"):
        build({"max_request": 3})


@pytest.fixture
def settings(small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Select a registry with one champion, `small`."""
    monkeypatch.setenv("ACIP_HOME", str(tmp_path))
    settings = Settings.from_env()
    run = Tracking(settings, "test").start("small", "f", {})
    Registry(settings).set_alias(Registry(settings).register("small", str(small_artifact.folder), run.run_id, {}))
    return settings


def test_engines_scale_between_the_bounds(settings: Settings) -> None:
    assert [version.name for version in registered(settings, None, "champion")] == ["small"]
    scaling = engine(build({"replicas": 4, "min_replicas": 0})).autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (0, 4)
    assert engine(build({"replicas": 3})).num_replicas == 3


def echo(model_input: list[str]) -> list[str]:
    return model_input


def test_champions_of_other_programs_are_not_served(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry may be shared. A model that another program has logged with MLflow is served only if it is named, with an error."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", settings.tracking_uri)
    experiment = MlflowClient().create_experiment("other", artifact_location=(tmp_path / "other").as_uri())
    with mlflow.start_run(experiment_id=experiment):
        mlflow.pyfunc.log_model(name="model", python_model=echo, registered_model_name="other", pip_requirements=["mlflow"])
    MlflowClient(settings.tracking_uri).set_registered_model_alias("other", "champion", "1")
    assert [version.name for version in registered(settings, None, "champion")] == ["small"]
    (named,) = registered(settings, ["other"], "champion")
    assert named.is_foreign
    Registry(settings).client.delete_registered_model_alias("small", "champion")
    with pytest.raises(RegistryError, match=r"there is nothing to serve\. Choose another --alias \(small has none\)"):
        registered(settings, None, "champion")


def test_numbers_of_yaml_are_sizes_and_versions(settings: Settings) -> None:
    """`default_size: 0.6` and `alias: 1` are numbers in YAML."""
    assert registered(settings, ["small"], 1)[0].version == "1"  # type: ignore[arg-type]
    deployed = build({"alias": 1, "default_size": 0.6, "max_size": 0.8})._bound_deployment
    assert deployed.init_args[-1] == "0.6"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"models": "small"}, "models is 'small'; it must be a list of names"),
        ({"models": [1]}, r"models is \[1\]; it must be a list of names"),
        ({"max_requests": "64"}, "max_requests is '64'; it must be a whole number, at least 1"),
        ({"replicas": 0}, "replicas is 0; it must be a whole number, at least 1"),
        ({"http_replicas": 0}, "http_replicas is 0; it must be a whole number, at least 1"),
    ],
)
def test_invalid_arguments_are_refused(settings: Settings, args: dict[str, Any], message: str) -> None:
    with pytest.raises(AcipError, match=message):
        build(args)


def engine(application: Any) -> Any:
    """Return the deployment of the engine in an application."""
    bound = [arg._bound_deployment for arg in application._bound_deployment.init_args if hasattr(arg, "_bound_deployment")]
    (found,) = [deployment for deployment in bound if deployment.name == "Engine"]
    return found._deployment_config
