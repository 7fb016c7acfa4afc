"""Tokenizers with several chat templates: which one formats a conversation, against transformers."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.encoding import encode_samples
from ascendspeed_data.errors import DataError
from ascendspeed_data.fast_tokenizer import ExactEncoder
from ascendspeed_data.handlers.chat import MessagesHandler
from ascendspeed_data.prompting import layout_named
from ascendspeed_data.tokenizer import copy_tokenizer, load_tokenizer
from support.commands import call
from support.corpus import make_chat_tokenizer
from support.records import TALK, json_lines
from support.tables import ReportTables

NAMES = ("default", "tool_use", "rag")
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer without a template."""
    made = tmp_path_factory.mktemp("tokenizer")
    make_chat_tokenizer(made)
    (made / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((made / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return made


def template(name: str) -> str:
    return (
        f"<|im_start|>{name}{{% for t in tools or [] %}}{{{{ t | tojson }}}}{{% endfor %}}{{% for m in messages %}}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def draw_folder(draw: random.Random, plain: Path, made: Path) -> None:
    """A copy of a tokenizer with templates in the config, in files, or in both."""
    shutil.copytree(plain, made)
    in_config = draw.sample(NAMES, draw.randrange(4))
    in_files = draw.sample(NAMES, draw.randrange(4)) if draw.random() < 0.6 else []
    config = json.loads((made / "tokenizer_config.json").read_text())
    if in_config:
        as_list = [{"name": name, "template": template(f"config {name}")} for name in in_config]
        single = len(in_config) == 1 and draw.random() < 0.5
        config["chat_template"] = as_list[0]["template"] if single else as_list
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    for name in in_files:
        path = made / "chat_template.jinja"
        if name != "default":
            path = made / "additional_chat_templates" / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(template(f"file {name}"))


def wanted(theirs: Any, **given: Any) -> list[int] | None:
    try:
        ids: list[int] = theirs.apply_chat_template(TALK, return_dict=True, **given)["input_ids"]
    except ValueError as error:
        assert "chat template" in str(error)
        return None
    return ids


def made_by(tokenizer: Any, record: Any) -> list[int] | None:
    try:
        samples = MessagesHandler().samples(record, tokenizer)
    except DataError as error:
        assert "chat template" in str(error)
        return None
    ((ids, _),) = encode_samples(samples, tokenizer, ExactEncoder(tokenizer), [], True)
    return [int(token) for token in ids]


def test_random_sets_of_templates_equal_transformers(
    folder: Path, tmp_path: Path, report: ReportTables
) -> None:
    from transformers import AutoTokenizer

    draw, tried, differ = random.Random(7), 0, []
    for number in range(40):
        made = tmp_path / str(number)
        draw_folder(draw, folder, made)
        theirs = AutoTokenizer.from_pretrained(made)
        copy_tokenizer(made, tmp_path / f"{number} copied")
        for path in (made, tmp_path / f"{number} copied"):
            ours = load_tokenizer(path)
            for tools in (None, TOOLS):
                tried += 1
                if made_by(ours, {"messages": TALK, "tools": tools}) != wanted(theirs, tools=tools):
                    differ.append(f"{path} {tools}")
        for name in ours.named_chat_templates:
            tried += 1
            ids = layout_named(name, ours).ids(TALK)
            if ids != wanted(theirs, chat_template=name, add_generation_prompt=True):
                differ.append(f"{made} {name}")
    report.add("Sets of chat templates against transformers", ("conversations", "differ"), tried, len(differ))
    assert not differ, differ[0]


def test_a_name_or_a_file_takes_the_place_of_all_templates(folder: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(folder, tokenizer)
    (tokenizer / "additional_chat_templates").mkdir()
    for name in ("tool_use", "rag"):
        (tokenizer / "additional_chat_templates" / f"{name}.jinja").write_text(template(name))
    (tmp_path / "mine.jinja").write_text(template("mine"))
    source = json_lines(tmp_path / "x.jsonl", [{"messages": TALK}, {"messages": TALK, "tools": TOOLS}])

    def run(*flags: object) -> Any:
        return call(
            "asd-data", "preprocess", "--input", source, "--output-prefix", tmp_path / "out", "--handler-name",
            "MessagesHandler", "--tokenizer-name-or-path", tokenizer, "--overwrite", *flags,
        )  # fmt: skip

    for flag, workers in (("rag", 1), ("tool_use", 2), (tmp_path / "mine.jinja", 2)):
        done = run("--chat-template", flag, "--workers", workers)
        assert done.status == 0, done.stderr
        made = open_dataset(tmp_path / "out")
        name = getattr(flag, "stem", flag)
        for number in range(2):
            shown = load_tokenizer(tokenizer).decode(made.arrays["input_ids"][number].tolist())
            assert shown.startswith(name)
        assert made.manifest is not None
        assert made.manifest.template == template(name)
        assert made.manifest.tool_use_template is None
    done = run()
    assert done.status == 1
    assert "has the chat templates rag, tool_use, none of which is the default" in done.complaint
    done = run("--chat-template", "tool_uses")
    assert done.status == 2
    assert "is neither a file nor a chat template of the tokenizer, which has rag, tool_use" in done.complaint
    (tokenizer / "chat_template.jinja").write_text(template("default"))
    done = run("--workers", 2)
    assert done.status == 0, done.stderr
    manifest = open_dataset(tmp_path / "out").manifest
    assert manifest is not None
    assert (manifest.template, manifest.tool_use_template) == (template("default"), template("tool_use"))


def test_two_templates_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(folder, tokenizer)
    (tokenizer / "additional_chat_templates").mkdir()
    for path in ("chat_template.jinja", "additional_chat_templates/default.jinja"):
        (tokenizer / path).write_text(template("default"))
    with pytest.raises(DataError, match="are both the default chat template; delete one"):
        load_tokenizer(tokenizer)
    (tokenizer / "chat_template.jinja").unlink()
    (tokenizer / "additional_chat_templates" / "default.jinja").unlink()
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": template(name)} for name in "ab"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="chat_template has 'rag' twice"):
        load_tokenizer(tokenizer)
