"""The command line: arguments in, exit codes out. Heavy rooms are imported only by the command that needs them."""

from __future__ import annotations

import signal
import sys
import warnings
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

import opd
from opd.errors import EXIT_DONE, EXIT_INTERRUPTED, BadInput, ConfigError, OpdError

Items = Annotated[str, Parameter(allow_leading_hyphen=True, negative=(), show_default=False)]

app = App(
    name="opd",
    help="On-policy distillation: the student writes, the teacher scores every token, the student improves.",
    version=opd.__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,  # cyclopts would exit with 130; `main` says 75
    default_parameter=Parameter(negative=()),
)
config_app = App(
    name="config", help="Look at configs without running anything.", default_parameter=Parameter(negative=())
)
app.command(config_app)


@app.command
def init(path: Path = Path("recipe.yaml"), /, *, force: bool = False) -> None:
    """Write a commented starter config.

    Parameters
    ----------
    path
        Where to write it.
    force
        Overwrite a file that is already there.
    """
    from importlib.resources import files

    if path.exists() and not force:
        raise BadInput(f"{path} already exists; choose another name or pass --force")
    if not path.parent.is_dir():
        raise BadInput(f"{path}: there is no folder {path.parent}")
    text = files("opd.cli").joinpath("starter.yaml").read_text(encoding="utf-8")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}") from error
    print(f"wrote {path}; fill in student, teacher and prompts, then: opd train {path} --dry-run")


@app.command
def train(*items: Items, dry_run: bool = False) -> None:
    """Run a config: opd train recipe.yaml teacher.model=... optim.lr=1e-5

    Parameters
    ----------
    items
        Config files (YAML, TOML or JSON; later ones win), and options as a.b=c or --a.b c.
    dry_run
        Show what would be loaded, whether it fits, and a rendered prompt; load no weights.
    """
    from opd.config.loading import load_config

    files, overrides = split(items)
    config = load_config(files, overrides).config
    if dry_run:
        from opd.wiring.dry_run import dry_run as show

        show(config)
        return
    from opd.wiring.run import execute

    execute(config)


@app.command(name="eval")
def evaluate(model: str, /, *items: Items) -> None:
    """Score a model on held-out tasks: opd eval MODEL task=problems.jsonl grader=exact samples=4

    Parameters
    ----------
    model
        Folder or hub name.
    items
        A recipe whose tasks to take, or task=FILE (or task=reasoning_gym:NAME) with grader=KIND, samples=K,
        max_tokens=N, temperature=T; and any other option as a.b=c, e.g. student.format.kind=plain.
    """
    from opd.wiring.evaluate import evaluate_model

    files, overrides = split(items)
    evaluate_model(model, files, overrides)


@app.command
def demo(*, quick: bool = False, folder: Path = Path("runs/demo")) -> None:
    """Distil a small student from a small teacher on this machine, and show before / after / teacher.

    Parameters
    ----------
    quick
        A tenth of the steps: shows that everything works, not the result.
    folder
        Where the runs are written; an earlier demo there is replaced.
    """
    from opd.lab.demo.run import run_demo

    run_demo(folder, quick=quick)


@config_app.command
def show(*items: Items, resolved: bool = False, origins: bool = False) -> None:
    """Print a config as it would run.

    Parameters
    ----------
    items
        Config files and options, as for train.
    resolved
        Every option with its default, and the objective's terms (replayable JSON).
    origins
        Where each given option came from.
    """
    import json

    from opd.config.loading import given, load_config
    from opd.config.loading import resolved as full

    files, overrides = split(items)
    loaded = load_config(files, overrides)
    print(json.dumps(full(loaded.config) if resolved else given(loaded.config), indent=2))
    if origins:
        for path, origin in sorted(loaded.origins.items()):
            print(f"{path}: {origin}")


@config_app.command
def schema() -> None:
    """Print the JSON Schema of a config, for completion in an editor."""
    import json

    from opd.config.loading import json_schema

    print(json.dumps(json_schema(), indent=2))


@config_app.command
def presets() -> None:
    """List the named objectives with their terms."""
    import inspect

    from opd.config.presets import PRESETS

    for name, make in PRESETS.items():
        parameters = ", ".join(str(p) for p in inspect.signature(make).parameters.values())
        print(f"{name}({parameters}): {inspect.getdoc(make)}")


def split(items: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Config files and overrides, in the order they were typed; `--a.b c` stays together with its value."""
    files: list[str] = []
    overrides: list[str] = []
    rest = list(items)
    while rest:
        item = rest.pop(0)
        if item.startswith("--"):
            if "=" in item:
                overrides.append(item)
            elif rest:
                overrides.append(f"{item}={rest.pop(0)}")
            else:
                raise ConfigError(f"{item} needs a value: {item} VALUE, or {item[2:]}=VALUE")
        elif "=" in item and not Path(item).is_file():
            overrides.append(item)
        else:
            files.append(item)
    return files, overrides


def main() -> None:
    """The entry point of the `opd` command."""
    warnings.showwarning = lambda message, *_, **__: print(f"opd: note: {message}", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    try:
        app(sys.argv[1:], exit_on_error=True, print_error=True)
    except OpdError as error:
        print(f"opd: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("opd: stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = None
    sys.exit(EXIT_DONE)


if __name__ == "__main__":
    main()
