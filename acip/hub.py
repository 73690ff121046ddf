"""Folders on the hub: exports of one size, and artifacts of every size. The token is the hub client's own (HF_TOKEN, `hf auth login`)."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from acip.artifact import MANIFEST, Artifact
from acip.card import artifact_card
from acip.errors import ArtifactError, HubError
from acip.export import PROVENANCE

HUB_ID = r"[\w.-]+/[\w.-]+"
OURS = (PROVENANCE, MANIFEST)  # one of these is in every folder that is pushed


def push_to_hub(folder: str | Path, repository: str) -> str:
    """Put an export, or an artifact that `copy` wrote, into a repository as one commit; returns its address.

    What was there of ours is replaced. HubError where something else is there, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    folder = Path(folder)
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        others = set(api.list_repo_files(repository)) - {".gitattributes"}
        if others and not others & set(OURS):
            raise HubError(f"{repository} holds something else than a model of ours ({min(others)}); push to another repository.")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Add {folder.name}", delete_patterns=["*"])
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise HubError(
            f"{folder} is written, but not pushed to {repository}: {error} Check HF_TOKEN and the name, and push again."
        ) from error
    return f"https://huggingface.co/{repository}"


def copy(artifact: Artifact, folder: str | Path) -> Path:
    """Write an artifact, verified, with a model card, to `folder`, which is not there yet or empty. All of it is read."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder} is there already. Choose another place for the artifact.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for file in artifact.manifest["files"]:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(artifact.local(file), partial / file)
        (partial / "README.md").write_text(artifact_card(artifact, folder.name), encoding="utf-8")
        Artifact.write_manifest(partial, artifact.manifest)
        Artifact.open(partial, verify=True)
        partial.chmod(0o755)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def snapshot(repository: str, **hub: Any) -> str:
    """The folder of a repository of the hub, downloaded where it is not on this machine."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(repository, **hub)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise HubError(f"{repository} is no folder, and was not got from the hub: {error}") from error
