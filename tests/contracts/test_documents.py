"""Every command and every program in a document runs as it stands, in processes of the fork server."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core.expert_cases import experts_config
from support.commands import MODULES, environment, run_command, shell_variables
from support.models import save_hugging_face, tiny_config

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md")), *sorted(ROOT.glob("docs/*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN_BY_HAND = {
    "python -m pip install nox && python -m nox -s quickstart",
    "python -m pip install nox && python -m nox -s tests",
}
"""They install everything anew: one runs the tests that this is one of."""


def fences(document: Path, language: str) -> list[str]:
    return [body for found, body in FENCE.findall(document.read_text(encoding="utf-8")) if found == language]


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path, dataset: Path
) -> Path:
    """The files that documents speak of: corpus.jsonl, its dataset, two models, run/, model-hf/, adapter/."""
    from peft import LoraConfig, get_peft_model

    from ascendspeed_ckpt import Conversion, convert
    from ascendspeed_core.models.families import find_family

    folder = tmp_path_factory.mktemp("documents")
    config = tiny_config(vocab_size=400, max_position_embeddings=1024)
    shutil.copy(corpus, folder / "corpus.jsonl")
    for suffix in (".bin", ".idx", ".manifest.json"):
        shutil.copy(f"{dataset}{suffix}", folder / f"corpus_text_document{suffix}")
    (folder / "model.json").write_text(json.dumps(find_family("llama").write_config(config)))
    experts = experts_config(shared_gate=False, shared_ffn_hidden_size=None, dense_layers=())
    experts = experts.model_copy(update={"family": "mixtral", "ffn_hidden_size": 16, "vocab_size": 400})
    (folder / "experts.json").write_text(json.dumps(find_family("mixtral").write_config(experts)))
    model = save_hugging_face(config, folder / "model-hf", tokenizer=tokenizer_folder)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(folder / "adapter")
    convert(Conversion(folder / "model-hf", folder / "run", "native"))
    return folder


def run_shell(block: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env=shell_variables(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}{done.stderr}"


def run_program(*words: object, folder: Path) -> str:
    done = run_command(*words, cwd=folder)
    assert done.status == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_run(document: Path, inputs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(inputs, folder)
    for block in fences(document, "bash"):
        if block.strip() not in RUN_BY_HAND:
            run_shell(block, folder)


@pytest.mark.parametrize("command", [*MODULES, "torchrun"])
def test_commands_are_installed(command: str) -> None:
    """The fork server stands in for these; here they are what pip installed, in a Python of their own."""
    installed = Path(sys.executable).with_name(command)
    done = subprocess.run(
        [installed, "--help"], env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()


READMES_WITH_PROGRAMS = [path for path in DOCUMENTS if path.name == "README.md" and fences(path, "python")]


@pytest.mark.parametrize("readme", READMES_WITH_PROGRAMS, ids=lambda path: path.parent.name)
def test_programs_run(readme: Path, inputs: Path, tmp_path: Path) -> None:
    (program,) = fences(readme, "python")
    name = readme.parent.name.removeprefix("ascendspeed-")
    folder = tmp_path / "work"
    shutil.copytree(inputs, folder)
    if name == "data":
        # Its program reads what its commands made.
        run_shell("\n".join(fences(readme, "bash")), folder)
    (folder / "program.py").write_text(program)
    alone = run_program("program.py", folder=folder)
    assert alone
    if name == "core":
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
        together = run_program(*torchrun, "program.py", folder=folder)
        want, got = ([float(n) for n in re.findall(r"\d+\.\d+", out)] for out in (alone, together))
        # Printed to four places; fp32 sums run in another order.
        assert got == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("guide", ["generation.md", "coming-from.md"])
def test_the_programs_of_a_guide_run(inputs: Path, tmp_path: Path, guide: str) -> None:
    """They are one after the other one."""
    folder = tmp_path / "work"
    shutil.copytree(inputs, folder)
    (folder / "program.py").write_text("\n".join(fences(ROOT / "docs" / guide, "python")))
    assert run_program("program.py", folder=folder)


def test_the_handler_of_the_document_is_a_handler() -> None:
    (program,) = (body for body in fences(ROOT / "docs" / "extending.md", "python") if "TitleAndText" in body)
    names: dict[str, object] = {}
    exec(program, names)
    handler = names["TitleAndText"]()  # type: ignore[operator]
    assert handler.texts({"title": "A", "text": "b"}, "text") == ["A\n\nb"]


def test_the_kernel_of_the_document_is_a_kernel() -> None:
    from ascendspeed_core.device import Device
    from ascendspeed_core.kernels.registry import Implementation, KernelContext

    (program,) = (
        body for body in fences(ROOT / "docs" / "extending.md", "python") if "fast_rms_norm" in body
    )
    names: dict[str, object] = {}
    exec(program, names)
    assert isinstance(names["FAST"], Implementation)
    assert names["FAST"].auto_on == ("cuda",)
    assert names["why_not"](KernelContext(device=Device("cpu"))) == "it needs a GPU, this is cpu"  # type: ignore[operator]


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub and the site give to the headings of a document."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            found = document.parent / path if path else document
            assert found.exists(), f"{document}: {target}"
            assert not anchor or anchor in anchors(found), f"{document}: {target}"


def test_files_that_are_named_exist() -> None:
    """A file that a document names by its folder is in the repository, in a package, or in ascendspeed-core."""
    folders = [ROOT, *ROOT.glob("packages/*/src"), ROOT / "packages/ascendspeed-core/src/ascendspeed_core"]
    missing = [
        f"{document.relative_to(ROOT)}: {path}"
        for document in DOCUMENTS
        for path in re.findall(r"`((?:\w+/)+\w+\.py)\b", document.read_text(encoding="utf-8"))
        if not any((folder / path).is_file() for folder in folders)
    ]
    assert missing == []
