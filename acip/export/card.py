"""Model cards of exports and artifacts: size, usage, measured curve, and limits."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import CODES
from acip.mixture import Mixture
from acip.sizing.budget import BITS_PER_WEIGHT
from acip.sizing.domains import DOMAINS, worst_domain
from acip.utils.hub_ids import HUB_ID, REVISION

COMPRESSED_TENSORS = "compressed-tensors"
HEAD = ("library_name: transformers", "pipeline_tag: text-generation", "tags:")


def card(provenance: dict[str, Any], artifact: Artifact, name: str) -> str:
    """Return the README.md of an export named `name`, with the metadata of the hub at the top."""
    source, size, quantized = artifact.manifest["base"]["source"], provenance["size"], provenance["quantize"]
    hub_id = source.partition("@")[0] if _is_hub_id(source) else None
    license = license_of(source)
    coded, stock = size["bits_per_weight"] is not None, provenance["format"] == COMPRESSED_TENSORS
    kinds = [quantized, "quantized"] if quantized else ["quantized"] if coded else []
    tags = ["acip", "compressed", *([] if coded else ["low-rank"]), *([COMPRESSED_TENSORS] if stock else []), *kinds]
    head = [
        *([f"license: {license}"] if license else []),
        *([f"base_model: {hub_id}"] if hub_id else []),
        *(["base_model_relation: quantized"] if hub_id and kinds else []),
        *HEAD,
        *(f"- {tag}" for tag in tags),
    ]
    ratio = size["sizes"]["bytes" if coded else "linear"]
    forms = ", ".join(f"{count} {form}" for form, count in provenance["storage"].items())
    linked = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{shown(source)}`"
    facts = {
        "base model": linked + (f" at `{provenance['base']['revision']}`" if provenance["base"].get("revision") else ""),
        "requested size": _amount(size["asked"], size["convention"], size["unit"]),
        "actual size": _amount(size["got"], size["convention"], size["unit"]),
        **(_coded_facts(provenance) if coded else {
            "size of the compressed layers": f"{ratio:.4f} of the numbers that the base model stores",
            "parameters": f"{size['params']:,}",
            "weights": f"{provenance['weight_bytes']:,} bytes, {quantized or provenance['dtype']}",
        }),
        "layers": forms,
    }  # fmt: skip
    return "\n".join([
        "---", *head, "---", "",
        f"# {name}", "",
        f"{linked}, compressed to {ratio:.0%} by [ACIP](https://arxiv.org/abs/2502.01717). The size was chosen after calibration; "
        f"{_training({} if coded else provenance['artifact'])}.", "",
        "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items()), "",
        "## Use", "", "```python", *_usage(not quantized and not coded, stock), "```", "",
        "Requires the package `compressed-tensors`. The format is one of those that vLLM reads." if stock else
        "Without the package `acip`, pass `trust_remote_code=True`; transformers then runs `modeling_acip.py` from this folder. "
        "Requires transformers 5 or newer.", "",
        "## Measured", "", *(_coded_curve(artifact.curve, ratio) if coded else _curve(artifact.curve, ratio, quantized)), "",
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
    has_ranks, coded = artifact.recipe.code != "bits", CODES in artifact.manifest
    license, tags = license_of(source), ["acip", "compressed", *(["low-rank"] if has_ranks else []), "any-size"]
    linked = f"[{hub_id}](https://huggingface.co/{hub_id})" if hub_id else f"`{shown(source)}`"
    head = [*([f"license: {license}"] if license else []), *([f"base_model: {hub_id}"] if hub_id else []), *HEAD, *(f"- {t}" for t in tags)]
    provenance = {
        "recipe": artifact.manifest["recipe"],
        "format": "artifact",
        "quantize": None,
        "base": artifact.manifest["base"],
        "size": {"sizes": {"linear": 1.0}},
    }
    return "\n".join([
        "---", *head, "---", "",
        f"# {name}", "",
        f"{linked} at any size, by [ACIP](https://arxiv.org/abs/2502.01717). Choose the size when you load the model.", "",
        "## Use", "", "```python", *_any_size_usage(has_ranks, coded), "```", "",
        "Requires the package `acip`, whose `ARTIFACT.md` documents the format. No code from this folder is executed.", "",
        "## Measured", "", *([*_curve(artifact.curve, None, None), ""] if has_ranks else []),
        *([*_coded_curve(artifact.curve, None), ""] if coded else []),
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
    texts = " and ".join(shown(source) for source in Mixture.of(tuned["data"]).sources)
    return f"the model was fine-tuned at size {tuned['size']:g} ({tuned['steps']:,} steps on {texts})"


def _coded_facts(provenance: dict[str, Any]) -> dict[str, str]:
    """Return the facts on the bytes of a size of coded layers."""
    size, here = provenance["size"], f"{provenance['weight_bytes']:,} bytes"
    share = f"{size['sizes']['bytes']:.4f} of the base model's"
    stored = f"{size['bytes']:,} bytes, {share}; {size['bits_per_weight']:.2f} bits per weight of the coded layers"
    if provenance["format"] == COMPRESSED_TENSORS:
        return {"stored size in the artifact": stored, "weights in this folder": f"{here}: fixed widths, without Huffman codes"}
    return {"stored size": stored, "weights in this folder": here}


def _usage(trainable: bool, stock: bool) -> list[str]:
    return [
        *([] if stock else ["import acip  # registers these layers in transformers; no code from this folder is executed"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/or/repo")',
        'tokenizer = AutoTokenizer.from_pretrained("path/or/repo")',
        'inputs = tokenizer("The capital of France is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=24)[0]))",
        *([] if not trainable else ["", '# to fine-tune with LoRA: peft.LoraConfig(target_modules="all-linear")']),
    ]


def _any_size_usage(has_ranks: bool, coded: bool) -> list[str]:
    in_bytes = 'model.prune_model_by_score(size_ratio=0.4, convention="bytes")  # integer codes in 40 % of the base model\'s bytes'
    budget = 'can be repeated; model.resize("8GB") sets a budget in bytes'
    return [
        "import acip",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/or/repo")',
        *([in_bytes if has_ranks else f"{in_bytes}; {budget}"] if coded else []),
        *([f"model.prune_model_by_score(size_ratio=0.5)  # half of the layers' numbers; {budget}"] if has_ranks else []),
        "model.compress()  # makes plain layers and frees memory",
        *(['model.quantize("nf4")  # optional'] if has_ranks else []),
    ]


def _curve(rows: list[dict[str, Any]], ratio: float | None, quantized: str | None) -> list[str]:
    measured = [row for row in rows if isinstance(row.get("perplexity"), int | float) and BITS_PER_WEIGHT not in row]
    if not measured:
        return ["No trade-off curve was measured for this model."]
    table = [f"All measured sizes of this calibration{_setup(measured[0])}, without quantization:", ""]
    heading, columns = _domain_columns(measured)
    table += [f"| requested | actual | parameters | perplexity |{heading} |", "|---|---|---|---|---|" + "---|" * bool(heading)]
    nearest = _nearest(measured, ratio)
    for row in measured:
        actual, error = row.get("got", row.get("asked")), _error(row)
        params = f"{row['params']:,}" if "params" in row else ""
        notes = ["closest to this model"] if row is nearest else []
        notes += ["below the calibrated sizes"] if row.get("extrapolated") else []
        cells = f"{row.get('asked', actual):.2f} | {actual:.4f} | {params} | {row['perplexity']:.2f}{error} |{columns(row)}"
        table.append(f"| {cells} {', '.join(notes)} |")
    return [*table, *_domain_note(measured)] + (
        ["", f"This model is quantized ({quantized}). The table does not include the loss that this causes."] if quantized else []
    )


def _coded_curve(rows: list[dict[str, Any]], ratio: float | None) -> list[str]:
    """Return the table of the measured sizes of coded layers. `ratio` is the share of the base model's bytes of this model."""
    measured = [row for row in rows if isinstance(row.get("perplexity"), int | float) and BITS_PER_WEIGHT in row]
    if not measured:
        return ["No trade-off curve over bytes was measured for this model."]
    table = [f"Measured sizes of coded layers{_setup(measured[0])}, as shares of the base model's bytes:", ""]
    heading, columns = _domain_columns(measured)
    table += [f"| actual | bytes | bits per weight | perplexity |{heading} |", "|---|---|---|---|---|" + "---|" * bool(heading)]
    nearest = _nearest(measured, ratio)
    base = [row for row in rows if row.get("got") == 1.0 and BITS_PER_WEIGHT not in row and isinstance(row.get("perplexity"), int | float)]
    for row in base[:1] + measured:
        size = f"{row['bytes']:,}" if isinstance(row.get("bytes"), int) else ""
        bits = f"{row[BITS_PER_WEIGHT]:.2f}" if BITS_PER_WEIGHT in row else ""
        note = "closest to this model" if row is nearest else "base model" if row not in measured else ""
        table.append(f"| {row['got']:.4f} | {size} | {bits} | {row['perplexity']:.2f}{_error(row)} |{columns(row)} {note} |")
    return [*table, *_domain_note(measured)]


def _domain_columns(rows: list[dict[str, Any]]) -> tuple[str, Callable[[dict[str, Any]], str]]:
    """Return the heading of the column for the worst domain, and the function from a row to its cell; "" if no row has domains."""
    if not any(map(worst_domain, rows)):
        return "", lambda row: ""

    def cell(row: dict[str, Any]) -> str:
        worst = worst_domain(row)
        return f" {worst.name}, {worst.kl:.3g} |" if worst else " |"

    return " worst domain, KL |", cell


def _domain_note(rows: list[dict[str, Any]]) -> list[str]:
    """Return a sentence on the domains of the rows."""
    names = dict.fromkeys(name for row in rows for name in row.get(DOMAINS, {}))
    if not names:
        return []
    return ["", f"Worst domain: that with the highest KL divergence from the base model (nats per token) of {', '.join(names)}."]


def _setup(row: dict[str, Any]) -> str:
    """Return on which text a row was measured, in parentheses."""
    setup = [f"{shown(row['corpus'])}, held out"] if "corpus" in row else []
    if {"windows", "context"} <= row.keys():
        setup.append(f"{row['windows']} windows of {row['context']} tokens, {row.get('protocol', 'packed')}")
    return f" ({'; '.join(setup)})" if setup else ""


def _nearest(rows: list[dict[str, Any]], ratio: float | None) -> dict[str, Any] | None:
    return None if ratio is None else min(rows, key=lambda row: abs(row.get("got", row.get("asked", 0)) - ratio))


def _error(row: dict[str, Any]) -> str:
    return f" ± {row['perplexity'] * row['stderr']:.2f}" if isinstance(row.get("stderr"), int | float) else ""


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
    if provenance["size"].get("bits_per_weight") is not None and provenance["format"] == COMPRESSED_TENSORS:
        limits.append(
            "Codes are exact. Step sizes are float32 in the files. They are converted to the dtype in which the model is loaded: each row "
            "of a bfloat16 model is scaled by up to 1 ± 2^-9."
        )
    elif provenance["size"].get("bits_per_weight") is not None:
        limits.append("Codes take one byte per weight in memory. Coded layers can't be trained, with or without LoRA.")
    limits.append(
        f"License: {license}, that of the base model." if license else "License: that of the base model, which was not found. Check it."
    )
    return [*limits, f"Digest of the base model: `{json.dumps(provenance['base'].get('digest'))[1:13]}`. All other facts are in `{facts}`."]
