"""Sessions of the project: `python -m nox -s NAME`, each in its own virtual environment."""

import subprocess
import sys
from pathlib import Path

import nox

ROOT = Path(__file__).parent
PACKAGES = ("data", "core", "ckpt", "infer", "eval")
CONSTRAINTS = ROOT / "constraints.txt"
TEST_TOOLS = (
    "pytest",
    "pytest-xdist",
    "transformers",
    "protobuf",
    "gigatoken",
    "lm_eval",
    "accelerate",
    "deepspeed",
    "peft",
    "trl",
    "datasets",
    "psutil",
    "scipy",
    "tensorboard",
)

nox.options.sessions = ["tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"


def package(name: str) -> str:
    return str(ROOT / "packages" / f"ascendspeed-{name}")


def install(session: nox.Session, *extra: str) -> None:
    """Install all five packages editable, with the tested versions of everything else."""
    # First alone: asked for together with others, pip may resolve torch to a build with CUDA.
    session.install("-c", str(CONSTRAINTS), "torch==2.13.0")
    packages = [argument for name in PACKAGES for argument in ("-e", package(name))]
    session.install("-c", str(CONSTRAINTS), *packages, *extra)


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
    arguments = ("-m", "not nightly", "-n", "2", "--dist", "worksteal", *session.posargs)
    session.run("python", "-m", "pytest", *arguments, env={"OMP_NUM_THREADS": "1"})


@nox.session
def nightly(session: nox.Session) -> None:
    """The long sweeps; arguments after `--` go to pytest."""
    install(session, *TEST_TOOLS)
    session.run("python", "-m", "pytest", "-m", "nightly", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install("-c", str(CONSTRAINTS), "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Strict types of the five packages."""
    install(session, "mypy")
    session.run("mypy", env={"MYPYPATH": ""})


@nox.session
def build(session: nox.Session) -> None:
    """Wheels of all packages into dist/; name packages after `--` to build fewer."""
    session.install("build")
    for name in session.posargs or PACKAGES:
        session.run(
            "python", "-m", "build", "--wheel", "--outdir", str(ROOT / "dist"), package(name), silent=True
        )


@nox.session(venv_backend="none")
def isolated(session: nox.Session) -> None:
    """Each wheel alone in a fresh environment; name packages after `--` to try fewer."""
    for name in session.posargs or PACKAGES:
        folder = Path(session.create_tmp()) / f"isolated-{name}"
        python = folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS)]
        wheels = folder / "wheels"
        for needed in wheels_for(name):
            session.run(
                str(python), "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(wheels), package(needed),
                external=True,
            )  # fmt: skip
        if "core" in wheels_for(name):
            session.run(*pip, "torch==2.13.0", external=True)
        session.run(*pip, *map(str, wheels.glob("*.whl")), external=True)
        session.run(str(folder / "bin" / f"asd-{name}"), "--version", external=True)
        session.run(str(folder / "bin" / f"asd-{name}"), "--help", external=True, silent=True)
        session.run(str(python), str(ROOT / "scripts" / "check_isolated.py"), name, external=True)


def wheels_for(name: str) -> tuple[str, ...]:
    """The package and the other packages of this repository that it needs."""
    return {
        "data": ("data",),
        "core": ("data", "core"),
        "ckpt": ("data", "core", "ckpt"),
        "infer": ("data", "core", "infer"),
        "eval": ("eval",),
    }[name]


@nox.session
def bench(session: nox.Session) -> None:
    """Benchmarks; name scripts of benchmarks/ after `--` to run fewer."""
    install(session, *TEST_TOOLS)
    for script in session.posargs or sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")):
        session.run("python", str(ROOT / "benchmarks" / f"{script}.py"))
