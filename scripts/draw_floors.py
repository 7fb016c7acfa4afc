"""Draw the floors of ascendspeed-core from its imports: `python scripts/draw_floors.py [PICTURE.png]`.

On the left every folder stands on its floor, with its files. On the right each row is an importing floor, each column
an imported one, with the number of imports. tests/contracts/test_floors.py refuses an import that does not go down.
"""

import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.imports import FLOORS, Graph, import_graph, upward_imports  # noqa: E402

PICTURE = ROOT / "docs" / "pictures" / "floors.png"
BANDS = (
    ("options, devices, processes", ("device", "config", "launch", "megatron"), "#5b7083"),
    ("one model", ("kernels", "models"), "#2f7f79"),
    ("its weights, spread over ranks", ("weights", "parallel", "build"), "#3c6db0"),
    ("parts of a run", ("data", "observability", "optim", "objectives", "planner"), "#7d5ba6"),
    ("a run", ("training", "verification"), "#b0553c"),
    ("what a user starts", ("commands", "cli"), "#8a6d1f"),
)
"""Colours of neighbouring floors, lowest first, and what they have in common."""
PITCH, HEIGHT, WIDTH = 1.0, 0.84, 9.4
CELL, GAP = 0.6, 0.8


def main(picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    graph = import_graph()
    figure, axes = plt.subplots(figsize=(16.5, 12), dpi=110)
    matrix_left = WIDTH + 0.35 + GAP
    axes.set_xlim(-2.2, matrix_left + len(FLOORS) * CELL + 0.9)
    axes.set_ylim(-0.75, len(FLOORS) * PITCH + 1.3)
    axes.set_axis_off()
    files = files_by_folder(graph)
    for number, folders in enumerate(FLOORS):
        draw_floor(axes, number, folders, files)
    draw_bands(axes)
    draw_matrix(axes, matrix_left, imports_between_floors(graph))
    total, upwards = sum(imports_between_floors(graph).values()), len(upward_imports(graph))
    top = len(FLOORS) * PITCH
    axes.text(-2.2, top + 1.1, "The floors of ascendspeed-core", fontsize=19, weight="bold", va="top")
    axes.text(
        -2.2,
        top + 0.5,
        f"A floor imports only floors below it: {total} imports go down, {upwards} go up.",
        fontsize=12.5,
        color="#444444",
        va="top",
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, bbox_inches="tight", pad_inches=0.15, facecolor="white")
    print(
        f"{picture}: {len(FLOORS)} floors, {sum(map(len, files.values()))} files, {total} imports down, {upwards} up"
    )


def files_by_folder(graph: Graph) -> dict[str, list[str]]:
    """By folder of ascendspeed-core the names of its files, those of folders inside it under the folder's name."""
    found: dict[str, list[str]] = {}
    for module in graph:
        package, _, rest = module.partition(".")
        if package == "ascendspeed_core" and rest:
            folder, _, inside = rest.partition(".")
            found.setdefault(folder, []).append(inside or folder)
    return found


def imports_between_floors(graph: Graph) -> Counter[tuple[int, int]]:
    """By importing and imported floor the number of imports of one module by another."""
    floor_of = {name: number for number, names in enumerate(FLOORS) for name in names}
    counts: Counter[tuple[int, int]] = Counter()
    for module, imported in graph.items():
        for other in imported:
            here, there = (floor_of.get(_folder(name)) for name in (module, other))
            if here is not None and there is not None and here != there:
                counts[here, there] += 1
    return counts


def _folder(module: str) -> str:
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "ascendspeed_core" else ""


def contents(files: list[str]) -> str:
    """Names of files; a folder inside is one name with the number of its files."""
    alone = [name for name in files if "." not in name]
    inside = Counter(name.partition(".")[0] for name in files if "." in name)
    return "  ".join([*(f"{name}/×{count}" for name, count in inside.items()), *alone])


def colour_of(folder: str) -> str:
    return next(colour for _, folders, colour in BANDS if folder in folders)


def draw_floor(axes: Any, number: int, folders: tuple[str, ...], files: dict[str, list[str]]) -> None:
    from matplotlib.patches import FancyBboxPatch

    width = (WIDTH - 0.25 * (len(folders) - 1)) / len(folders)
    bottom = number * PITCH
    for column, folder in enumerate(folders):
        left, count, colour = column * (width + 0.25), len(files[folder]), colour_of(folder)
        shape = FancyBboxPatch(
            (left, bottom), width, HEIGHT, boxstyle="round,pad=0,rounding_size=0.1", facecolor=colour + "22",
            edgecolor=colour, linewidth=1.4,
        )  # fmt: skip
        axes.add_patch(shape)
        is_file = files[folder] == [folder]
        name = f"{folder}.py" if is_file else f"{folder}/"
        height = bottom + HEIGHT * (0.5 if is_file else 0.76)
        axes.text(left + 0.16, height, name, fontsize=12.5, weight="bold", color=colour, va="center")
        if not is_file:
            right = left + width - 0.16
            axes.text(right, height, f"{count} files", fontsize=10, color=colour, ha="right", va="center")
            lines = textwrap.wrap(
                contents(files[folder]),
                int(width * 9.8),
                break_long_words=False,
                max_lines=2,
                placeholder=" ...",
            )
            axes.text(
                left + 0.16, bottom + HEIGHT * 0.3, "\n".join(lines), fontsize=7.8,
                color="#333333", va="center", linespacing=1.2,
            )  # fmt: skip


def draw_bands(axes: Any) -> None:
    """On the left, what neighbouring floors have in common."""
    for title, folders, colour in BANDS:
        numbers = [number for number, names in enumerate(FLOORS) if set(names) & set(folders)]
        bottom, top = min(numbers) * PITCH, max(numbers) * PITCH + HEIGHT
        axes.plot([-0.22, -0.22], [bottom, top], color=colour, linewidth=4, solid_capstyle="round")
        axes.text(
            -0.4,
            (bottom + top) / 2,
            textwrap.fill(title, 16),
            fontsize=11,
            color=colour,
            ha="right",
            va="center",
        )


def draw_matrix(axes: Any, left: float, counts: Counter[tuple[int, int]]) -> None:
    """On the right, the imports: all left of the diagonal when all go down."""
    from matplotlib.patches import Rectangle

    largest = max(counts.values())
    for here, folders in enumerate(FLOORS):
        bottom, x = here * PITCH, left + here * CELL
        colour = colour_of(folders[0])
        axes.add_patch(Rectangle((x, bottom), CELL * 0.94, HEIGHT, facecolor=colour, edgecolor="none"))
        for there in range(len(FLOORS)):
            count = counts[here, there]
            cell = (left + there * CELL, bottom)
            if there < here or count:
                shade = 0.06 + 0.6 * (count / largest) ** 0.5 if count else 0.0
                face = (0.16, 0.35, 0.62, shade) if there < here else (0.9, 0.1, 0.1, 0.8)
                axes.add_patch(
                    Rectangle(cell, CELL * 0.94, HEIGHT, facecolor=face, edgecolor="#dddddd", linewidth=0.6)
                )
            if count:
                axes.text(
                    cell[0] + CELL * 0.47, bottom + HEIGHT / 2, str(count), fontsize=10, ha="center", va="center",
                    color="white" if shade > 0.45 else "#1b2b40",
                )  # fmt: skip
        axes.text(
            x + CELL * 1.1, bottom + HEIGHT / 2, ", ".join(folders), fontsize=10.5, color=colour, va="center",
        )  # fmt: skip
    axes.text(
        left, -0.2, "How often the floor of a row imports the floor of a column", fontsize=9.5,
        color="#444444", va="top",
    )  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
