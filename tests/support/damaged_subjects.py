"""Files of every kind that a command reads, and the commands that read them."""

import fnmatch
import gzip
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.commands import call
from support.corpus import make_chat_tokenizer, make_texts, write_json_lines
from support.instruction import LENGTH, make_instruction_sets
from support.models import save_hugging_face, tiny_config

OUT = "OUT"
"""Stands for a path that does not exist yet, where a command writes."""


@dataclass(frozen=True)
class Subject:
    """Files that belong together.

    Attributes:
        name: what they are.
        folder: where they lie, and nothing else.
        commands: that read them; `OUT` stands for their output.
        unnoticed: patterns of files in which damage may change the result without an error, because nothing in the
            format tells it.
        left_alone: patterns of files that no command reads.
    """

    name: str
    folder: Path
    commands: tuple[tuple[object, ...], ...]
    unnoticed: tuple[str, ...] = ()
    left_alone: tuple[str, ...] = ()
    results: dict[int, dict[str, str]] = field(default_factory=dict)

    def files(self) -> list[Path]:
        found = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        return [path for path in found if not matches(path, self.left_alone)]


def matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


class Subjects:
    """All of them.

    Args:
        folder: it is made, or empty.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.subjects: list[Subject] = []
        corpus = write_json_lines(folder / "corpus.jsonl", make_texts(60))
        self.tokenizer = folder / "tokenizer"
        _ok(
            "asd-data",
            "train-tokenizer",
            "--input",
            corpus,
            "--output-dir",
            self.tokenizer,
            "--vocab-size",
            400,
        )
        self._data(corpus)
        self._checkpoints()
        self._runs()
        self._small_inputs()
        self._benchmarks()

    def _add(self, name: str, folder: Path, *commands: tuple[object, ...], **more: Any) -> Path:
        self.subjects.append(Subject(name, folder, commands, **more))
        return folder

    def _preprocess(self, *inputs: object) -> tuple[object, ...]:
        return (
            "asd-data", "preprocess", "--input", *inputs, "--output-prefix", f"{OUT}/x",
            "--tokenizer-name-or-path", self.tokenizer, "--workers", 1,
        )  # fmt: skip

    def _data(self, corpus: Path) -> None:
        import pyarrow
        import pyarrow.parquet
        import zstandard

        texts = make_texts(12, seed=5)
        lines = "".join(
            json.dumps({"text": text, "n": n}, ensure_ascii=False) + "\n" for n, text in enumerate(texts)
        )
        table = pyarrow.table({"text": texts, "n": list(range(len(texts)))})
        inputs = {
            "a.jsonl": lines.encode(),
            "a.json": json.dumps([{"text": text} for text in texts]).encode(),
            "a.txt": "\n".join(texts).encode(),
            "a.csv": ("text,n\n" + "".join(f'"{text}",{n}\n' for n, text in enumerate(texts))).encode(),
            "a.jsonl.gz": gzip.compress(lines.encode()),
            "a.jsonl.zst": zstandard.ZstdCompressor(write_checksum=True).compress(lines.encode()),
        }
        for name, content in inputs.items():
            folder = self._folder(f"text-{name}")
            (folder / name).write_bytes(content)
            self._add(f"text: {name}", folder, self._preprocess(folder / name), unnoticed=("a.*",))
        folder = self._folder("text-parquet")
        pyarrow.parquet.write_table(table, folder / "a.parquet")
        self._add("text: parquet", folder, self._preprocess(folder / "a.parquet"), unnoticed=("a.*",))
        folder = self._folder("text-arrow")
        with pyarrow.ipc.new_file(folder / "a.arrow", table.schema) as writer:
            writer.write_table(table)
        self._add("text: arrow", folder, self._preprocess(folder / "a.arrow"), unnoticed=("a.*",))
        folder = self._folder("text-tokenizer")
        shutil.copytree(self.tokenizer, folder / "t")
        command = [folder / "t" if word == self.tokenizer else word for word in self._preprocess(corpus)]
        self._add("tokenizer: SentencePiece", folder, tuple(command), unnoticed=("*",))
        folder = self._folder("text-fast-tokenizer")
        make_chat_tokenizer(folder / "t")
        command = [folder / "t" if word == self.tokenizer else word for word in self._preprocess(corpus)]
        self._add("tokenizer: tokenizer.json", folder, tuple(command), unnoticed=("*",))
        folder = self._folder("dataset")
        _ok(*at(self._preprocess(corpus), folder))
        self.prefix = folder / "x_text_document"
        other = self._folder("other-dataset")
        shutil.copytree(folder, other, dirs_exist_ok=True)
        self._add(
            "dataset", folder,
            ("asd-data", "verify", self.prefix),
            ("asd-data", "inspect", self.prefix),
            ("asd-data", "merge", self.prefix, other / "x_text_document", "--output-prefix", f"{OUT}/m"),
            unnoticed=("*.bin", "*.manifest.json"),
        )  # fmt: skip
        folder = self._folder("packs")
        _, packs = make_instruction_sets(folder, self.tokenizer, 20)
        self._add(
            "dataset: packs", folder, ("asd-data", "verify", packs), ("asd-data", "inspect", packs),
            unnoticed=("*.bin", "*.manifest.json"), left_alone=("plain*", "records*", "template*"),
        )  # fmt: skip

    def _checkpoints(self) -> None:
        config = tiny_config(vocab_size=400, num_layers=2)
        self.model = self._folder("hf")
        save_hugging_face(config, self.model, tokenizer=self.tokenizer)
        more = (
            "asd-infer",
            "generate",
            "--device",
            "cpu",
            "--prompt",
            "the year",
            "--max-new-tokens",
            3,
            "--load",
        )
        weights = (
            "config.json",
            "generation_config.json",
            "*.safetensors",
            "*.bin",
            "tokenizer*",
            "special*",
        )

        def convert(folder: Path, *flags: object) -> tuple[object, ...]:
            return (
                "asd-ckpt", "convert", "--load", folder, "--output-model-dir", f"{OUT}/c", "--workers", 1,
                "--no-verify-logits", *flags,
            )  # fmt: skip

        def add(name: str, folder: Path, to: str, **options: Any) -> None:
            self._add(
                name, folder,
                ("asd-ckpt", "inspect", folder), ("asd-ckpt", "verify", folder, folder),
                convert(folder, "--to", to), (*more, folder), self._train("--load", folder), **options,
            )  # fmt: skip

        sharded, pickled = self._folder("hf-sharded"), self._folder("hf-bin")
        _ok(*at(convert(self.model, "--to", "native"), self._folder("made-native")))
        native = self.folder / "made-native/c"
        _ok(*at(convert(native, "--to", "huggingface", "--max-shard-size", "60KB"), sharded))
        _ok(*at(convert(native, "--to", "huggingface", "--weights-format", "bin"), pickled))
        add("Hugging Face", self.model, "native", unnoticed=weights)
        add("Hugging Face, several files", sharded / "c", "native", unnoticed=(*weights, "*.index.json"))
        add("Hugging Face, .bin", pickled / "c", "native", unnoticed=weights)
        add("native", native, "huggingface", unnoticed=("checkpoint.json", "tokenizer*", "special*"))
        for kind in ("ascendspeed", "megatron", "torch_dist"):
            folder = self._folder(f"made-{kind}")
            layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
            flags = () if kind == "torch_dist" else layout
            _ok(*at(convert(native, "--to", kind, *flags), folder))
            add(kind, folder / "c", "huggingface", unnoticed=("ascendspeed.json", "tokenizer*", "special*"))

    def _train(self, *flags: object, data: Path | None = None) -> tuple[object, ...]:
        return (
            "asd-core", "pretrain", "--device", "cpu", "--data-path", data or self.prefix, "--seq-length", 32,
            "--split", "100,0,0", "--global-batch-size", 2, "--lr", 0.01, "--train-iters", 1, *flags,
        )  # fmt: skip

    def _runs(self) -> None:
        run = self._folder("run")
        model_config = ("--model-config", self.model / "config.json")
        data = self._folder("training-data")
        shutil.copytree(self.prefix.parent, data, dirs_exist_ok=True)
        shutil.copytree(self.folder / "packs", data, dirs_exist_ok=True)
        self._add(
            "data in training", data,
            self._train(*model_config, data=data / self.prefix.name),
            (
                "asd-core", "finetune", *self._train(*model_config, data=data / "packs")[2:],
                "--is-instruction-dataset", "--seq-length", LENGTH,
            ),
            unnoticed=("*.bin", "*.manifest.json"), left_alone=("plain*", "records*", "template*", "*.npy"),
        )  # fmt: skip
        # Fixed length of the schedule, so that a run can go on.
        train = (*self._train("--save", run, "--save-interval", 1, *model_config), "--train-iters", 2)
        _ok(*(*train, "--exit-interval", 1))
        (run / "loss.png").unlink(missing_ok=True)
        self._add(
            "run", run, train, ("asd-core", "compare-loss", run, run), ("asd-ckpt", "verify", run, run),
            unnoticed=("checkpoint.json", "metrics.jsonl", "data.manifest.json"), left_alone=("*.png",),
        )  # fmt: skip
        adapter = self._folder("adapter")
        lora = ("--lora-r", 2, "--lora-target-modules", "q_proj")
        train = self._train("--load", self.model, "--save", f"{OUT}/r", *lora)
        _ok(*at(("asd-core", "finetune", *train[2:]), adapter))
        native = adapter / "r"
        self._add(
            "adapter: native", native,
            ("asd-ckpt", "merge-lora", "--load", self.model, "--lora-load", native, "--output-model-dir", f"{OUT}/m"),
            unnoticed=("checkpoint.json", "tokenizer*", "special*"),
            left_alone=("*.png", "metrics.jsonl", "data.manifest.json", "adapter_*"),
        )  # fmt: skip
        peft = self._folder("adapter-peft")
        for path in native.rglob("adapter_*"):
            shutil.copy(path, peft)
        self._add(
            "adapter: peft", peft,
            ("asd-ckpt", "merge-lora", "--load", self.model, "--lora-load", peft, "--output-model-dir", f"{OUT}/m"),
            unnoticed=("adapter_*",),
        )  # fmt: skip

    def _small_inputs(self) -> None:
        small = self._folder("small")
        (small / "recipe.toml").write_text(
            f'format_version = 2\n[data]\ndata_path = ["{self.prefix}"]\nseq_length = 32\nsplit = "100,0,0"\n'
            f'[start]\nload = "{self.model}"\n[batch]\nglobal_batch_size = 2\n[training]\ntrain_iters = 1\n'
            '[optimizer]\nlr = 0.01\n[launch]\ndevice = "cpu"\n'
        )
        self._add(
            "recipe", small, ("asd-core", "pretrain", "--config", small / "recipe.toml"), unnoticed=("*",)
        )
        prompts = self._folder("prompts")
        (prompts / "p.txt").write_text("the year\nit was\n")
        (prompts / "p.jsonl").write_text(
            '"the year"\n{"prompt": "it was", "seed": 3, "id": 7}\n{"prompt_token_ids": [4, 5]}\n'
        )
        generate = (
            "asd-infer",
            "generate",
            "--load",
            self.model,
            "--device",
            "cpu",
            "--max-new-tokens",
            2,
            "--json",
        )
        for name in ("p.txt", "p.jsonl"):
            folder = self._folder(f"prompts-{name}")
            shutil.copy(prompts / name, folder)
            self._add(
                f"prompts: {name}", folder, (*generate, "--prompt-file", folder / name), unnoticed=("*",)
            )

    def _benchmarks(self) -> None:
        records = [
            {"question": f"is {word} wet", "title": "t", "passage": f"{word} is.", "answer": number % 2 == 0}
            for number, word in enumerate(("water", "fire", "ice"))
        ]
        answers = [
            {"contains": "", "logprobs": {" Yes": -1.0, " No": -2.0, " yes": -3.0, " no": -1.0}, "text": "A"}
        ]
        folder = self._folder("boolq")
        for name, lines in (("dev.jsonl", records), ("answers.jsonl", answers)):
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        boolq = (
            "asd-eval", "run", "--task", "boolq", "--task-data-path", folder / "dev.jsonl",
            "--scripted-answers", folder / "answers.jsonl",
        )  # fmt: skip
        for name in ("first", "second"):
            _ok(*boolq, "--output-dir", self.folder / "evaluated" / name)
        runs = self.folder / "evaluated"
        self._add("benchmark: boolq", folder, boolq, unnoticed=("*",))
        self._add(
            "evaluated runs", runs, ("asd-eval", "report", runs / "first", runs / "second"),
            ("asd-eval", "compare", runs / "first", runs / "second"), (*boolq, "--output-dir", runs / "first"),
            unnoticed=("*.json", "*.jsonl"), left_alone=("report.*",),
        )  # fmt: skip
        own = self._folder("own-task")
        (own / "capitals.jsonl").write_text(
            '{"country": "France", "capital": "Paris"}\n{"country": "Italy", "capital": "Rome"}\n'
        )
        (own / "capitals.yaml").write_text(
            'name: capitals\ndata: capitals.jsonl\nquestion: "Q: {{ country }}"\nchoices: [" Paris", " Rome"]\n'
            'target: "{{ capital }}"\nmax_new_tokens: 8\nstop: ["x"]\nextract: "([A-Z][a-z]+)"\nnum_fewshot: 0\n'
        )
        answers_file = self.folder / "answers.jsonl"
        shutil.copy(folder / "answers.jsonl", answers_file)
        self._add(
            "benchmark: one's own", own,
            (
                "asd-eval", "run", "--task", own / "capitals.yaml", "--task-data-path", "sample",
                "--scripted-answers", answers_file,
            ),
            unnoticed=("*",),
        )  # fmt: skip
        for task, files in _benchmark_files().items():
            place = self._folder(f"benchmark-{task}")
            for name, content in files.items():
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_text(content)
            self._add(
                f"benchmark: {task}", place,
                (
                    "asd-eval", "run", "--task", task, "--task-data-path", place, "--num-fewshot", 0,
                    "--scripted-answers", answers_file,
                ),
                unnoticed=("*",),
            )  # fmt: skip

    def _folder(self, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        return folder


def at(command: Sequence[object], out: Path) -> list[str]:
    return [str(word).replace(OUT, str(out)) if str(word).startswith(OUT) else str(word) for word in command]


def _ok(*command: object) -> None:
    done = call(*command)
    assert done.status == 0, (command, done.stderr)


def _benchmark_files() -> dict[str, dict[str, str]]:
    """The smallest files of each benchmark, by task and name."""
    mmlu = 'What is one?,1,2,3,4,A\n"What, then, is two?",1,2,3,4,B\n'
    ceval = "id,question,A,B,C,D,answer\n0,What is one?,1,2,3,4,A\n1,What is two?,1,2,3,4,B\n"
    gsm8k = [
        {"question": "1 + 1?", "answer": "It is two.\n#### 2"},
        {"question": "2 + 2?", "answer": "#### 4"},
    ]
    bbh = {"examples": [{"input": "not True is", "target": "False"}, {"input": "True is", "target": "True"}]}
    return {
        "mmlu": {"test/astronomy_test.csv": mmlu, "dev/astronomy_dev.csv": mmlu},
        "ceval": {"val/accountant_val.csv": ceval, "dev/accountant_dev.csv": ceval},
        "gsm8k": {"test.jsonl": "".join(json.dumps(record) + "\n" for record in gsm8k)},
        "bbh": {"bbh/boolean_expressions.json": json.dumps(bbh)},
    }
