"""The Hugging Face hub: parts of a repository by pattern, from the network or from the hub's cache."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def fetch(repo: str, patterns: Sequence[str], revision: str | None = None, ignore: Sequence[str] = ()) -> Path:
    """The local snapshot of a repository ("owner/name") that holds its files matching `patterns`.

    Files already in the hub's cache are not fetched again; without a connection, or with HF_HUB_OFFLINE=1, only the
    cache is used. `*` in a pattern matches slashes too.

    Raises:
      ValueError: no such repository or revision, no access, or no connection and nothing in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns),
                                      ignore_patterns=list(ignore) or None))  # fmt: skip
    except (HFValidationError, *_http_errors()) as error:
        raise _unreachable(repo, revision, error) from error


def list_files(repo: str, revision: str | None = None) -> list[str]:
    """Paths of a repository's files. What the hub has listed is kept in its cache, for when it cannot be reached: files
    that were never fetched are then missed, rather than not known. Without a list those in the cache are all.

    Raises:
      ValueError: as `fetch`.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # Without a connection the tree is requested again and again, this only once. It lists files too, but not all
        # of a large repository's.
        commit = HfApi().repo_info(repo, revision=revision).sha
        files = sorted(HfApi().list_repo_files(repo, revision=commit))
        with contextlib.suppress(OSError):  # a cache that cannot be written to
            kept = _kept_list(repo, str(commit))
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text("\n".join(files), encoding="utf-8")
        return files
    except (GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise _unreachable(repo, revision, error) from error
    except _http_errors() as error:
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            if (kept := _kept_list(repo, folder.name)).is_file():
                return kept.read_text(encoding="utf-8").split("\n")
            return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        raise _unreachable(repo, revision, error) from error


def _kept_list(repo: str, commit: str) -> Path:
    """Where the list of a repository's files at a commit is kept."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / ".jaxmech" / commit


def revision(repo: str, kind: str = "model") -> str | None:
    """The commit at which the default branch of a repository stands, or stood when it was last fetched; None if
    neither is known.

    Args:
      kind: "model" or "dataset".
    """
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    try:
        return HfApi().repo_info(repo, repo_type=kind, timeout=10).sha
    except HFValidationError:
        return None
    except _http_errors():
        kept = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind) / "refs" / "main"
        return kept.read_text().strip() if kept.is_file() else None


def _http_errors() -> Any:
    """OSError and the HTTP library's own error, whichever library that is: a tuple for `except`."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__


def _unreachable(repo: str, revision: str | None, error: Exception) -> ValueError:
    version = f" at revision {revision!r}" if revision else ""
    return ValueError(
        f"{repo!r}{version} is not a local path and could not be fetched from the Hugging Face hub: {error}\n"
        "Check the name, the network, and `hf auth login` for gated repositories."
    )
