"""Convert KubeRay's CustomResourceDefinitions to infra/kuberay.schema.json, which tests/infra/test_kubernetes.py uses.

    python infra/crds.py ray.io_rayjobs.yaml ray.io_rayservices.yaml ray.io_raycronjobs.yaml

The CRDs are in KubeRay's helm-chart/kuberay-operator/crds, v1.7.0, Apache-2.0. Only version `v1` is converted, without `status`.
Kubernetes silently drops unknown fields; this schema refuses them, unless the CRD preserves them
(x-kubernetes-preserve-unknown-fields). Repeated parts are moved to $defs. CEL rules (x-kubernetes-validations) are not converted.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

OUT = Path(__file__).with_name("kuberay.schema.json")
KEPT = ("type", "enum", "pattern", "required", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "items")
METADATA = {"name": {"type": "string"}, "namespace": {"type": "string"}}
METADATA |= {key: {"type": "object", "additionalProperties": {"type": "string"}} for key in ("labels", "annotations")}  # type: ignore[dict-item]
MIN_SHARED_CHARS = 200  # shorter parts are not moved to $defs


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """Convert a structural schema of Kubernetes to a JSON Schema that refuses unknown fields."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out = {key: schema[key] for key in KEPT if key in schema}
    if "items" in schema:
        out["items"] = strict(schema["items"])
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        additional = schema.get("additionalProperties", False)
        out["properties"] = {key: strict(value) for key, value in schema.get("properties", {}).items()}
        out["additionalProperties"] = strict(additional) if isinstance(additional, dict) else additional
    if schema.get("nullable"):
        out["type"] = [out["type"], "null"]
    return out


def kind(definition: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the kind of a CRD and its schema."""
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"].pop("status", None)
    name, group = definition["spec"]["names"]["kind"], definition["spec"]["group"]
    schema["properties"] |= {"apiVersion": {"const": f"{group}/v1"}, "kind": {"const": name}}
    schema["properties"]["metadata"] = {"type": "object", "properties": METADATA, "required": ["name"], "additionalProperties": False}
    return name, schema | {"required": ["apiVersion", "kind", "metadata", "spec"]}


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with each kind in `$defs`, together with all parts that occur more than once."""
    count: Counter[str] = Counter()

    def key(node: Any) -> str:
        return json.dumps(node, sort_keys=True)

    def count_parts(node: Any) -> None:
        if isinstance(node, dict):
            count[key(node)] += 1
        if count[key(node)] < 2:
            for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
                count_parts(value)

    def replace(node: Any) -> Any:
        if isinstance(node, list):
            return [replace(value) for value in node]
        if not isinstance(node, dict):
            return node
        text = key(node)
        if "type" in node and isinstance(node["type"], str | list) and count[text] > 1 and len(text) >= MIN_SHARED_CHARS:
            name = hashlib.sha256(text.encode()).hexdigest()[:8]
            if name not in definitions:
                definitions[name] = {}
                definitions[name] = {part: replace(value) for part, value in node.items()}
            return {"$ref": f"#/$defs/{name}"}
        return {part: replace(value) for part, value in node.items()}

    definitions: dict[str, Any] = {}
    count_parts(schemas)
    return {"$defs": {name: replace(schema) for name, schema in schemas.items()} | definitions}


def main(paths: list[str]) -> None:
    schemas = dict(kind(yaml.safe_load(Path(path).read_text(encoding="utf-8"))) for path in paths)
    note = "From the CustomResourceDefinitions of KubeRay v1.7.0 (Apache-2.0, The KubeRay Authors), by infra/crds.py."
    OUT.write_text(json.dumps({"$comment": note, **shared(schemas)}, sort_keys=True, indent=0) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
