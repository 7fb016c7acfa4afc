"""Names on the Hugging Face hub for paths: a small hub on loopback, its failures included."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ascendspeed_data.errors import ConfigError
from ascendspeed_data.hub import HubName, hub_name, origin_of
from ascendspeed_data.hub_files import wanted_files
from support.commands import MODULES, Finished, call, environment
from support.corpus import make_chat_tokenizer
from support.hub_server import TOKEN, Hub, serve_hub, settings_for, using
from support.models import save_hugging_face, tiny_config

MODEL_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
RECORD = {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "of"}]}


class World:
    """A hub with a model and a data set, and the commands of someone who uses it."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.cache = hub, folder / "cache"
        make_chat_tokenizer(folder / "tokenizer")
        save_hugging_face(
            tiny_config(vocab_size=600, max_position_embeddings=512),
            folder / "hf",
            tokenizer=folder / "tokenizer",
        )
        others = {"README.md": b"#", "pytorch_model.bin": b"older", "onnx/model.safetensors": b"other"}
        self.model = hub.put_folder("org/tiny", folder / "hf", **others)
        lines = (json.dumps(RECORD) + "\n").encode() * 8
        records = {
            "data/train-1.jsonl": lines,
            "data/test.jsonl": lines,
            "dataset_infos.json": b"{}",
            "a.md": b"#",
        }
        self.data = hub.put("org/talk", records, "datasets")

    def run(self, *args: object, **more: str) -> Finished:
        """Run a command in this process."""
        with using(self.hub, self.cache, **more):
            return call(*args)

    def run_apart(self, *args: object, **more: str) -> Finished:
        """Run a command in a process of its own."""
        first, *rest = [str(one) for one in args]
        done = subprocess.run(
            [sys.executable, "-m", MODULES[first], *rest],
            env=environment(**settings_for(self.hub, self.cache, **more)),
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    def preprocess(self, out: Path, *flags: object, **more: str) -> Finished:
        """Make samples of records with the tokenizer of a name."""
        return self.run(
            "asd-data",
            "preprocess",
            "--output-prefix",
            out / "set",
            "--handler-name",
            "MessagesHandler",
            *flags,
            **more,
        )


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with serve_hub() as hub:
        yield World(hub, tmp_path)


def test_models_and_data_are_fetched_once_and_their_commits_recorded(world: World, tmp_path: Path) -> None:
    flags = ("--input", "org/talk", "--tokenizer-name-or-path", f"org/tiny@{world.model}")
    done = world.preprocess(tmp_path, *flags)
    assert done.status == 0, done.stderr
    assert set(world.hub.fetched()) == (MODEL_FILES - {"model.safetensors"}) | {"train-1.jsonl"}
    manifest = json.loads((tmp_path / "set_packed.manifest.json").read_text())
    assert manifest["hub"] == [f"org/tiny@{world.model}", f"org/talk@{world.data}"]
    assert manifest["tokenizer"]["name"] == f"org/tiny@{world.model}"
    assert (len(manifest["inputs"]), manifest["num_documents"]) == (1, 8)
    # A newer commit is fetched where none is named; the named one stays what it was.
    before = len(world.hub.fetched())
    assert world.preprocess(tmp_path, *flags, "--overwrite").status == 0
    assert len(world.hub.fetched()) == before
    newer = world.hub.put("org/talk", {"train.jsonl": (json.dumps(RECORD) + "\n").encode() * 3}, "datasets")
    assert world.preprocess(tmp_path, *flags, "--overwrite").status == 0
    manifest = json.loads((tmp_path / "set_packed.manifest.json").read_text())
    assert manifest["hub"] == [f"org/tiny@{world.model}", f"org/talk@{newer}"]
    assert manifest["num_documents"] == 3


@pytest.mark.nightly
def test_a_run_from_the_hub_records_what_it_began_with(world: World, tmp_path: Path) -> None:
    done = world.run_apart(
        "asd-core", "finetune", "--load", "org/tiny", "--data", "org/talk", "--seq-length", 64,
        "--global-batch-size", 2, "--train-iters", 1, "--lr", 1e-4, "--split", "100,0,0", "--device", "cpu",
        "--save", tmp_path / "run",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    assert set(world.hub.fetched()) == MODEL_FILES | {"train-1.jsonl"}
    (description,) = (tmp_path / "run").glob("**/checkpoint.json")
    assert f"org/tiny@{world.model}" in json.loads(description.read_text())["hub"]
    again = world.run_apart(
        "asd-infer", "generate", "--load", tmp_path / "run", "--prompt", "the", "--max-new-tokens", 2,
        "--device", "cpu", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert again.status == 0, again.stderr


@pytest.mark.nightly
def test_an_interrupted_download_goes_on(world: World, tmp_path: Path) -> None:
    """A broken connection is taken up at its byte; after the end of a process complete files stay."""
    # The library keeps a file in pieces of 10 MB.
    line = (json.dumps({"text": "it was", "more": "a" * 100_000}) + "\n").encode()
    files = {"train-1.jsonl": b'{"text": "the year"}\n', "train-2.jsonl": line * 250}
    world.hub.put("org/long", files, "datasets")
    flags = ("--input", "org/long", "--tokenizer-name-or-path", tmp_path / "tokenizer")
    command = ("asd-data", "preprocess", "--output-prefix", tmp_path / "text", *flags)
    world.hub.cut_after = 10_000
    done = world.run_apart(*command)
    assert done.status == 1
    assert "--input=org/long: the download was interrupted" in done.complaint
    assert "goes on after the files that are complete" in done.complaint
    world.hub.cut_after = 11_000_000
    world.hub.asked.clear()
    done = world.run_apart(*command)
    assert done.status == 0, done.stderr
    assert set(world.hub.fetched()) == {"train-2.jsonl"}
    starts = [int(one[6:].partition("-")[0]) for method, _, one in world.hub.asked if method == "GET" and one]
    assert len(starts) == 2
    assert starts == sorted(starts)
    manifest = json.loads((tmp_path / "text_text_document.manifest.json").read_text())
    assert manifest["num_documents"] == 251


def test_offline_the_cache_serves_or_the_message_says_so(world: World, tmp_path: Path) -> None:
    flags = ("--input", "org/talk", "--tokenizer-name-or-path", "org/tiny")
    done = world.preprocess(tmp_path, *flags, HF_HUB_OFFLINE="1")
    assert done.status == 1
    assert "HF_HUB_OFFLINE is set and the cache does not have it" in done.complaint
    assert world.hub.asked == []
    assert world.preprocess(tmp_path, *flags).status == 0
    world.hub.asked.clear()
    done = world.preprocess(tmp_path, *flags, "--overwrite", HF_HUB_OFFLINE="1")
    assert done.status == 0, done.stderr
    assert world.hub.asked == []
    # The tokenizer is there; the weights are not.
    done = world.run("asd-infer", "generate", "--load", "org/tiny", "--prompt", "a", HF_HUB_OFFLINE="1")
    assert done.status == 1
    assert "load=org/tiny: HF_HUB_OFFLINE is set and the cache does not have it" in done.complaint
    away = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = world.preprocess(tmp_path, *flags, "--overwrite", **away)
    assert done.status == 0, done.stderr
    assert "the hub cannot be reached, so what the cache has of org/talk is taken" in done.stderr
    gone = world.preprocess(tmp_path, "--input", "org/none", *flags[2:], **away)
    assert gone.status == 1
    assert "--input=org/none: the hub cannot be reached" in gone.complaint


def test_what_the_hub_does_not_have_is_named(world: World, tmp_path: Path) -> None:
    for name, said in (
        ("org/tiny@nope", "the repository has no revision nope"),
        ("org/none", "it is neither a folder here nor a model on the hub, or it is private"),
    ):
        done = world.preprocess(tmp_path, "--input", "org/talk", "--tokenizer-name-or-path", name)
        assert done.status == 1
        assert f"--tokenizer-name-or-path={name}: {said}" in done.complaint
    world.hub.put("org/empty", {"README.md": b"#"}, "datasets")
    done = world.preprocess(tmp_path, "--input", "org/empty", "--tokenizer-name-or-path", "org/tiny")
    assert (done.status, "has no file of a data" in done.complaint) == (2, True)


def test_a_private_repository_needs_a_token_which_is_written_nowhere(world: World, tmp_path: Path) -> None:
    world.hub.private.add("org/tiny")
    flags = ("--input", "org/talk", "--tokenizer-name-or-path", "org/tiny")
    done = world.preprocess(tmp_path / "out", *flags)
    assert done.status == 1
    assert "or it is private; correct it, or set HF_TOKEN" in done.complaint
    (tmp_path / "out").mkdir(exist_ok=True)
    done = world.preprocess(tmp_path / "out", *flags, HF_TOKEN=TOKEN)
    assert done.status == 0, done.stderr
    written = [
        path for folder in ("out", "cache") for path in (tmp_path / folder).rglob("*") if path.is_file()
    ]
    assert len(written) > 8
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in done.stdout + done.stderr


def test_names_and_paths_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_name("Qwen/Qwen3-0.6B") == HubName("Qwen/Qwen3-0.6B", None)
    assert hub_name("hf:gpt2@main") == HubName("gpt2", "main")
    assert hub_name("hf:runs/new") == HubName("runs/new", None)
    assert hub_name("org/name@refs/pr/1") == HubName("org/name", "refs/pr/1")
    assert hub_name("modelscope:org/name@v1") == HubName("org/name", "v1", is_modelscope=True)
    for path in (
        "runs",
        "runs/new",
        "model",
        "/org/name",
        "../org/name",
        "a/b/c",
        "org/data.jsonl",
        "org/*",
        "org/",
        "gpt2",
        "",
    ):
        assert hub_name(path) is None
    for wrong in ("modelscope:name", "hf:", "hf:/data", "hf:a/b/c", "hf:a/b@"):
        with pytest.raises(ConfigError, match=f"{wrong} is no name on a hub"):
            hub_name(wrong)
    sha = "0123456789" * 4
    assert origin_of(f"/x/hub/models--org--a-b/snapshots/{sha}/config.json") == f"org/a-b@{sha}"
    assert origin_of(f"/x/hub/models--gpt2/snapshots/{sha}") == f"gpt2@{sha}"
    assert origin_of("/x/models/org--a-b/snapshots/v1/config.json") == "modelscope:org/a-b@v1"
    assert origin_of(f"{os.sep}x/snapshots/{sha}") is None


def test_only_files_that_are_needed_are_wanted() -> None:
    files = [
        "config.json",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "tokenizer.json",
    ]
    more = ["README.md", "original/consolidated.pth", "onnx/tokenizer.json", "chat_template.jinja"]
    chosen = ["config.json", *files[1:3], "tokenizer.json", "chat_template.jinja"]
    assert wanted_files([*files, *more], "model") == chosen
    assert wanted_files([*files, *more], "tokenizer") == [
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ]
    assert wanted_files(["config.json", "pytorch_model.bin"], "model") == ["config.json", "pytorch_model.bin"]
    adapter = ["adapter_config.json", "adapter_model.safetensors"]
    assert wanted_files([*adapter, "README.md"], "adapter") == adapter
    assert wanted_files(["a.jsonl", "b.parquet", "c.md"], "data") == ["a.jsonl", "b.parquet"]
    assert wanted_files(["x/train-0.parquet", "x/test-0.parquet", "trained.json"], "data") == [
        "x/train-0.parquet"
    ]


def test_modelscope_is_refused_by_name_where_it_is_not_installed(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    name = "modelscope:org/tiny"
    done = world.preprocess(tmp_path, "--input", "org/talk", "--tokenizer-name-or-path", name)
    assert done.status == 2
    said = (
        f"--tokenizer-name-or-path={name}: names on ModelScope need the package modelscope-hub; pip install"
    )
    assert said in done.complaint


def test_names_on_modelscope_are_fetched_by_its_own_library(world: World, tmp_path: Path) -> None:
    pytest.importorskip("modelscope_hub", reason="modelscope-hub is not installed")
    flags = ("--input", "modelscope:org/talk", "--tokenizer-name-or-path", "modelscope:org/tiny")
    done = world.preprocess(tmp_path, *flags)
    assert done.status == 0, done.stderr
    fetched = {path.rpartition("/")[2] for _, path, _ in world.hub.asked}
    assert fetched == (MODEL_FILES - {"model.safetensors"}) | {"train-1.jsonl"}
    manifest = json.loads((tmp_path / "set_packed.manifest.json").read_text())
    assert manifest["hub"] == ["modelscope:org/tiny@master", "modelscope:org/talk@master"]
    assert manifest["num_documents"] == 8
    # What is there whole is not fetched again; a newer file is.
    world.hub.asked.clear()
    line = (json.dumps(RECORD) + "\n").encode()
    newer = world.hub.put("org/talk", {"data/train-1.jsonl": line * 3}, "datasets")
    assert world.preprocess(tmp_path, *flags, "--overwrite").status == 0
    assert [path for _, path, _ in world.hub.asked] == ["data/train-1.jsonl"]
    pinned = world.preprocess(tmp_path, "--input", f"modelscope:org/talk@{newer}", *flags[2:], "--overwrite")
    assert pinned.status == 0, pinned.stderr
    manifest = json.loads((tmp_path / "set_packed.manifest.json").read_text())
    assert manifest["hub"][1] == f"modelscope:org/talk@{newer}"
    for name, said in (
        ("modelscope:org/none", "there is no such dataset on ModelScope, or no revision master of it"),
        ("modelscope:org/talk@nope", "no revision nope of it"),
    ):
        done = world.preprocess(tmp_path / "no", "--input", name, *flags[2:])
        assert (done.status, said in done.complaint) == (1, True), done.complaint
    done = world.preprocess(tmp_path / "no", *flags, HF_HUB_OFFLINE="1")
    assert (done.status, "HF_HUB_OFFLINE is set" in done.complaint) == (1, True), done.complaint
    world.hub.private.add("org/tiny")
    (tmp_path / "private").mkdir()
    done = world.preprocess(tmp_path / "private", *flags)
    assert (done.status, "set MODELSCOPE_API_TOKEN" in done.complaint) == (1, True), done.complaint
    done = world.preprocess(tmp_path / "private", *flags, MODELSCOPE_API_TOKEN=TOKEN)
    assert done.status == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_names_without_an_owner_need_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    said = {
        "gpt2": "a name on the Hugging Face hub has its owner before it, or hf: (hf:gpt2)",
        "runs/new": "runs is a folder here, so it is no name on the Hugging Face hub; for that give hf:runs/new",
    }
    for given, words in said.items():
        done = call("asd-infer", "generate", "--load", given, "--prompt", "a")
        assert (done.status, words in done.complaint) == (1, True), done.complaint
        done = call(
            "asd-data",
            "preprocess",
            "--input",
            "x",
            "--tokenizer-name-or-path",
            given,
            "--output-prefix",
            "y",
        )
        assert (done.status, words in done.complaint) == (1, True), done.complaint
