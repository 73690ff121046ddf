"""Upload exports and artifacts to the Hugging Face hub, and download them. The hub client reads the token (HF_TOKEN, `hf auth login`)."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import MANIFEST, check_manifest
from acip.errors import ArtifactError, HubError
from acip.export.card import artifact_card
from acip.export.folder import PROVENANCE, files_of, public, replaceable

CARD = "README.md"


def push_to_hub(folder: str | Path, repository: str) -> str:
    """Upload an export, or an artifact that `copy` wrote, to a repository as one commit, and return its URL.

    An earlier export or artifact there is replaced. Raise HubError if the repository holds other files, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    folder = Path(folder)
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        others = set(api.list_repo_files(repository)) - {".gitattributes"}
        if others & {PROVENANCE, MANIFEST}:  # other projects may have files of these names, so their content is checked
            earlier = Path(snapshot(repository, allow_patterns=[PROVENANCE, MANIFEST]))
            others -= files_of(earlier) | _files_of(earlier)
        if others:
            raise HubError(f"{repository} holds files that acip did not write ({min(others)}). Push to another repository.")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Add {folder.name}", delete_patterns=["*"])
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise HubError(
            f"{folder} was written, but not pushed to {repository}: {error} Check HF_TOKEN and the name, and push again."
        ) from error
    return f"https://huggingface.co/{repository}"


def copy(artifact: Artifact, folder: str | Path) -> Path:
    """Copy an artifact to `folder`, verify every file, and add a model card. `folder` must not exist, or be empty.

    The copy may be published: its manifest holds no paths of this machine (`acip.export.folder.public`).
    """
    folder = replaceable(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} exists and is not an empty folder. Choose another place for the artifact.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for file in artifact.manifest["files"]:
            artifact.copy(file, partial / file)
        (partial / CARD).write_text(artifact_card(artifact, folder.name), encoding="utf-8")
        Artifact.write_manifest(partial, public(artifact.manifest))
        Artifact.open(partial)
        partial.chmod(0o755)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _files_of(folder: Path) -> set[str]:
    """Return the files of an artifact that `copy` wrote, according to its manifest; an empty set if there is no manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        check_manifest(manifest, str(folder))
    except (OSError, ValueError):
        return set()
    return {MANIFEST, CARD, *manifest["files"]}


def snapshot(repository: str, **hub: Any) -> str:
    """Return the local folder of a repository of the hub, and download what is not in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(repository, **hub)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubError(f"{repository} is not a folder, and can't be downloaded from the hub: {error}") from error
