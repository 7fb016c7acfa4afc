"""The steps around training, each against its limit: tokenizing against the tokenizer alone, converting against cp."""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from ascendspeed_ckpt.convert import Conversion, convert
from ascendspeed_data.preprocess import PreprocessJob, preprocess
from ascendspeed_data.tokenizer import load_tokenizer
from ascendspeed_data.train_tokenizer import TokenizerTraining, train_tokenizer
from support.corpus import make_texts, write_json_lines
from support.models import save_hugging_face, tiny_config
from support.tables import ReportTables

TEXTS = 60_000
BIG = tiny_config(
    vocab_size=32_000, hidden_size=1024, ffn_hidden_size=4096, num_layers=8, num_attention_heads=16,
    num_key_value_heads=16, head_dim=64,
)  # fmt: skip


def tokenizing(folder: Path, tables: ReportTables) -> None:
    texts = make_texts(TEXTS)
    source = write_json_lines(folder / "texts.jsonl", texts)
    tokenizer = load_tokenizer(
        train_tokenizer([str(source)], "text", folder / "tokenizer", TokenizerTraining(400))
    )
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    started = time.perf_counter()
    tokenizer.encode_batch(texts)
    alone = megabytes / (time.perf_counter() - started)
    for workers in (1, 2):
        job = PreprocessJob((str(source),), folder / f"out{workers}", folder / "tokenizer", workers=workers)
        started = time.perf_counter()
        preprocess(job)
        rate = megabytes / (time.perf_counter() - started)
        tables.add(
            f"Tokenizing {megabytes:.0f} MB of text",
            ("workers", "asd-data preprocess, MB/s", "tokenizer alone on one core, MB/s", "ratio"),
            workers, f"{rate:.2f}", f"{alone:.2f}", f"{rate / alone:.2f}",
        )  # fmt: skip


def converting(folder: Path, tables: ReportTables) -> None:
    save_hugging_face(BIG, folder / "hf")
    size = (folder / "hf" / "model.safetensors").stat().st_size / 1e6
    started = time.perf_counter()
    subprocess.run(["cp", str(folder / "hf" / "model.safetensors"), str(folder / "copy")], check=True)
    subprocess.run(["sync", str(folder / "copy")], check=True)
    copying = size / (time.perf_counter() - started)
    for source, target, kind in (("hf", "native", "native"), ("native", "back", "huggingface")):
        conversion = Conversion(folder / source, folder / target, kind, verify_logits=False)  # type: ignore[arg-type]
        verdict = convert(conversion)
        rate = verdict.num_bytes / 1e6 / verdict.seconds
        tables.add(
            f"Converting {size:,.0f} MB of weights, verification left out",
            ("direction", "asd-ckpt convert, MB/s", "cp and sync, MB/s", "ratio"),
            f"{source} to {kind}", f"{rate:,.0f}", f"{copying:,.0f}", f"{rate / copying:.2f}",
        )  # fmt: skip


def main() -> None:
    tables = ReportTables()
    folder = Path(tempfile.mkdtemp(prefix="asd-bench-"))
    try:
        tokenizing(folder, tables)
        converting(folder, tables)
    finally:
        shutil.rmtree(folder)
    print("\n".join(tables.render()))


if __name__ == "__main__":
    main()
