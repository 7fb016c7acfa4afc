"""Names and prose use the vocabulary of docs/glossary.md; `python tests/support/words.py` lists what does not."""

from pathlib import Path

import pytest

from support.words import gone_identifiers, gone_phrases


def test_no_identifier_has_a_gone_word() -> None:
    assert [str(hit) for hit in gone_identifiers()] == []


def test_no_text_has_a_gone_phrase() -> None:
    assert [str(hit) for hit in gone_phrases()] == []


@pytest.mark.parametrize(
    ("file", "text", "found"),
    [
        ("ascendspeed_core/a.py", "class CacheRoom: ...", ["CacheRoom"]),
        ("ascendspeed_core/a.py", "def f(place): self.places = place", ["place", "places"]),
        ("ascendspeed_core/foreign/a.py", "", ["foreign"]),
        ("ascendspeed_core/plan.py", "", ["plan.py"]),
        ("ascendspeed_core/a.py", "class Turn: ...", ["Turn"]),
        ("ascendspeed_data/plan.py", "class Turn: ...\nplaceholder = replace(places)", []),
    ],
)
def test_gone_words_are_found_in_names(tmp_path: Path, file: str, text: str, found: list[str]) -> None:
    path = tmp_path / "packages" / "one" / "src" / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert sorted(hit.found for hit in gone_identifiers(tmp_path)) == sorted(found)


def test_gone_phrases_are_found_across_lines(tmp_path: Path) -> None:
    path = tmp_path / "packages" / "one" / "src" / "ascendspeed_core" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        '"""A process\nis\n    told."""\n# takes so\n# many steps\nretold = "untold; cannot be told apart"\n'
    )
    (tmp_path / "README.md").write_text("Models that answer.")
    got = [(hit.line, hit.found) for hit in gone_phrases(tmp_path)]
    assert got == [(2, "is told"), (4, "so # many"), (1, "Models that answer")]
