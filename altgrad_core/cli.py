"""The commands `altgrad-run` and `altgrad`: they parse, call, and print."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import attrs
import cyclopts
from cyclopts import Parameter

from altgrad_core.hookspecs import KINDS
from altgrad_core.options import Choice, plain
from altgrad_core.registry import Registered, Registry, UsageError, discover

_VERSION_FLAGS = ["--version"]
Without = Annotated[tuple[str, ...], Parameter(help="Leave out this distribution's plugins.", negative=())]

run_app = cyclopts.App(
    name="altgrad-run",
    help="Train what an experiment file describes.",
    version_flags=_VERSION_FLAGS,
    result_action="return_value",
)
app = cyclopts.App(
    name="altgrad",
    help="What is installed, and what it can do.",
    version_flags=_VERSION_FLAGS,
    result_action="return_value",
)


def altgrad_run() -> None:
    """Entry point of the command `altgrad-run`."""
    sys.exit(_guarded(run_app))


def altgrad() -> None:
    """Entry point of the command `altgrad`."""
    sys.exit(_guarded(app))


def _guarded(command: cyclopts.App, tokens: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake prints without a traceback and exits with 2."""
    try:
        code = command(tokens, exit_on_error=False, print_error=True)
    except cyclopts.CycloptsError:
        return 2
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    return code if isinstance(code, int) else 0


# --- altgrad-run -------------------------------------------------------------------------------------


@run_app.default
def run(
    experiment: Path,
    /,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=())] = (),
    out: Path = Path("runs"),
    device: str = "auto",
    check: Annotated[bool, Parameter(negative=())] = False,
    resume: Path | None = None,
    jobs: int = 1,
    quiet: Annotated[bool, Parameter(negative=())] = False,
    without: Without = (),
) -> int:
    """Run an experiment; a grid runs all its cells, skipping those already finished.

    Parameters
    ----------
    experiment
        The TOML file.
    set_
        Override one key: steps=20, quantize.format=E5M2, optimizer.lr=1e-3.
    out
        Where run folders go.
    device
        auto, cpu or cuda; goes before the file's train.device.
    check
        Only validate the file and print what it would run.
    resume
        Go on with this run folder.
    jobs
        Cells of a grid to run at the same time.
    quiet
        Print warnings and errors only.
    without
        Leave out this distribution's plugins.
    """
    from altgrad_core import describe
    from altgrad_core.experiment_file import load_experiment

    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device is auto, cpu or cuda, not {device!r}")
    if jobs < 1:
        raise UsageError(f"--jobs is 1 or more, not {jobs}")
    file = load_experiment(experiment, set_, discover(without))
    if check:
        for line in describe.check(file, out, device):
            print(line)
        return 0
    from altgrad_core.commands import run_file

    return run_file(
        file, overrides=set_, without=without, out=out, device=device, resume=resume, jobs=jobs, quiet=quiet
    )


# --- altgrad -----------------------------------------------------------------------------------------


@app.command
def plugins(
    *,
    kind: str | None = None,
    as_json: Annotated[bool, Parameter(name="--json", negative=())] = False,
    without: Without = (),
) -> int:
    """List what is installed; broken and conflicting plugins with the reason.

    Parameters
    ----------
    kind
        Only this kind: format, stiffness, optimizer, monitor, fallback, dataset, executor.
    as_json
        Print JSON.
    without
        Leave out this distribution's plugins.
    """
    if kind is not None and kind not in KINDS:
        raise UsageError(f"--kind is one of {', '.join(KINDS)}, not {kind!r}")
    registry = discover(without)
    entries = [entry for entry in registry.registered if kind in (None, entry.kind)]
    if as_json:
        print(json.dumps(_listing(registry, entries), indent=1))
        return 0
    _print_table([(entry.kind, entry.name, entry.owner, entry.component.summary) for entry in entries])
    for broken in registry.broken:
        print(f"\nbroken: {broken}")
    for owners in registry.conflicts():
        listed = " and ".join(entry.owner for entry in owners)
        print(
            f'\nconflict: the {owners[0].kind} {owners[0].name!r} is owned by {listed}; say plugin = "dist:name"'
        )
    return 0


def _listing(registry: Registry, entries: Sequence[Registered]) -> dict[str, Any]:
    return {
        "components": [
            {
                "kind": entry.kind,
                "name": entry.name,
                "summary": entry.component.summary,
                "distribution": entry.distribution,
                "version": entry.version,
            }
            for entry in entries
        ],
        "broken": [attrs.asdict(broken) for broken in registry.broken],
        "conflicts": [
            {
                "kind": owners[0].kind,
                "name": owners[0].name,
                "distributions": [entry.distribution for entry in owners],
            }
            for owners in registry.conflicts()
        ],
    }


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)] if rows else []
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())


@app.command
def show(name: str, /, *, without: Without = ()) -> int:
    """Show one component: its options, its source, and a TOML snippet.

    Parameters
    ----------
    name
        NAME, or KIND/NAME where several kinds have the name.
    without
        Leave out this distribution's plugins.
    """
    registry = discover(without)
    kind, _, bare = name.rpartition("/")
    if kind and kind not in KINDS:
        raise UsageError(f"the kind is one of {', '.join(KINDS)}, not {kind!r}")
    found = _shown_components(registry, [kind] if kind else list(KINDS), bare)
    if len(found) > 1:
        choices = ", ".join(f"altgrad show {entry.kind}/{bare}" for entry in found)
        raise UsageError(f"{bare!r} is the name of several components: {choices}")
    for line in _description(found[0]):
        print(line)
    return 0


def _shown_components(registry: Registry, kinds: Sequence[str], name: str) -> list[Registered]:
    import difflib

    found, errors = [], []
    for kind in kinds:
        try:
            found.append(registry.find(kind, name))
        except UsageError as error:
            errors.append(error)
    if not found:
        if len(kinds) == 1:
            raise errors[0]
        known = sorted({entry.name for entry in registry.registered})
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else "; `altgrad plugins` lists what there is"
        raise UsageError(f"nothing named {name!r} is installed{hint}")
    return found


_HEADINGS = {
    "optimizer": "[optimizer]",
    "monitor": "[[monitor]]",
    "fallback": "[[fallback]]",
    "dataset": "[data]",
}


def _description(entry: Registered) -> list[str]:
    component = entry.component
    lines = [f"{entry.kind} {entry.name}: {component.summary}", f"from {entry.owner}"]
    if component.source:
        lines.append(f"source: {component.source}")
    fields = attrs.fields(component.options)
    if fields:
        lines += ["", "options:"]
    for field in fields:
        unit = f", {field.metadata['unit']}" if field.metadata.get("unit") else ""
        default = "required" if field.default is attrs.NOTHING else f"default {_written(_default(field))}"
        lines.append(f"  {field.name}: {_type_name(field.type)}, {default}{unit}")
        if field.metadata.get("help"):
            lines.append(f"      {field.metadata['help']}")
    return [*lines, "", *_snippet(entry, fields)]


def _default(field: Any) -> Any:
    return field.default.factory() if isinstance(field.default, attrs.Factory) else field.default


def _type_name(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return text.removesuffix("Choice").lower() if text.endswith("Choice") else text


def _written(value: Any) -> str:
    """Return a value as TOML writes it."""
    value = plain(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    if value is None:
        return "none"
    return json.dumps(value)


def _snippet(entry: Registered, fields: Sequence[Any]) -> list[str]:
    defaults = [(field, None if field.default is attrs.NOTHING else _default(field)) for field in fields]
    pairs = [
        f"{field.name} = {_written(value)}" if value is not None else f"# {field.name} = ..."
        for field, value in defaults
    ]
    if entry.kind == "format":
        if not fields:
            return ["[quantize]", f'format = "{entry.name}"']
        inline = ", ".join(pair for pair in pairs if not pair.startswith("#"))
        return ["[quantize]", f'format = {{plugin = "{entry.name}"{", " + inline if inline else ""}}}']
    if entry.kind == "stiffness":
        inline = ", ".join(
            [f'plugin = "{entry.name}"', *(pair for pair in pairs if not pair.startswith("#"))]
        )
        return ["[optimizer]", 'plugin = "ManifoldAdamW"', f"stiffness = {{{inline}}}"]
    heading = _HEADINGS.get(entry.kind)
    return [heading, f'plugin = "{entry.name}"', *pairs] if heading else []


__all__ = ["Choice", "altgrad", "altgrad_run"]
