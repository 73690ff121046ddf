"""The environment variables as one frozen `Settings`. By default everything is stored in one local folder, with SQLite for MLflow.

    variable               meaning                                                  default
    ACIP_HOME              folder of everything that is stored locally              .acip in the checkout, else ~/.acip
    ACIP_ARTIFACT_URI      artifacts: a folder or s3://bucket/prefix                ACIP_HOME/artifacts
    ACIP_CHECKPOINT_URI    checkpoints: a folder or s3://bucket/prefix              ACIP_HOME/runs
    ACIP_CHECKPOINT_S      seconds between checkpoints of a calibration             60
    ACIP_LEASE_S           seconds without a heartbeat until a lease expires        60
    ACIP_BASIS_CACHE_GB    limit of the cache of bases in ACIP_HOME/cache, by node  50
    ACIP_COMMIT            commit of the code, for provenance                       that of the checkout
    MLFLOW_TRACKING_URI    tracking server or database                              sqlite:///ACIP_HOME/mlflow.db
    ACIP_API_KEYS          API keys of the server, separated by commas              no key needed (acip_platform/serve/http/keys.py)
    ACIP_API_KEYS_FILE     file with one API key on each line

boto3 reads S3 credentials and the endpoint from its usual sources (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...). The server reads the
API keys itself. `Settings` holds none of them and does not pass them to workers.
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

# Ray workers get the variables with these prefixes, except secrets: Ray shows them in its dashboard. Set secrets on the nodes.
WORKER_PREFIXES = ("AWS_", "MLFLOW_", "HF_", "ACIP_", "RAY_SERVE_")
SECRET_WORDS = ("SECRET", "TOKEN", "PASSWORD", "ACCESS_KEY", "API_KEY")

NO_PROXY = ("no_proxy", "NO_PROXY")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Settings:
    """The settings of a job and its workers. See the table of variables at the top of this file."""

    home: Path
    store: str  # artifacts: an absolute path, or a URI
    runs: str  # checkpoints: the same
    tracking_uri: str
    checkpoint_s: float = 60.0
    basis_cache_gb: float = 50.0
    lease_s: float = 60.0

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Settings":
        """Read and check the settings in `env`, by default those of this process. AcipError for a value that is not allowed."""
        if env is None:
            keep_loopback_direct(os.environ)
        env = {name: value.strip() for name, value in (os.environ if env is None else env).items()}  # files of secrets end with a newline
        checkout = Path(__file__).resolve().parents[2]
        default = str(checkout / ".acip") if (checkout / "jobs").is_dir() else "~/.acip"
        home = _folder("ACIP_HOME", env.get("ACIP_HOME") or default)
        return cls(
            home=home,
            store=_location(env, "ACIP_ARTIFACT_URI", home / "artifacts"),
            runs=_location(env, "ACIP_CHECKPOINT_URI", home / "runs"),
            tracking_uri=_tracking_uri(env, home / "mlflow.db"),
            checkpoint_s=_positive(env, "ACIP_CHECKPOINT_S", 60.0, "seconds"),
            basis_cache_gb=_positive(env, "ACIP_BASIS_CACHE_GB", 50.0, "gigabytes"),
            lease_s=_positive(env, "ACIP_LEASE_S", 60.0, "seconds"),
        )

    def worker_env(self) -> dict[str, str]:
        """Return the environment variables that give a worker on any node these settings. Secrets are left out."""
        passed = {
            key: value
            for key, value in os.environ.items()
            if key.startswith(WORKER_PREFIXES) and not any(word in key for word in SECRET_WORDS)
        }
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


def _folder(name: str, text: str) -> Path:
    """Return the absolute path of the folder or file that a variable names, because workers run in other folders."""
    try:
        return Path(text).expanduser().resolve()
    except RuntimeError as error:  # there is no such user
        raise AcipError(f"{name} is {text!r}, whose home folder is not known. Give an absolute path.") from error


def _location(env: Mapping[str, str], name: str, default: Path) -> str:
    """Return the URI in a variable, or the absolute path of its folder."""
    text = renamed.environment(env, name) or str(default)
    if not re.match(r"[A-Za-z0-9+.-]+:/", text):
        return str(_folder(name, text))
    if not re.fullmatch(r"s3://[^/].*|file:///[^#?]*", text):
        allowed = "a folder, file:///folder, or s3://bucket/prefix. In the URI of a folder, # is written %23, and ? is written %3F"
        raise AcipError(f"{name} is {text!r}; it must be {allowed}.")
    return text


def _tracking_uri(env: Mapping[str, str], default: Path) -> str:
    """Return MLflow's tracking URI. A local path becomes absolute, because workers run in other folders."""
    uri = env.get("MLFLOW_TRACKING_URI") or ""
    if not uri:
        return sqlite_uri(default)
    if path := sqlite_path(uri):
        return "?".join([sqlite_uri(_folder("MLFLOW_TRACKING_URI", str(path))), *uri.split("?", 1)[1:]])
    if uri.startswith("file:") and not uri.startswith("file:/"):
        return Path(unquote(uri.removeprefix("file:"))).resolve().as_uri()
    try:
        urlsplit(uri)
    except ValueError as error:
        raise AcipError(f"MLFLOW_TRACKING_URI is {masked(uri)!r}, which is not a URI: {error}.") from error
    return uri if ":" in uri or uri == "databricks" else _folder("MLFLOW_TRACKING_URI", uri).as_uri()


def sqlite_uri(path: Path) -> str:
    """Return the URI of a SQLite file, with its absolute path. Special characters are escaped; MLflow unescapes them once."""
    text = str(path.expanduser().resolve())
    return "sqlite:///" + text.replace("%", "%25").replace("?", "%3F").replace("#", "%23")


def sqlite_path(uri: str) -> Path | None:
    """Return the file of a SQLite URI, or None for a database in memory and for other URIs."""
    path = uri.removeprefix("sqlite:///").partition("?")[0] if uri.startswith("sqlite:///") else ""
    return Path(unquote(path)) if path else None


def keep_loopback_direct(env: MutableMapping[str, str]) -> None:
    """Add the loopback addresses to no_proxy in `env`, so that requests to servers on this machine bypass the proxy."""
    if any(env.get(name) for name in PROXIES):
        for name in NO_PROXY:
            hosts = [host for host in (env.get(name) or env.get(name.swapcase()) or "").split(",") if host.strip()]
            if "*" not in hosts:
                env[name] = ",".join(dict.fromkeys([*hosts, *LOOPBACK]))


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
    """Return the shell command that starts this Python from the current folder."""
    return this_program(Path(sys.executable).name)


def this_program(name: str) -> str:
    """Return the shell command that starts a program installed beside this Python from the current folder."""
    path = Path(sys.executable).with_name(name)
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def masked(uri: str) -> str:
    """Return `uri` with its password replaced by ***."""
    return re.sub(r"(//[^:/@]+:)[^@/]+@", r"\1***@", uri)
