"""Models, tokenizers, adapters and data by their name on the Hugging Face hub or on ModelScope.

A name is `org/name` or `hf:org/name`, with `@revision` if it is not the newest, or `modelscope:org/name`. Files come
into the usual cache of the library that fetches them; files that are there are not fetched again. huggingface_hub goes
on with a file when its connection breaks, and begins it anew when the process ends.

A copy of `ascendspeed_data.hub`, because this package imports no other; a test keeps both equal.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ascendspeed_eval.errors import EvaluationError, UsageError
from ascendspeed_eval.progress import log

Kind = Literal["model", "dataset"]
Wanted = Callable[[Sequence[str]], list[str]]
Fetched = tuple[Path, list[str]]
"""A folder, and the files in it that are wanted."""
HUGGING_FACE, MODELSCOPE = "hf:", "modelscope:"
_WORD = r"[A-Za-z0-9][\w.-]*"
_REVISION = r"(@[\w./-]+)?"
_NAME = re.compile(rf"{_WORD}/{_WORD}{_REVISION}")
_NAME_OF_HUGGING_FACE = re.compile(rf"({_WORD}/)?{_WORD}{_REVISION}")
_IS_FILE = re.compile(r"\.(jsonl|json|csv|txt|parquet|arrow|ya?ml)(\.gz|\.zst)?\Z")
_SNAPSHOTS = (
    (re.compile(r"(?:models|datasets)--(?:([\w.-]+?)--)?([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|\Z)"), ""),
    (re.compile(r"(?:models|datasets)/([\w.-]+?)--([\w.-]+)/snapshots/([\w.-]+)(?:/|\Z)"), MODELSCOPE),
)
"""Where the libraries keep what they fetched; of ModelScope the revision stands for the commit."""


@dataclass(frozen=True)
class HubName:
    """A name on a hub.

    Attributes:
        repo: `org/name`, or `name` for the few on the Hugging Face hub without an owner.
        revision: a branch, tag or commit; `None` is the newest of the main branch.
        is_modelscope: whether it is on ModelScope.
    """

    repo: str
    revision: str | None
    is_modelscope: bool = False

    def __str__(self) -> str:
        hub = MODELSCOPE if self.is_modelscope else ""
        return hub + self.repo + (f"@{self.revision}" if self.revision else "")


def hub_name(given: str) -> HubName | None:
    """Return the name on a hub that a text is; `None` if it is a path.

    After `hf:` or `modelscope:` a name follows. Without them what exists here is a path, and so is what would lie in a
    folder that exists, ends as a file of records, or has no owner.

    Raises:
        UsageError: it begins as a name on a hub, and is none.
    """
    for prefix, pattern in ((HUGGING_FACE, _NAME_OF_HUGGING_FACE), (MODELSCOPE, _NAME)):
        bare = given.removeprefix(prefix)
        if bare != given:
            if not pattern.fullmatch(bare):
                raise UsageError(
                    f"{given} is no name on a hub; give {prefix}org/name, or {prefix}org/name@revision"
                )
            return _split(bare, prefix == MODELSCOPE)
    path = Path(given)
    is_path = path.exists() or Path(path.parts[0] if path.parts else ".").exists() or _IS_FILE.search(given)
    return _split(given) if _NAME.fullmatch(given) and not is_path else None


def _split(bare: str, is_modelscope: bool = False) -> HubName:
    repo, _, revision = bare.partition("@")
    return HubName(repo, revision or None, is_modelscope)


def fetch(name: HubName, kind: Kind, wanted: Wanted, option: str, of: str = "file") -> Fetched:
    """Return the folder with the files of a repository that are wanted; those that are missing are fetched.

    Args:
        name: of the repository.
        kind: of the repository.
        wanted: gives those of its files that are wanted.
        option: for messages.
        of: what is wanted, for messages.

    Raises:
        UsageError: the library of the hub is not installed, or nothing that is wanted is there.
        EvaluationError: the hub has no such name or revision, asks for a token, or cannot be reached.
    """
    log(f"{option}: {name} from {'ModelScope' if name.is_modelscope else 'the Hugging Face hub'}")

    def chosen(names: Sequence[str]) -> list[str]:
        files = wanted(names)
        if not files:
            raise UsageError(f"{option}={name}: the repository has no {of} that is supported")
        return files

    from_hub = _from_modelscope if name.is_modelscope else _from_hugging_face
    folder, files = from_hub(name, kind, chosen, option)
    log(f"{option}: {origin_of(folder) or folder}")
    return folder, files


def origin_of(path: Path | str) -> str | None:
    """Return `org/name@commit` of a path that came from a hub; `None` of any other."""
    for pattern, hub in _SNAPSHOTS:
        if found := pattern.search(Path(path).as_posix()):
            return f"{hub}{found[1] + '/' if found[1] else ''}{found[2]}@{found[3]}"
    return None


def origins_in(values: Any) -> list[str]:
    """Return `org/name@commit` of every path in nested values, each once."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return list(dict.fromkeys(name for one in values for name in origins_in(one)))
    name = origin_of(values) if isinstance(values, str | Path) else None
    return [name] if name is not None else []


def _from_hugging_face(name: HubName, kind: Kind, wanted: Wanted, option: str) -> Fetched:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise UsageError(
            f"{option}={name}: names on the Hugging Face hub need the package huggingface_hub; pip install "
            "huggingface_hub"
        ) from None
    is_offline = constants.HF_HUB_OFFLINE

    def fetch_files() -> Fetched:
        # Without the hub the cache must know what the repository holds, so that a part of it is not taken for all.
        from_cache = is_offline
        if from_cache:
            names = _cached(name, kind)
        else:
            try:
                names = _listed(name, kind)
            except Exception as error:
                if not _is_unreachable(error):
                    raise
                names, from_cache = _cached(name, kind), True
                log(f"{option}: the hub cannot be reached, so what the cache has of {name} is taken")
        files = wanted(names)
        folder = huggingface_hub.snapshot_download(
            name.repo,
            repo_type=kind,
            revision=name.revision,
            allow_patterns=files,
            local_files_only=from_cache,
        )
        return Path(folder), files

    return _fetched(fetch_files, name, option, kind)


def _listed(name: HubName, kind: str) -> list[str]:
    """Return the files of a repository, as the hub lists them."""
    from huggingface_hub import HfApi

    api = HfApi()
    # Listing is tried again for half a minute where there is no connection; this is not.
    api.repo_info(name.repo, repo_type=kind, revision=name.revision, timeout=10)
    return list(api.list_repo_files(name.repo, repo_type=kind, revision=name.revision))


def _cached(name: HubName, kind: str) -> list[str]:
    """Return the files of a repository, as the cache lists them."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    listed = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if listed is None:
        raise UsageError(
            "HF_HUB_OFFLINE is set, and this version of huggingface_hub does not know what a repository holds; "
            "update it, or give the folder"
        )
    try:
        return [one.path for one in listed(name.repo, repo_type=kind, revision=name.revision)]
    except huggingface_hub.errors.CachedRepoTreeNotFoundError as error:
        raise LocalEntryNotFoundError(str(error)) from None


def _fetched(fetch_files: Callable[[], Fetched], name: HubName, option: str, kind: str) -> Fetched:
    from huggingface_hub import errors

    where = f"{option}={name}"
    try:
        return fetch_files()
    except errors.RevisionNotFoundError:
        problem = f"the repository has no revision {name.revision}; give a branch, tag or commit that it has"
    except errors.GatedRepoError:
        problem = "its owner gives access to those who ask; ask on its page, then set HF_TOKEN or run `hf auth login`"
    except errors.RepositoryNotFoundError:
        problem = (
            f"it is neither a folder here nor a {kind} on the hub, or it is private; correct it, or set HF_TOKEN or "
            "run `hf auth login` with a token that may read it"
        )
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        problem = (
            "HF_HUB_OFFLINE is set and the cache does not have it; unset it, or fetch it first"
            if _is_offline()
            else "the hub cannot be reached and the cache does not have it; check the connection, or give a folder"
        )
    except errors.HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", "")
        problem = f"the hub answers with status {status}; try again later"
    except Exception as error:
        # The HTTP library of huggingface_hub is another one from version to version.
        if not isinstance(error, OSError | RuntimeError) and not type(error).__module__.startswith("http"):
            raise
        lines = str(error).strip().splitlines()
        problem = (
            f"the download was interrupted ({type(error).__name__}{': ' + lines[0] if lines else ''}); the same "
            "command goes on after the files that are complete"
        )
    raise EvaluationError(f"{where}: {problem}")


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _is_unreachable(error: Exception) -> bool:
    """Tell whether an error of whatever HTTP library says that there is no connection."""
    return type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError")


def _from_modelscope(name: HubName, kind: Kind, wanted: Wanted, option: str) -> Fetched:
    where = f"{option}={name}"
    try:
        from modelscope_hub import HubApi, errors
    except ImportError:
        raise UsageError(
            f"{where}: names on ModelScope need the package modelscope-hub; pip install modelscope-hub"
        ) from None
    if _is_offline():
        raise EvaluationError(
            f"{where}: HF_HUB_OFFLINE is set, and ModelScope's cache does not say whether a repository is there whole; "
            "give the folder in the cache"
        )
    try:
        api = HubApi()
        listed = api.list_repo_files(name.repo, kind, revision=name.revision)
        files = wanted([one.path for one in listed if not one.is_dir])
        folder = Path(api.download_repo(name.repo, kind, revision=name.revision, allow_patterns=files))
    except errors.NotExistError:
        problem = f"there is no such {kind} on ModelScope, or no revision {name.revision or 'master'} of it; correct it"
    except (errors.AuthenticationError, errors.PermissionDeniedError):
        problem = "it is private, or its owner gives access to those who ask; set MODELSCOPE_API_TOKEN"
    except (errors.HubError, OSError) as error:
        lines = str(error).strip().splitlines()
        problem = (
            f"ModelScope gives no files ({type(error).__name__}{': ' + lines[0] if lines else ''}); check the "
            "connection, then give the same command: files that are complete stay"
        )
    else:
        return folder, files
    raise EvaluationError(f"{where}: {problem}")
