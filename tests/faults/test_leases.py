"""Two submissions at once: one holds the lease, the other says who; a dead holder is replaced by one, whatever the clocks say."""

import json
import threading
import time
from pathlib import Path

import pytest
from acip_platform.scheduling.leases import FOLDER, Leases
from acip_platform.storage.store import Store

from tests.support.faulty import proxy
from tests.support.waiting import until

LEASE_S = 2.4  # on disk: a busy machine may stop a thread for a second


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "disk":
        return Store(str(tmp_path / "store"), tmp_path / "cache")
    for name, value in request.getfixturevalue("s3_server").items():
        monkeypatch.setenv(name, value)
    return Store(f"s3://models/{tmp_path.name}", tmp_path / "cache")


class Process(Leases):
    """One of several in this process."""

    def __init__(self, store: Store, name: str) -> None:
        self.losses: list[tuple[str, str]] = []
        super().__init__(
            store, LEASE_S * (2 if store.root.startswith("s3") else 1), lambda attempt, owner: self.losses.append((attempt, owner))
        )
        self.owner = name


def test_who_comes_second_is_told_who_was_first(store: Store) -> None:
    with Process(store, "ann") as ann, Process(store, "bob") as bob:
        assert ann.claim(["a", "b"]) == {}
        heard: list[tuple[str, str]] = []
        assert bob.claim(["b", "c"], lambda *told: heard.append(told)) == {"b": "ann"}
        assert heard == [("b", "ann")] and set(bob.held) == {"c"}
        time.sleep(1.5 * ann.lease_s)
        assert bob.claim(["a"]) == {"a": "ann"}, "ann's is as fresh as ever"
        bob.release("b")  # not bob's: nothing happens
        ann.release("b")
        assert bob.claim(["b"], lambda *told: heard.append(told)) == {} and len(heard) == 1, "it is free at once; ann goes on with a"
        time.sleep(ann.lease_s / 2)
        assert set(ann.held) == {"a"} and set(bob.held) == {"b", "c"}
    assert not ann.losses and not bob.losses
    with Process(store, "eve") as eve:
        assert eve.claim(["a", "b", "c"], lambda *told: heard.append(told)) == {}
        assert len(heard) == 1, "what was given back is free at once"


def test_of_many_at_once_one_gets_it(store: Store) -> None:
    """Free, and then as a dead one's."""
    dead = Process(store, "dead")
    dead.claim(["b"])  # and no beats
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


def test_who_was_only_stopped_learns_that_it_was_replaced(store: Store) -> None:
    ann, bob = Process(store, "ann"), Process(store, "bob")
    ann.claim(["a"])  # stopped: no beats
    with bob:
        assert bob.claim(["a"]) == {}
        with ann:  # and on
            until(lambda: ann.losses, "who was replaced does not learn of it")
        assert ann.losses == [("a", "bob")] and not ann.held
        time.sleep(bob.lease_s / 2)
        assert not bob.losses
        assert set(store.small(f"{FOLDER}/a")) >= {"2"}


@pytest.mark.parametrize("store", ["disk"], indirect=True)  # S3's requests are dated
def test_clocks_decide_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A year forward, and back: the living keep theirs, the dead lose theirs."""
    real = time.time
    with Process(store, "ann") as ann, Process(store, "bob") as bob:
        ann.claim(["a"])
        Process(store, "dead").claim(["b"])
        for year in (1, -1):
            monkeypatch.setattr(time, "time", lambda year=year: real() + year * 365 * 86400)
            assert bob.claim(["a"]) == {"a": "ann"}
        assert bob.claim(["b"]) == {}
    assert not ann.losses


def test_while_s3_is_away_nobody_is_taken_for_dead(s3_server: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner's beats fail for longer than a lease; it goes on, and who looks meanwhile gets an error, not the lease."""
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
            until(lambda: beat_of(store) > beats, "the owner beats no more since S3 is back")
            assert Process(store, "bob").claim(["a"]) == {"a": "ann"}
        assert not ann.losses


def beat_of(store: Store) -> int:
    return int(json.loads(store.small(f"{FOLDER}/a")["1"])["beat"])
