"""Files of every kind that a command reads, the commands that read them, and what damage they may miss."""

import fnmatch
import gzip
import hashlib
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.commands import Finished, call
from support.corpus import make_chat_tokenizer, make_texts, write_json_lines
from support.damage import damage
from support.instruction import LENGTH, make_instruction_sets
from support.models import save_hugging_face, tiny_config

CONSISTENT = frozenset(
    ("another_value", "another_assignment", "inner_pickle", "safetensors_header", "another_word")
)
"""Damage that leaves a file well-formed: another value that is also right cannot be told from it."""

SECONDS_OF_A_COMMAND = 120
MORE_MEMORY_BYTES = 6 << 30
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
        return [path for path in found if not _matches(path, self.left_alone)]


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


class DamagedWorld:
    """All subjects.

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
        _ok(*_to(self._preprocess(corpus), folder))
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
        _ok(*_to(convert(self.model, "--to", "native"), self._folder("made-native")))
        native = self.folder / "made-native/c"
        _ok(*_to(convert(native, "--to", "huggingface", "--max-shard-size", "60KB"), sharded))
        _ok(*_to(convert(native, "--to", "huggingface", "--weights-format", "bin"), pickled))
        add("Hugging Face", self.model, "native", unnoticed=weights)
        add("Hugging Face, several files", sharded / "c", "native", unnoticed=(*weights, "*.index.json"))
        add("Hugging Face, .bin", pickled / "c", "native", unnoticed=weights)
        add("native", native, "huggingface", unnoticed=("checkpoint.json", "tokenizer*", "special*"))
        for kind in ("ascendspeed", "megatron", "torch_dist"):
            folder = self._folder(f"made-{kind}")
            layout = ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2)
            flags = () if kind == "torch_dist" else layout
            _ok(*_to(convert(native, "--to", kind, *flags), folder))
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
        _ok(*_to(("asd-core", "finetune", *train[2:]), adapter))
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

    def result(self, subject: Subject, number: int) -> tuple[Finished, dict[str, str]]:
        """Run a command on a subject; return what it said and what it wrote, and leave the subject as it was."""
        out = self.folder / OUT
        before = {path: path.read_bytes() for path in _all_files(subject.folder)}
        out.mkdir()
        try:
            with limits():
                done = call(*_to(subject.commands[number], out))
            made = {
                str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in _all_files(out)
                if path.suffix != ".npy"
            }
        finally:
            shutil.rmtree(out)
            shutil.rmtree(subject.folder / "cache", ignore_errors=True)
            for path in _all_files(subject.folder):
                if path not in before:
                    path.unlink()
                elif path.read_bytes() != before[path]:
                    path.write_bytes(before[path])
            for path, content in before.items():
                if not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
        lines = {f"line {n}": line for n, line in enumerate(done.stdout.replace(str(out), OUT).splitlines())}
        return done, made | lines

    def undamaged(self, subject: Subject, number: int) -> dict[str, str]:
        """What a command gives without damage; what differs between two such runs, such as times, is left out."""
        if number not in subject.results:
            runs = [self.result(subject, number) for _ in range(2)]
            for done, _ in runs:
                assert done.status == 0, (subject.name, subject.commands[number], done.stderr)
            first, second = (found for _, found in runs)
            subject.results[number] = {key: value for key, value in first.items() if second.get(key) == value}
        return subject.results[number]


@dataclass(frozen=True)
class Trial:
    """One damage, and what a command made of it.

    Attributes:
        subject: name.
        file: that was damaged.
        kind: of damage.
        command: its first two words.
        outcome: `refused`, `equal`, `accepted` where no reader can tell, or what is wrong.
        is_wrong: whether it breaks the rule.
    """

    subject: str
    file: str
    kind: str
    command: str
    outcome: str
    is_wrong: bool


def try_one(world: DamagedWorld, seed: int, number: int) -> Trial:
    """Damage one file, run one command, and repair the file.

    The rule: no traceback, crash or hang; an error is one line with status 1 or 2; without an error the result is that
    of the whole file, unless nothing in the format can tell.
    """
    draw = random.Random(f"{seed}/{number}")
    subject = draw.choice(world.subjects)
    path = draw.choice(subject.files())
    command = draw.randrange(len(subject.commands))
    content = path.read_bytes()
    name = " ".join(map(str, subject.commands[command][:2]))
    kind = damage(path, draw)

    def trial(outcome: str, is_wrong: bool = False) -> Trial:
        return Trial(subject.name, str(path.relative_to(subject.folder)), kind, name, outcome, is_wrong)

    try:
        done, found = world.result(subject, command)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        lines = traceback.format_exception(error)
        return trial(f"{type(error).__name__}: {error}\n{''.join(lines[-4:])}", True)
    finally:
        path.write_bytes(content)
    if done.status:
        complaints = [line for line in done.stderr.splitlines() if ": error: " in line]
        if done.status not in (1, 2) or len(complaints) != 1 or done.complaint != complaints[0].strip():
            return trial(f"status {done.status}: {done.stderr[-500:]!r}", True)
        return trial("refused")
    if kind in CONSISTENT or _matches(path, subject.unnoticed):
        return trial("accepted")
    expected = world.undamaged(subject, command)
    if _named(found, expected):
        return trial("accepted")
    if all(found.get(key) == value for key, value in expected.items()):
        return trial("equal")
    different = [key for key, value in expected.items() if found.get(key) != value]
    return trial(f"another result without an error: {different[:5]}", True)


def _named(found: dict[str, str], expected: dict[str, str]) -> bool:
    """Whether a command said just as much as without the damage, and besides what it did not compare."""
    lines = [line for line in found.values() if ": not compared: " not in line]
    return len(lines) < len(found) and lines == list(expected.values())


@contextmanager
def limits() -> Iterator[None]:
    """Raise an error in a command that takes too long or too much memory."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"still running after {SECONDS_OF_A_COMMAND} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    earlier = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS_OF_A_COMMAND)
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_MEMORY_BYTES, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, earlier)
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)


def _all_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def _to(command: Sequence[object], out: Path) -> list[str]:
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


def main(seed: int, count: int, first: int = 0) -> int:
    """Try `count` damages, print what is wrong and a summary, and return how many were wrong."""
    with tempfile.TemporaryDirectory(prefix="damaged-") as scratch:
        world = DamagedWorld(Path(scratch) / "world")
        found: Counter[str] = Counter()
        for number in range(first, first + count):
            print(f"trying {seed} {number}", file=sys.stderr, flush=True)
            trial = try_one(world, seed, number)
            found["wrong" if trial.is_wrong else trial.outcome] += 1
            if trial.is_wrong:
                print(json.dumps({"seed": seed, "number": number, **asdict(trial)}), flush=True)
    print(json.dumps({"seed": seed, "tried": count, **found}), flush=True)
    return found["wrong"]


if __name__ == "__main__":
    sys.exit(min(main(*map(int, sys.argv[1:])), 1))
