"""The console output of jobs: a first screen, progress lines or bars, and a last screen with commands to copy."""

import math
import os
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

import ray
from ray.exceptions import RayError
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from acip.evaluate import divergence_of, improbable
from acip.evaluate.heldout_text import cut_by
from acip.sizing.budget import MEGA, as_perplexity, is_coded
from acip.sizing.domains import worst_domain
from acip_platform.scheduling.events import wait_for_checkpoints
from acip_platform.scheduling.job_queue import Outcome
from acip_platform.settings import Settings, this_python
from acip_platform.tracking.run_descriptions import CLOSE_KL

POLL_S = 0.5  # between two looks at the event queue


def console() -> Console:
    """Return the console of a job. On a terminal it shows bars and colors, elsewhere plain lines. Lines are not wrapped.

    Brackets and colons are printed as they are, also in tables: they are part of names, paths and tags.
    """
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)


def shell(settings: Settings) -> str:
    """Return the beginning of the commands on the last screen: this Python, and ACIP_HOME if it is set."""
    python = this_python()
    return f"ACIP_HOME={shlex.quote(str(settings.home))} {python}" if os.environ.get("ACIP_HOME") else python


def duration(seconds: float | None) -> str:
    """Format a duration as 1h02m or 2m03s; None is "?"."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def step_line(event: dict[str, Any]) -> str:
    """Format a progress event: step, loss, perplexity on the step's text, size -> stop ratio, lambda, speed, time left in the phase."""
    size = f"size {event['size']:.3f} -> {event['stop']:.2f}" if event["phase"] == "prune" else f"size {event['size']:.3f} trained"
    task_loss = event["task_loss"]
    perplexity = "" if task_loss is None else f"perplexity {as_perplexity(task_loss):7.2f}  "
    return (
        f"{event['phase']:9s} step {event['step']:5d}  loss {event['loss']:7.3f}  {perplexity}{size}  lambda {event['lambda_']:.5f}  "
        f"{event['tokens_per_s']:,.0f} tok/s  ETA {duration(event['eta_s'])}"
    )


class Watch:
    """A thread that reads the workers' EventQueue and shows the events, with a bar or a line prefix for each model.

    If a KeyboardInterrupt ends the block, the workers write a checkpoint first.
    """

    def __init__(self, out: Console, events: Any) -> None:
        self.out, self.events = out, events
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TextColumn("{task.fields[text]}", markup=False))
        self.bars = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self.bars.start()
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            with suppress(RayError, KeyboardInterrupt):  # a second Ctrl-C ends the waiting
                wait_for_checkpoints(self.events)
        self.stop.set()
        self.thread.join(timeout=10)
        self.bars.stop()

    def _run(self) -> None:
        last = False
        while not last:
            last = self.stop.wait(POLL_S)  # one more time after the end, for the last events
            for event in ray.get(self.events.take.remote()):
                self.show(event)

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        name, kind = event["model"], event["kind"]
        if kind == "stage":
            self.out.print(f"[{name}] {event['text']}")
            return
        if not self.out.is_terminal:
            if kind == "step":
                self.out.print(f"[{name}] {step_line(event)}")
            return
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=1.0, text="")
        if kind == "parametrize":
            self.bars.update(self.tasks[name], completed=event["done"] / event["total"], text=f"basis {event['done']}/{event['total']}")
        elif kind == "code":
            counted = f"{event['what']} {event['done']}/{event['total']}"
            self.bars.update(self.tasks[name], completed=event["done"] / event["total"], text=counted)
        else:
            self.bars.update(self.tasks[name], completed=event["progress"], text=step_line(event))


def _table(title: str, rows: Sequence[Mapping[str, Any]], width: int | None = None) -> Table:
    """Return an empty table of sizes. Its caption holds the warnings about improbable rows."""
    caption = Text("\n".join(improbable(rows)), style="bold yellow") if improbable(rows) else None
    return Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left", width=width)


def trade_off_table(outcome: Outcome) -> Group:
    """Return the trade-off curve of a finished job (`curve_tables`)."""
    summary = outcome.summary
    assert summary is not None
    return curve_tables(f"{outcome.job.name}, version {summary['version']}", summary["curve"], summary["stop_ratio"])


def curve_tables(title: str, rows: Sequence[Mapping[str, Any]], stop_ratio: float) -> Group:
    """Return the trade-off curve of one model as tables: coded sizes over bytes, if there are any, and sizes of ranks over FLOPs."""
    first = rows[0]
    corpus = f"perplexity on {first['corpus']}, held out, {first['windows']} x {first['context']} tokens, {cut_by(first)}"
    coded, over_ranks = ([row for row in rows if is_coded(row) is kind] for kind in (True, False))
    base = next((row for row in over_ranks if row["got"] == 1.0), {})
    tables = []
    if coded:
        tables.append(_empty_trade_off_table(f"{title}: bytes ({corpus})", ("of the bytes", "got", "MB stored", "bits/weight"), coded))
        for row in ([base] if base else []) + coded:
            cells = (
                (f"{row['asked']:.3g}", f"{row['got']:.4f}", f"{row['bits_per_weight']:.2f}") if row is not base else ("base", "1.0000", "")
            )
            tables[-1].add_row(*cells[:2], f"{row['bytes'] / MEGA:.1f}", cells[2], *_quality(row, base), *_worst(row, coded))
    if len(over_ranks) > 1 or not coded:
        subject = f"{title}: ranks" if coded else f"{title} ({corpus})"
        tables.append(_empty_trade_off_table(subject, ("asked", "got", "FLOPs", "parameters", "MB stored"), over_ranks, ("",)))
        for row in over_ranks:
            flops = f"{row['flops'] / base['flops']:.4f}" if "flops" in row and "flops" in base else ""
            size = f"{row['asked']:.2f}", f"{row['got']:.4f}", flops, f"{row['params']:,}", f"{row['bytes'] / MEGA:.1f}"
            note = f"below the stop ratio {stop_ratio}" if row["extrapolated"] else ""
            tables[-1].add_row(*size, *_quality(row, base), *_worst(row, over_ranks), note)
    return Group(*tables)


def example_size(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return a size for the commands of a screen.

    For a model with coded layers, it is the smallest measured size in bytes that is close to the base model, else the largest one. For a
    model without, it is 0.6.
    """
    coded = [row for row in rows if is_coded(row)]
    close = [row["asked"] for row in coded if divergence_of(row).get("kl_nats", math.inf) <= CLOSE_KL]
    return min(close, default=max((row["asked"] for row in coded), default=0.6))


def _empty_trade_off_table(title: str, size: Sequence[str], rows: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> Table:
    """Return a table without rows for sizes of one kind."""
    has_domains = any(map(worst_domain, rows))
    table = _table(title, rows, width=150 if has_domains else 130)
    for heading in (*size, "perplexity", "x base", "KL to base", "same top", *(["worst domain"] if has_domains else []), *notes):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    return table


def _quality(row: Mapping[str, Any], base: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return the cells perplexity, its ratio to the base model's, KL divergence and equal top tokens."""
    divergence = divergence_of(row)
    ratio = f"{row['perplexity'] / base['perplexity']:.2f}" if base else ""
    close = (f"{divergence['kl_nats']:.4f}", f"{divergence['same_top_share']:.1%}") if divergence else ("", "")
    return f"{row['perplexity']:.2f} ± {row['perplexity'] * row['stderr']:.2f}", ratio, *close


def _worst(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the cell of the worst domain with its KL divergence; no cell if none of `rows` has domains."""
    worst = worst_domain(row)
    return [f"{worst.name} {worst.kl:.4f}" if worst else ""] if any(map(worst_domain, rows)) else []


SHOWN = {  # name of a measured value: (heading, format)
    "perplexity": ("ppl", "{:.2f}"), "kl_nats": ("KL", "{:.4f}"), "same_top_share": ("same top", "{:.1%}"), "acc": ("acc", "{:.3f}"),
    "base_acc": ("acc of the base", "{:.3f}"), "kept": ("kept", "{:.1%}"), "flipped": ("flipped", "{:.1%}"),
    "same_answer": ("same answer", "{:.1%}"),
    "stored_bytes": ("bytes", "{:,.0f}"), "resident_bytes": ("bytes in memory", "{:,.0f}"),
    "peak_memory_bytes": ("peak bytes", "{:,.0f}"), "flops": ("FLOPs", "{:.3g}"),
    "latency_s": ("latency s", "{:.2f}"), "prefill_tokens_per_s": ("prefill tok/s", "{:.0f}"),
    "decode_tokens_per_s": ("decode tok/s", "{:.1f}"),
}  # fmt: skip


def evaluation_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Return a table with a column for each size and a line for each measurement, with standard errors if they are known."""
    table = _table(title, rows)
    table.add_column("measured")
    for row in rows:
        table.add_column(f"{row['asked']:g}" + " of the bytes" * is_coded(row), justify="right", no_wrap=True)
    table.add_row("got", *(f"{row['got']:.4f}" for row in rows))
    table.add_row("parameters", *(f"{row['params']:,}" for row in rows))
    table.add_row("MB stored", *(f"{row['bytes'] / MEGA:.1f}" for row in rows))
    if any(map(is_coded, rows)):
        table.add_row("bits per weight", *(f"{row['bits_per_weight']:.2f}" if is_coded(row) else "" for row in rows))
    machines = [{f"{part['device']}, {part['threads']} threads" for part in row["evaluation"] if "device" in part} for row in rows]
    if any(machines):
        table.add_row("speed on", *(" / ".join(sorted(names)) for names in machines))
    values = [{(part["label"], name): part["values"] for part in row["evaluation"] for name in part["values"]} for row in rows]
    for label, name in dict.fromkeys(key for column in values for key in column):
        kind, _, domain = name.partition("/")
        if kind in SHOWN:
            heading, form = SHOWN[kind]
            measurement = domain or label.rpartition("/")[2].removeprefix("efficiency")
            cells = (_with_error(name, column[label, name], form) if (label, name) in column else "" for column in values)
            table.add_row(f"{measurement} {heading}".strip(), *cells)
    return table


def _with_error(name: str, values: dict[str, float], form: str) -> str:
    key = name.replace("_nats", "_stderr_nats") if name.endswith("_nats") else f"{name}_stderr"
    error = values[name] * values["loss_stderr_nats"] if "loss_stderr_nats" in values else values.get(key)
    return form.format(values[name]) + ("" if error is None else f" ± {form.format(error)}")


def lines(out: Console, rows: dict[str, str]) -> None:
    """Print aligned `name  value` lines."""
    width = max(map(len, rows))
    for name, value in rows.items():
        out.print(f"  {name:{width}s}  {value}")
