"""Models, tokenizers, adapters and data by their name on the Hugging Face hub or on ModelScope.

A name is `org/name`, with `@revision` if it is not the newest, or `modelscope:org/name`. Files come into the usual
cache of the library that fetches them; files that are there are not fetched again. huggingface_hub goes on with a file
when its connection breaks, and begins it anew when the process ends.
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from ascendspeed_data.command_line import log
from ascendspeed_data.errors import AscendSpeedError, ConfigError
from ascendspeed_data.reading.inputs import format_of

What = Literal["model", "tokenizer", "adapter", "data"]
Fetched = tuple[Path, list[str]]
"""A folder, and the files in it that are wanted."""
MODELSCOPE = "modelscope:"
_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?"
_SNAPSHOT = re.compile(r"(?:models|datasets)--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})(?:/|\Z)")

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "config.json", "generation_config.json", "chat_template*", "*.jinja",
)  # fmt: skip
"""Files beside a tokenizer that decide what it does."""
WEIGHTS, OLDER_WEIGHTS = ("*.safetensors", "*.safetensors.index.json"), ("*.bin", "*.bin.index.json")
NOT_RECORDS = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""JSON files of data sets that hold no records."""


@dataclass(frozen=True)
class HubName:
    """A name on a hub.

    Attributes:
        repo: `org/name`.
        revision: a branch, tag or commit; `None` is the newest of the main branch.
        is_modelscope: whether it is on ModelScope.
    """

    repo: str
    revision: str | None
    is_modelscope: bool = False

    def __str__(self) -> str:
        hub = MODELSCOPE if self.is_modelscope else ""
        return hub + self.repo + (f"@{self.revision}" if self.revision else "")


_origins: dict[Path, str] = {}
"""What was fetched from hubs whose cache does not say where its folders come from."""


def hub_name(given: str) -> HubName | None:
    """Return the name on a hub that a text is; `None` if it is a path.

    What exists here is a path, and so is what would lie in a folder that exists, or ends as a file of records.

    Raises:
        ConfigError: it begins as a name on ModelScope, and is none.
    """
    is_modelscope = given.startswith(MODELSCOPE)
    bare = given.removeprefix(MODELSCOPE)
    is_name = re.fullmatch(_NAME, bare) is not None
    if is_modelscope and not is_name:
        raise ConfigError(
            f"{given} is no name on ModelScope; give {MODELSCOPE}org/name, or {MODELSCOPE}org/name@revision"
        )
    path = Path(given)
    is_path = path.exists() or Path(path.parts[0] if path.parts else ".").exists() or format_of(path)
    if not is_name or (is_path and not is_modelscope):
        return None
    repo, _, revision = bare.partition("@")
    return HubName(repo, revision or None, is_modelscope)


def local_path(given: Path | str, what: What, option: str) -> Path:
    """Return a path as it is, or the folder with the files of a name on a hub, which are fetched if they are missing.

    Args:
        given: path, or name on a hub.
        what: which files are needed.
        option: for messages.

    Raises:
        ConfigError: the library of the hub is not installed.
        AscendSpeedError: the hub has no such name or revision, asks for a token, or cannot be reached.
    """
    name = hub_name(str(given))
    return Path(given) if name is None else _fetch(name, what, option)[0]


def data_paths(given: str, option: str) -> list[str]:
    """Return a path as it is, or those of the files of records that a name on a hub stands for; see `local_path`."""
    name = hub_name(given)
    if name is None:
        return [given]
    folder, files = _fetch(name, "data", option)
    log(f"{option}: {', '.join(files)}")
    return [str(folder / one) for one in files]


def _fetch(name: HubName, what: What, option: str) -> Fetched:
    log(f"{option}: {name} from {'ModelScope' if name.is_modelscope else 'the Hugging Face hub'}")
    fetch = _from_modelscope if name.is_modelscope else _from_hugging_face
    folder, files = fetch(name, what, option)
    log(f"{option}: {origin_of(folder)}")
    return folder, files


def origin_of(path: Path | str) -> str | None:
    """Return `org/name@commit` of a path that came from a hub; `None` of any other."""
    found = _SNAPSHOT.search(Path(path).as_posix())
    if found is not None:
        return f"{found[1]}/{found[2]}@{found[3]}"
    return next((name for folder, name in _origins.items() if Path(path).is_relative_to(folder)), None)


def origins_in(values: Any) -> list[str]:
    """Return `org/name@commit` of every path in nested values, each once."""
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        return list(dict.fromkeys(name for one in values for name in origins_in(one)))
    name = origin_of(values) if isinstance(values, str | Path) else None
    return [name] if name is not None else []


def wanted_files(names: Sequence[str], what: What) -> list[str]:
    """Return those of a repository's files that are needed.

    Of weights in several formats safetensors are taken; of data sets whose files say so, the training part.
    """
    if what == "data":
        records = [one for one in names if format_of(Path(one)) and Path(one).name not in NOT_RECORDS]
        training = [one for one in records if re.search(r"(?<![a-z])train(?![a-z])", one.lower())]
        return training or records
    patterns = [*TOKENIZER_FILES]
    if what in ("model", "adapter"):
        patterns += ["adapter_config.json"] if what == "adapter" else []
        patterns += _first_there(names, (WEIGHTS, OLDER_WEIGHTS))
    # Files in folders are other formats, or the original release of the same weights.
    own = [one for one in names if "/" not in one or one.startswith("additional_chat_templates/")]
    return [one for one in own if any(fnmatch(Path(one).name, pattern) for pattern in patterns)]


def _first_there(names: Sequence[str], choices: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    return next((one for one in choices if any(fnmatch(name, one[0]) for name in names)), choices[0])


def _from_hugging_face(name: HubName, what: What, option: str) -> Fetched:
    try:
        import huggingface_hub
        from huggingface_hub import constants
    except ImportError:
        raise ConfigError(
            f"{option}={name}: names on the Hugging Face hub need the package huggingface_hub; pip install "
            "huggingface_hub"
        ) from None
    kind = "dataset" if what == "data" else "model"
    is_offline = constants.HF_HUB_OFFLINE

    def fetch() -> Fetched:
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
        files = wanted_files(names, what)
        if not files:
            raise ConfigError(f"{option}={name}: the repository has no file of a {what} that is supported")
        folder = huggingface_hub.snapshot_download(
            name.repo,
            repo_type=kind,
            revision=name.revision,
            allow_patterns=files,
            local_files_only=from_cache,
        )
        return Path(folder), files

    return _fetched(fetch, name, option, kind)


def _listed(name: HubName, kind: str) -> list[str]:
    """Return the files of a repository, as the hub lists them."""
    from huggingface_hub import HfApi

    return list(HfApi().list_repo_files(name.repo, repo_type=kind, revision=name.revision))


def _cached(name: HubName, kind: str) -> list[str]:
    """Return the files of a repository, as the cache lists them."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    listed = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if listed is None:
        raise ConfigError(
            "HF_HUB_OFFLINE is set, and this version of huggingface_hub does not know what a repository holds; "
            "update it, or give the folder"
        )
    try:
        return [one.path for one in listed(name.repo, repo_type=kind, revision=name.revision)]
    except huggingface_hub.errors.CachedRepoTreeNotFoundError as error:
        raise LocalEntryNotFoundError(str(error)) from None


def _fetched(fetch: Callable[[], Fetched], name: HubName, option: str, kind: str) -> Fetched:
    from huggingface_hub import errors

    where = f"{option}={name}"
    try:
        return fetch()
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
        is_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        problem = (
            "HF_HUB_OFFLINE is set and the cache does not have it; unset it, or fetch it first"
            if is_offline
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
    raise AscendSpeedError(f"{where}: {problem}")


def _is_unreachable(error: Exception) -> bool:
    """Tell whether an error of whatever HTTP library says that there is no connection."""
    return type(error).__name__ in ("ConnectError", "ConnectTimeout", "ConnectionError")


def _from_modelscope(name: HubName, what: What, option: str) -> Fetched:
    try:
        from modelscope.hub.api import HubApi
        from modelscope.hub.snapshot_download import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{option}={name}: names on ModelScope need the package modelscope; pip install "
            "'ascendspeed-data[modelscope]'"
        ) from None
    kind = "dataset" if what == "data" else "model"
    try:
        api = HubApi()
        listed = (
            api.get_dataset_files(name.repo, revision=name.revision or "master")
            if what == "data"
            else api.get_model_files(name.repo, revision=name.revision, recursive=True)
        )
        files = wanted_files([str(one["Path"]) for one in listed], what)
        folder = Path(
            snapshot_download(name.repo, revision=name.revision, repo_type=kind, allow_patterns=files)
        )
    except Exception as error:  # noqa: BLE001 - modelscope raises errors of many libraries
        lines = str(error).strip().splitlines()
        raise AscendSpeedError(
            f"{option}={name}: ModelScope gives no files ({type(error).__name__}{': ' + lines[0] if lines else ''}); "
            "check name, revision and connection"
        ) from None
    _origins[folder] = f"{MODELSCOPE}{name.repo}@{name.revision or 'master'}"
    return folder, files
