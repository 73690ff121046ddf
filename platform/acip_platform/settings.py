"""The environment -> one frozen `Settings`. Everything has an embedded default: a folder and a SQLite file.

    variable               meaning                                        default
    ACIP_HOME              folder of the embedded default                 .acip in the checkout, else ~/.acip
    ACIP_ARTIFACT_URI             where artifacts go: a folder or s3://bucket/x  ACIP_HOME/artifacts
    ACIP_CHECKPOINT_URI              checkpoints: a folder or s3://bucket/x         ACIP_HOME/runs
    ACIP_CHECKPOINT_S      seconds between checkpoints of a calibration   60
    ACIP_LEASE_S           seconds without a sign until a job is free     60
    ACIP_BASIS_CACHE_GB    of bases kept in ACIP_HOME/cache on each node  50
    ACIP_COMMIT            of the code, for provenance                    the checkout's
    MLFLOW_TRACKING_URI    tracking server or database                    sqlite:///ACIP_HOME/mlflow.db
    ACIP_API_KEYS          who may ask the server: keys, with commas      everyone (acip_platform/serve/http/keys.py)
    ACIP_API_KEYS_FILE     the same, as a file of one key a line

S3 credentials and endpoint come from boto3's usual chain (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...), never from here; API keys
are read where they are checked, and neither held here nor passed on.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import unquote, urlsplit

from acip import renamed
from acip.errors import AcipError

PASSED_ON = ("AWS_", "MLFLOW_", "HF_", "ACIP_", "RAY_SERVE_")  # what Ray workers need of the submitter's environment ...
SECRET = ("SECRET", "TOKEN", "PASSWORD", "ACCESS_KEY", "API_KEY")  # ... but Ray shows what it passes on, so secrets belong on the nodes

NO_PROXY = ("no_proxy", "NO_PROXY")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    home: Path
    store: str
    runs: str
    tracking_uri: str
    checkpoint_s: float = 60.0
    basis_cache_gb: float = 50.0
    lease_s: float = 60.0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Settings":
        if env is None:
            keep_loopback_direct(os.environ)
        env = os.environ if env is None else env
        checkout = Path(__file__).resolve().parents[2]
        default = checkout / ".acip" if (checkout / "jobs").is_dir() else Path.home() / ".acip"
        home = Path(env.get("ACIP_HOME") or default).expanduser().resolve()
        return cls(
            home=home,
            store=_place(env, "ACIP_ARTIFACT_URI", home / "artifacts"),
            runs=_place(env, "ACIP_CHECKPOINT_URI", home / "runs"),
            tracking_uri=_tracking(env, home / "mlflow.db"),
            checkpoint_s=_positive(env, "ACIP_CHECKPOINT_S", 60.0, "seconds"),
            basis_cache_gb=_positive(env, "ACIP_BASIS_CACHE_GB", 50.0, "gigabytes"),
            lease_s=_positive(env, "ACIP_LEASE_S", 60.0, "seconds"),
        )

    def worker_env(self) -> dict[str, str]:
        """Environment variables that make a worker on any node see these settings. Without secrets."""
        passed = {key: value for key, value in os.environ.items() if key.startswith(PASSED_ON) and not any(word in key for word in SECRET)}
        passed |= {key: os.environ[key] for key in NO_PROXY if key in os.environ}
        return passed | {
            "ACIP_HOME": str(self.home),
            "ACIP_ARTIFACT_URI": self.store,
            "ACIP_CHECKPOINT_URI": self.runs,
            "ACIP_CHECKPOINT_S": str(self.checkpoint_s),
            "ACIP_BASIS_CACHE_GB": str(self.basis_cache_gb),
            "MLFLOW_TRACKING_URI": self.tracking_uri,
        }

    def __repr__(self) -> str:
        shown = {field.name: masked(str(getattr(self, field.name))) for field in fields(self)}
        return "Settings(" + ", ".join(f"{key}={value!r}" for key, value in shown.items()) + ")"


def _place(env: Mapping[str, str], name: str, default: Path) -> str:
    """A URI as it is; a folder from its root, because workers run elsewhere."""
    text = renamed.environment(env, name) or str(default)
    if "://" not in text:
        return str(Path(text).expanduser().resolve())
    if not text.startswith(("s3://", "file://")):
        raise AcipError(f"{name} is {text!r}; it must be a folder, file:///folder, or s3://bucket/prefix.")
    return text


def _tracking(env: Mapping[str, str], default: Path) -> str:
    """MLflow's URI; a local one from the root of the file system, because workers run elsewhere."""
    uri = env.get("MLFLOW_TRACKING_URI") or ""
    if not uri:
        return sqlite_uri(default)
    if path := sqlite_path(uri):
        return "?".join([sqlite_uri(path), *uri.split("?", 1)[1:]])
    if uri.startswith("file:") and not uri.startswith("file:/"):
        return Path(unquote(uri.removeprefix("file:"))).resolve().as_uri()
    try:
        urlsplit(uri)
    except ValueError as error:
        raise AcipError(f"MLFLOW_TRACKING_URI is {masked(uri)!r}, which is not a URI: {error}.") from error
    return uri if ":" in uri or uri == "databricks" else Path(uri).expanduser().resolve().as_uri()


def sqlite_uri(path: Path) -> str:
    """Return the URI of a SQLite file by its absolute path, with what a URI would read otherwise escaped (MLflow unescapes it once)."""
    text = str(path.expanduser().resolve())
    return "sqlite:///" + text.replace("%", "%25").replace("?", "%3F").replace("#", "%23")


def sqlite_path(uri: str) -> Path | None:
    """Return the file that a sqlite URI names; None for one in memory, and for other URIs."""
    path = uri.removeprefix("sqlite:///").partition("?")[0] if uri.startswith("sqlite:///") else ""
    return Path(unquote(path)) if path else None


def keep_loopback_direct(env: MutableMapping[str, str]) -> None:
    """Add this machine's own addresses to no_proxy in `env`: what runs here is not asked through a proxy elsewhere."""
    if any(env.get(name) for name in PROXIES):
        for name in NO_PROXY:
            known = [host for host in (env.get(name) or env.get(name.swapcase()) or "").split(",") if host.strip()]
            if "*" not in known:
                env[name] = ",".join(dict.fromkeys([*known, *LOOPBACK]))


def _positive(env: Mapping[str, str], name: str, default: float, unit: str) -> float:
    text = renamed.environment(env, name) or str(default)
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise AcipError(f"{name} is {text!r}; it must be a number of {unit} above 0.")
    return number


def this_python() -> str:
    """Return how the shell starts the Python that this is, from the current folder."""
    return this_program(Path(sys.executable).name)


def this_program(name: str) -> str:
    """Return how the shell starts a program that is installed beside this Python, from the current folder."""
    path = Path(sys.executable).with_name(name)
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def masked(uri: str) -> str:
    """`uri` without the password in it."""
    return re.sub(r"(//[^:/@]+:)[^@/]+@", r"\1***@", uri)
