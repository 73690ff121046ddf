"""Model cards of exports and artifacts: size, usage, measured curve, and limits."""

import json
import re
from pathlib import Path
from typing import Any

from acip.artifact.artifact import Artifact
from acip.utils.hub_ids import HUB_ID, REVISION

HEAD = ("library_name: transformers", "pipeline_tag: text-generation", "tags:")


def card(provenance: dict[str, Any], artifact: Artifact, name: str) -> str:
    """Return the README.md of an export named `name`, with the metadata of the hub at the top."""
    source, size, quantized = artifact.manifest["base"]["source"], provenance["size"], provenance["quantize"]
    hub_id = source.partition("@")[0] if _is_hub_id(source) else None
    license = license_of(source)
    tags = ["acip", "compressed", "low-rank", *([quantized, "quantized"] if quantized else [])]
    head = [
        *([f"license: {license}"] if license else []),
        *([f"base_model: {hub_id}"] if hub_id else []),
        *(["base_model_relation: quantized"] if hub_id and quantized else []),
        *HEAD,
        *(f"- {tag}" for tag in tags),
    ]
    ratio = size["sizes"]["linear"]
    forms = ", ".join(f"{count} {form}" for form, count in provenance["storage"].items())
    linked = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{shown(source)}`"
    facts = {
        "base model": linked + (f" at `{provenance['base']['revision']}`" if provenance["base"].get("revision") else ""),
        "requested size": _amount(size["asked"], size["convention"], size["unit"]),
        "actual size": _amount(size["got"], size["convention"], size["unit"]),
        "size of the compressed layers": f"{ratio:.4f} of the numbers that the base model stores",
        "parameters": f"{size['params']:,}",
        "weights": f"{provenance['weight_bytes']:,} bytes, {quantized or provenance['dtype']}",
        "layers": forms,
    }
    return "\n".join([
        "---", *head, "---", "",
        f"# {name}", "",
        f"{linked}, compressed to {ratio:.0%} by [ACIP](https://arxiv.org/abs/2502.01717). The size was chosen after calibration; "
        f"{_training(provenance['artifact'])}.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), "",
        "## Use", "", "```python", *_usage(quantized), "```", "",
        "Without the package `acip`, pass `trust_remote_code=True`; transformers then runs `modeling_acip.py` from this folder. "
        "Requires transformers 5 or newer.", "",
        "## Measured", "", *_curve(artifact.curve, ratio, quantized), "",
        "## Limits", "", *(f"* {limit}" for limit in _limits(provenance, license, linked)), "",
    ])  # fmt: skip


def gguf_card(provenance: dict[str, Any], artifact: Artifact, name: str) -> str:
    """Return the README.md of a GGUF file named `name`."""
    source, size = artifact.manifest["base"]["source"], provenance["size"]
    hub_id = source.partition("@")[0] if _is_hub_id(source) else None
    license = license_of(source)
    linked = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{shown(source)}`"
    head = [
        *([f"license: {license}"] if license else []),
        *([f"base_model: {hub_id}", "base_model_relation: quantized"] if hub_id else []),
        "pipeline_tag: text-generation", "tags:", "- acip", "- gguf", "- quantized",
    ]  # fmt: skip
    facts = {
        "base model": linked + (f" at `{provenance['base']['revision']}`" if provenance["base"].get("revision") else ""),
        "requested size": f"{size['asked']:,} bytes",
        "actual size": f"{size['got']:,} bytes",
        "predicted loss": f"{size['predicted_loss_increase']:.4f} nats per token above the base model's",
        "weights": ", ".join(f"{count} {kind}" for kind, count in provenance["types"].items()),
    }
    return "\n".join([
        "---", *head, "---", "",
        f"# {name}", "",
        f"{linked} for llama.cpp. The type of each weight is the one that saves the most loss per byte.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), "",
        "## Use", "", "```bash", 'llama-cli -m model.gguf -p "The capital of France is"', "```", "",
        "## Limits", "", *(f"* {limit}" for limit in _limits({**provenance, "quantize": None, "recipe": {}}, license, linked)), "",
    ])  # fmt: skip


def artifact_card(artifact: Artifact, name: str) -> str:
    """Return the README.md of an artifact named `name`."""
    source = artifact.manifest["base"]["source"]
    hub_id = source.partition("@")[0] if _is_hub_id(source) else None
    license, tags = license_of(source), ["acip", "compressed", "low-rank", "any-size"]
    linked = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{shown(source)}`"
    head = [*([f"license: {license}"] if license else []), *([f"base_model: {hub_id}"] if hub_id else []), *HEAD, *(f"- {t}" for t in tags)]
    provenance = {
        "recipe": artifact.manifest["recipe"],
        "quantize": None,
        "base": artifact.manifest["base"],
        "size": {"sizes": {"linear": 1.0}},
    }
    return "\n".join([
        "---", *head, "---", "",
        f"# {name}", "",
        f"{linked} at any size, by [ACIP](https://arxiv.org/abs/2502.01717). Choose the size when you load the model.", "",
        "## Use", "", "```python", *_any_size_usage(), "```", "",
        "Requires the package `acip`, whose `ARTIFACT.md` documents the format. No code from this folder is executed.", "",
        "## Measured", "", *_curve(artifact.curve, None, None), "",
        "## Limits", "", *(f"* {limit}" for limit in _limits(provenance, license, linked, "manifest.json")), "",
    ])  # fmt: skip


def license_of(source: str) -> str | None:
    """Return the license in the model card of a base model, or None if the card is not on this machine. Nothing is downloaded."""
    if Path(source).is_dir():
        path: Any = Path(source) / "README.md"
    elif _is_hub_id(source):
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(source.partition("@")[0], "README.md", revision=source.partition("@")[2] or None)
    else:
        return None
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---", Path(path).read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    match = re.search(r"^license:\s*[\"']?([\w.-]+)[\"']?\s*$", front[1], re.MULTILINE) if front else None
    return match[1] if match else None


def shown(source: str) -> str:
    """Return the source of a base model or text for publication: of a local path, only the last part."""
    return source if source.startswith("package:") or _is_hub_id(source) else Path(source).name


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(HUB_ID + REVISION, source) is not None and not Path(source.partition("@")[0]).exists()


def _amount(amount: float, convention: str, unit: str) -> str:
    if unit == "ratio":
        return f"{amount:.4f} ({convention} ratio)"
    return f"{amount:,} {unit}" if isinstance(amount, int) else f"{amount:,.4f} {unit}"


def _training(artifact: dict[str, Any]) -> str:
    """Return a clause on fine-tuning after the calibration, which acip_platform.training.fine_tuning records in the provenance."""
    tuned = artifact.get("finetuned")
    if not tuned:
        return "the model was not trained for this size"
    return f"the model was fine-tuned at size {tuned['size']:g} ({tuned['steps']:,} steps on {shown(tuned['data'])})"


def _usage(quantized: str | None) -> list[str]:
    return [
        "import acip  # registers these layers in transformers; no code from this folder is executed",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/or/repo")',
        'tokenizer = AutoTokenizer.from_pretrained("path/or/repo")',
        'inputs = tokenizer("The capital of France is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24)[0]))",
        *([] if quantized else ["", '# to fine-tune with LoRA: peft.LoraConfig(target_modules="all-linear")']),
    ]


def _any_size_usage() -> list[str]:
    return [
        "import acip",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/or/repo")',
        'model.prune_model_by_score(size_ratio=0.5)  # can be repeated; model.resize("8GB") sets a budget in bytes',
        "model.compress()  # makes plain layers and frees memory",
        'model.quantize("nf4")  # optional',
    ]


def _curve(rows: list[dict[str, Any]], ratio: float | None, quantized: str | None) -> list[str]:
    measured = [row for row in rows if isinstance(row.get("perplexity"), int | float)]
    if not measured:
        return ["No trade-off curve was measured for this model."]
    first = measured[0]
    setup = [f"{shown(first['corpus'])}, held out"] if "corpus" in first else []
    if {"windows", "context"} <= first.keys():
        setup.append(f"{first['windows']} windows of {first['context']} tokens, {first.get('protocol', 'packed')}")
    table = ["All measured sizes of this calibration" + (f" ({'; '.join(setup)})" if setup else "") + ", without quantization:", ""]
    table += ["| requested | actual | parameters | perplexity | |", "|---|---|---|---|---|"]
    nearest = None if ratio is None else min(measured, key=lambda row: abs(row.get("got", row.get("asked", 0)) - ratio))
    for row in measured:
        actual = row.get("got", row.get("asked"))
        error = f" ± {row['perplexity'] * row['stderr']:.2f}" if isinstance(row.get("stderr"), int | float) else ""
        params = f"{row['params']:,}" if "params" in row else ""
        notes = ["closest to this model"] if row is nearest else []
        notes += ["below the calibrated sizes"] if row.get("extrapolated") else []
        table.append(f"| {row.get('asked', actual):.2f} | {actual:.4f} | {params} | {row['perplexity']:.2f}{error} | {', '.join(notes)} |")
    return table + (
        ["", f"This model is quantized ({quantized}). The table does not include the loss that this causes."] if quantized else []
    )


def _limits(provenance: dict[str, Any], license: str | None, linked: str, facts: str = "provenance.json") -> list[str]:
    stop = provenance["recipe"].get("stop_ratio")
    limits = [
        f"The limits and errors of {linked} are also those of this model. Compression may add errors, more on some topics than on others.",
        "Perplexity on one corpus does not predict quality on your task. Measure the model on your task.",
    ]
    if isinstance(stop, int | float) and provenance["size"]["sizes"]["linear"] < stop:
        limits.append(f"This size is below {stop}, the smallest calibrated size: it is extrapolated.")
    if provenance["quantize"]:
        limits.append(
            "Quantized matrices are dequantized for each product, which saves memory but is not faster. To fine-tune, export without "
            "quantization."
        )
    limits.append(
        f"License: {license}, that of the base model." if license else "License: that of the base model, which was not found. Check it."
    )
    return [*limits, f"Digest of the base model: `{json.dumps(provenance['base'].get('digest'))[1:13]}`. All other facts are in `{facts}`."]
