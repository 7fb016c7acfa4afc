"""Values that are not what they must be inside files of the right form: pieces of tokenizers, attention masks."""

import random
import shutil
from pathlib import Path

import numpy as np
import sentencepiece

from ascendspeed_data.dataset import open_dataset
from ascendspeed_data.errors import DataError
from ascendspeed_data.tokenizer import load_tokenizer
from support.commands import call
from support.tables import ReportTables

TITLE, HEADER = "Values damaged at random", ("values", "tried", "refused", "wrong")
TEXT = "the people of Zürich 中文 🙂 went out"


def is_utf_8(content: bytes) -> bool:
    try:
        content.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_pieces_that_are_no_utf_8_are_one_line(
    tokenizer_folder: Path, tmp_path: Path, report: ReportTables
) -> None:
    content = (tokenizer_folder / "tokenizer.model").read_bytes()
    model = sentencepiece.SentencePieceProcessor(model_proto=content)
    draw, path = random.Random(8), tmp_path / "tokenizer.model"
    numbers = draw.sample(range(3, model.vocab_size()), 80)
    refused, wrong = 0, []
    for number in numbers:
        piece = model.id_to_piece(number).encode()
        # In a model each piece stands behind its field number and its length.
        begin = content.index(b"\x0a" + bytes([len(piece)]) + piece) + 2
        damaged = bytearray(piece)
        damaged[draw.randrange(len(piece))] = draw.choice((0xFF, 0xFE, 0xC0, 0x80, 0xE4, ord("q")))
        path.write_bytes(content[:begin] + damaged + content[begin + len(piece) :])
        try:
            loaded = load_tokenizer(path)
            loaded.encode(TEXT)
            loaded.decode(list(range(loaded.vocab_size)))
            loaded.convert_ids_to_tokens(list(range(loaded.vocab_size)))
            if not is_utf_8(damaged):
                wrong.append(f"{number}: {bytes(damaged)!r} is read")
        except DataError as error:
            refused += 1
            if "\n" in str(error) or str(path) not in str(error):
                wrong.append(f"{number}: {bytes(damaged)!r}: {error}")
    report.add(TITLE, HEADER, "pieces of a SentencePiece model", len(numbers), refused, len(wrong))
    assert not wrong, wrong[0]
    assert refused > 20


def test_attention_masks_other_than_0_and_1_are_one_line(
    sets: tuple[Path, Path], tmp_path: Path, report: ReportTables
) -> None:
    for path in sets[0].parent.glob(f"{sets[0].name}*"):
        shutil.copyfile(path, tmp_path / path.name)
    prefix = tmp_path / sets[0].name
    plain = open_dataset(prefix)
    mask_file = Path(f"{plain.prefixes['attention_mask']}.bin")
    values = np.fromfile(mask_file, np.int32)
    assert (values == 1).all()
    bounds = np.concatenate([[0], np.cumsum(plain.ids.lengths)])
    draw = random.Random(9)
    refused, wrong, tried = 0, [], 60
    for _ in range(tried):
        damaged = values.copy()
        sequence = draw.randrange(len(plain.ids))
        at = draw.randrange(int(bounds[sequence]), int(bounds[sequence + 1]))
        damaged[at] = value = draw.choice((0, 1, 2, -1, 255, 256, 1 << 24, -(2**31)))
        damaged.tofile(mask_file)
        made = open_dataset(prefix)
        try:
            mask = made.attended(sequence)
            expected = damaged[bounds[sequence] : bounds[sequence + 1]]
            if value not in (0, 1) or not np.array_equal(mask, expected):
                wrong.append(f"{value} is read")
        except DataError as error:
            refused += 1
            named = f"{prefix}: the attention mask of sequence {sequence} is not only 0 and 1"
            if value in (0, 1) or named not in str(error) or "\n" in str(error):
                wrong.append(f"{value}: {error}")
        others = [number for number in range(len(plain.ids)) if number != sequence]
        assert (made.attended(draw.choice(others)) == 1).all()
    report.add(TITLE, HEADER, "attention masks of a dataset", tried, refused, len(wrong))
    assert not wrong, wrong[0]
    assert refused > 20
    values[5] = 2
    values.tofile(mask_file)
    for command in (("inspect", prefix), ("verify", prefix)):
        done = call("asd-data", *command)
        assert done.status == 1, command
        assert str(prefix) in done.complaint
