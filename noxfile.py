"""Sessions: `nox -s test`, `isolated`, `lint`, `soak`."""

import pathlib

import nox

PLUGINS = sorted(path.parent.name for path in pathlib.Path("plugins").glob("*/pyproject.toml"))
TEST_TOOLS = ["pytest", "hypothesis", "gfloat", "ml_dtypes"]

nox.options.sessions = ["test", "isolated", "lint"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def test(session: nox.Session) -> None:
    """Everything installed as the README says: the default tests."""
    session.install("-r", "requirements-dev.txt")
    session.run("pytest", *session.posargs)


@nox.session
@nox.parametrize("plugin", PLUGINS)
def isolated(session: nox.Session, plugin: str) -> None:
    """Each plugin's tests from wheels, in an environment that holds the core and that plugin alone."""
    wheels = session.create_tmp()
    session.install("-c", "constraints.txt", "flit_core")
    session.run(
        "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, ".", f"plugins/{plugin}"
    )
    names = ["altgrad_core", plugin]
    built = [str(next(pathlib.Path(wheels).glob(f"{name}-*.whl"))) for name in names]
    session.install("-c", "constraints.txt", *built, *TEST_TOOLS)
    tests = pathlib.Path("plugins", plugin, "tests").resolve()
    rootless = ["-c", str(pathlib.Path("pyproject.toml").resolve()), "--rootdir", str(tests)]
    session.chdir(wheels)  # so that nothing is imported from the checkout
    session.run("pytest", "-p", "no:cacheprovider", *rootless, str(tests), *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, mypy and import-linter."""
    session.install("-r", "requirements-dev.txt")
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def soak(session: nox.Session) -> None:
    """The slow tests at full counts; run before a release."""
    session.install("-r", "requirements-dev.txt")
    session.run("pytest", "-m", "slow", *session.posargs, env={"ALTGRAD_SOAK": "1"})
