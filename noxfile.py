"""Sessions: `nox -s test`, `isolated`, `lint`, `soak`."""

import pathlib

import nox

FOLDERS = {
    path.parent.name: path.parent
    for place in ("plugins", "examples")
    for path in sorted(pathlib.Path(place).glob("*/pyproject.toml"))
}
"""Package to the folder of its distribution: every plugin, and the example of a third party's."""
TEST_TOOLS = ["pytest", "hypothesis", "gfloat", "ml_dtypes"]

nox.options.sessions = ["test", "isolated", "lint"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def test(session: nox.Session) -> None:
    """Everything installed as the README says: the default tests."""
    session.install("-r", "requirements-dev.txt")
    session.run("pytest", *session.posargs)


@nox.session
@nox.parametrize("plugin", list(FOLDERS))
def isolated(session: nox.Session, plugin: str) -> None:
    """Each plugin's tests from wheels, in an environment that holds the core and that plugin alone."""
    wheels = session.create_tmp()
    session.install("-c", "constraints.txt", "flit_core")
    session.run(
        "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, ".", str(FOLDERS[plugin])
    )
    names = ["altgrad_core", plugin]
    built = [str(next(pathlib.Path(wheels).glob(f"{name}-*.whl"))) for name in names]
    session.install("-c", "constraints.txt", *built, *TEST_TOOLS)
    tests = (FOLDERS[plugin] / "tests").resolve()
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
