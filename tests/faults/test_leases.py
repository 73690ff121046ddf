"""Concurrent submissions: one process holds a lease, the others get its owner's name, and one of them replaces a dead owner."""

import json
import threading
import time
from pathlib import Path

import pytest
from acip_platform.scheduling.leases import FOLDER, Leases
from acip_platform.storage.store import Store

from tests.support.faulty import proxy
from tests.support.waiting import until

LEASE_S = 2.4  # on disk, because a busy machine may stop a thread for a second


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "disk":
        return Store(str(tmp_path / "store"), tmp_path / "cache")
    for name, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(name, value)
    return Store(f"s3://models/{tmp_path.name}", tmp_path / "cache")


class Process(Leases):
    """The leases of one submission. A test runs several of them in its own process."""

    def __init__(self, store: Store, name: str) -> None:
        self.losses: list[tuple[str, str]] = []
        super().__init__(
            store, LEASE_S * (2 if store.root.startswith("s3") else 1), lambda attempt, owner: self.losses.append((attempt, owner))
        )
        self.owner = name


def test_second_claim_returns_the_owner(store: Store) -> None:
    with Process(store, "ann") as ann, Process(store, "bob") as bob:
        assert ann.claim(["a", "b"]) == {}
        waits: list[tuple[str, str]] = []
        assert bob.claim(["b", "c"], lambda *wait: waits.append(wait)) == {"b": "ann"}
        assert waits == [("b", "ann")] and set(bob.held) == {"c"}
        time.sleep(1.5 * ann.lease_s)
        assert bob.claim(["a"]) == {"a": "ann"}, "heartbeats renew a lease"
        bob.release("b")  # has no effect, because ann holds it
        ann.release("b")
        assert bob.claim(["b"], lambda *wait: waits.append(wait)) == {} and len(waits) == 1, "a released lease is free at once"
        time.sleep(ann.lease_s / 2)
        assert set(ann.held) == {"a"} and set(bob.held) == {"b", "c"}
    assert not ann.losses and not bob.losses
    with Process(store, "eve") as eve:
        assert eve.claim(["a", "b", "c"], lambda *wait: waits.append(wait)) == {}
        assert len(waits) == 1, "the end of the block releases all leases"


def test_one_of_several_concurrent_claims_succeeds(store: Store) -> None:
    """Three processes claim a lease that is free, and then one of a dead owner."""
    dead = Process(store, "dead")
    dead.claim(["b"])  # sends no heartbeats
    for attempt, least_s in (("a", 0.0), ("b", LEASE_S)):
        processes = [Process(store, f"p{i}") for i in range(3)]
        results: dict[str, dict[str, str]] = {}

        def claim(process: Process, attempt: str = attempt, results: dict[str, dict[str, str]] = results) -> None:
            process.__enter__()
            results[process.owner] = process.claim([attempt])

        began = time.monotonic()
        threads = [threading.Thread(target=claim, args=(process,)) for process in processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began >= least_s
        (winner,) = (name for name, others in results.items() if not others)
        assert all(others == {attempt: winner} for name, others in results.items() if name != winner)
        for process in processes:
            process.__exit__()


def test_a_suspended_owner_notices_its_replacement(store: Store) -> None:
    ann, bob = Process(store, "ann"), Process(store, "bob")
    ann.claim(["a"])  # suspended: sends no heartbeats
    with bob:
        assert bob.claim(["a"]) == {}
        with ann:  # resumes
            until(lambda: ann.losses, "the former owner does not notice its replacement")
        assert ann.losses == [("a", "bob")] and not ann.held
        time.sleep(bob.lease_s / 2)
        assert not bob.losses
        assert set(store.small(f"{FOLDER}/a")) >= {"2"}


@pytest.mark.parametrize("store", ["disk"], indirect=True)  # S3 refuses requests with a wrong date
def test_clocks_do_not_affect_leases(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With clocks a year ahead or behind, live owners keep their leases and dead ones lose them."""
    real = time.time
    with Process(store, "ann") as ann, Process(store, "bob") as bob:
        ann.claim(["a"])
        Process(store, "dead").claim(["b"])
        for year in (1, -1):
            monkeypatch.setattr(time, "time", lambda year=year: real() + year * 365 * 86400)
            assert bob.claim(["a"]) == {"a": "ann"}
        assert bob.claim(["b"]) == {}
    assert not ann.losses


def test_an_s3_outage_expires_no_lease(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The heartbeats fail for longer than the lease lasts. Afterwards the owner still holds it."""
    with proxy(s3_server["AWS_ENDPOINT_URL"]) as server:
        for name, value in {**s3_server, "AWS_ENDPOINT_URL": server.url, "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)
        store = Store(f"s3://models/{tmp_path.name}", tmp_path / "cache")
        with Process(store, "ann") as ann:
            ann.claim(["a"])
            beats = beat_of(store)
            server.choose = lambda method, path, before: "reset"
            time.sleep(1.5 * ann.lease_s)
            server.choose = lambda method, path, before: ""
            until(lambda: beat_of(store) > beats, "no heartbeat after the outage")
            assert Process(store, "bob").claim(["a"]) == {"a": "ann"}
        assert not ann.losses


def beat_of(store: Store) -> int:
    return int(json.loads(store.small(f"{FOLDER}/a")["1"])["beat"])
