"""The front door: `metnet COMMAND key=value ...` runs the function that `configs/COMMAND.yaml` names."""

import ctypes
import inspect
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from pipelines.signals import ending_in_order
from pipelines.words import nearest

# OpenMP's waiting threads spin by default: on a machine with other work that made runs six times as long
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
KEPT = 2**29  # bytes of freed memory
LARGE = 2**27, 2**25  # bytes of blocks that are never kept; older glibc takes no more than the second
CONFIGS = Path(__file__).parent / "configs"
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
TAKEN_AWAY = re.compile(r"~[\w.]+")  # a key
COMMANDS = (
    "demo",
    "ingest",
    "replay",
    "export",
    "inspect",
    "rollback",
    "train",
    "train-head",
    "forecast",
    "verify",
    "bench-skill",
    "serve",
)


class UsageError(Exception):
    """The command line is wrong; exit code 2."""


# ---- help, read from the comments of the YAML files ------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One key of a command, as its YAML file documents it."""

    name: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Page:
    """What a YAML file says of itself: comment lines on top, and a comment behind each key."""

    summary: str
    text: str
    examples: tuple[str, ...]
    keys: tuple[Key, ...]
    groups: tuple[tuple[str, str, str], ...]  # key, folder under configs/, default


def read_page(path: Path) -> Page:
    """The documentation in one YAML file."""
    lines = path.read_text().splitlines()
    head = [line.removeprefix("#").removeprefix(" ") for line in _leading_comments(lines)]
    cut = head.index("Examples:") if "Examples:" in head else len(head)
    return Page(
        summary=head[0] if head else "",
        text="\n".join(head[1:cut]).strip(),
        examples=tuple(line.strip() for line in head[cut + 1 :] if line.strip()),
        keys=tuple(_keys(lines)),
        groups=tuple(_groups(lines)),
    )


def _leading_comments(lines: list[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("#"):
            return
        if not line.startswith("# @"):  # which Hydra reads
            yield line


def _keys(lines: list[str]) -> Iterator[Key]:
    """`key: default  # meaning`; a key under a key becomes `outer.key`, and one in a list is none."""
    outer: list[tuple[int, str]] = []
    for line in lines:
        found = re.fullmatch(r"( *)(- )?(\w+):(?: +((?:[^#]|#(?! ))*?))?(?: +# (.*))?", line.rstrip())
        if not found or found[3] == "defaults":
            continue
        outer = [entry for entry in outer if entry[0] < len(found[1])]
        name = ".".join([entry[1] for entry in outer] + [found[3]])
        if found[2]:
            outer.append((len(found[1]), "-"))
        elif found[5] and not found[3].startswith("_") and "-" not in name:
            yield Key(name, "required" if found[4] == "???" else found[4] or "several", found[5])
        if not found[4]:
            outer.append((len(found[1]), found[3]))


def _groups(lines: list[str]) -> Iterator[tuple[str, str, str]]:
    """`- group: default` and `- group@key: default` of the defaults list."""
    for line in lines:
        if found := re.fullmatch(r" +- /?([a-z]\w*)(?:@(\w+))?: *([a-z]\w*)", line.rstrip()):
            yield found[2] or found[1], found[1], found[3]


def command_help(command: str) -> Iterator[Any]:
    """What `metnet COMMAND --help` shows."""
    page = read_page(CONFIGS / f"{command}.yaml")
    yield f"[bold]metnet {command}[/bold] [dim]\\[key=value ...] \\[--debug][/dim]\n"
    yield page.summary
    for paragraph in page.text.split("\n\n"):
        yield "\n" + " ".join(paragraph.split()).replace("[", r"\[")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("key", "default", "meaning"):
        table.add_column(title, overflow="fold", no_wrap=title == "key")
    for key in page.keys:
        table.add_row(key.name, key.default.replace("[", r"\["), key.meaning.replace("[", r"\["))
    for key_name, folder, default in page.groups:
        table.add_section()
        _add_group(table, key_name, folder, default)
    yield ""
    yield table
    if any("." in key.name for key in page.keys) or page.groups:
        yield (
            "\nkey=value gives a key another value, key=null none; ~key takes a key away:"
            " where what another was set to does not know it, or has a default of its own."
        )
    yield "\n[bold]examples[/bold]"
    for example in page.examples:
        yield "  " + example.replace("[", r"\[")


def _add_group(table: Table, key: str, folder: str, default: str) -> None:
    names = options(folder)
    says = {name: read_page(CONFIGS / folder / f"{name}.yaml") for name in names}
    table.add_row(key, default, " | ".join(name for name in names if name != "from_path"))
    for name in names:
        shown = f"{key}=PATH" if name == "from_path" else f"{key}={name}"
        table.add_row(f"  {shown}", "", f"[dim]{says[name].summary}[/dim]")
        if name != "from_path":
            for inner in says[name].keys:
                table.add_row(f"    {key}.{inner.name}", inner.default.replace("[", r"\["), inner.meaning)
            for inner_key, inner_folder, inner_default in says[name].groups:
                table.add_row(f"    {key}.{inner_key}", inner_default, " | ".join(options(inner_folder)))


def options(folder: str) -> list[str]:
    """The names that a configuration group offers."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


# ---- a command line becomes a call -----------------------------------------------------------------


def compose(command: str, words: list[str]) -> Any:
    """The resolved configuration of a command; a wrong word raises `UsageError`."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = _choices(command)
    words = [_in_full(word, groups) for word in _named(command, words)]
    taken = [word.removeprefix("~") for word in words if TAKEN_AWAY.fullmatch(word)]
    none = {word for word in words if word.endswith("=null") and word.removesuffix("=null") in groups}
    taken += [key for word in none if groups[key := word.removesuffix("=null")][1] != "null"]
    words = [word for word in words if not TAKEN_AWAY.fullmatch(word) and word not in none]
    keys = [key.name for key in read_page(CONFIGS / f"{command}.yaml").keys]
    choices, values = _sort_words(words, groups, keys)
    try:
        with hydra.initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
            plain = hydra.compose(command, choices)
            known = set(_flatten(OmegaConf.to_container(plain)))
            for key, text in values:
                _check(key, text, known | set(groups), plain)
            given = {key.lstrip("+") for key, _ in values}
            for key in taken:
                _check_known(key, known | given)
            config = hydra.compose(
                command, choices + [_override(key, text, _is_path(plain, key, text)) for key, text in values]
            )
        for key in taken:
            _take_away(config, key)
        missing = sorted(_missing(OmegaConf.to_container(config)))
        if missing:
            raise UsageError(_say_missing(command, missing))
        OmegaConf.resolve(config)
        _check_calls(OmegaConf.to_container(config))
    except (HydraException, OmegaConfBaseException) as error:
        raise UsageError(" ".join(str(error).split())) from error
    return config


def _choices(command: str) -> dict[str, tuple[str, str]]:
    """The group keys of a command, each with its folder and default; `model.attention` is `model`'s own."""
    groups = {
        key: (folder, default) for key, folder, default in read_page(CONFIGS / f"{command}.yaml").groups
    }
    for key, (folder, default) in list(groups.items()):
        for inner, inner_folder, inner_default in read_page(CONFIGS / folder / f"{default}.yaml").groups:
            groups[f"{key}.{inner}"] = (inner_folder, inner_default)
    for line in (CONFIGS / f"{command}.yaml").read_text().splitlines():
        if found := re.fullmatch(r" +- ([a-z]\w*)@(\w+)", line):  # the whole of another command, below a key
            groups |= {f"{found[2]}.{key}": choice for key, choice in _choices(found[1]).items()}
    return groups


def _in_full(word: str, groups: dict[str, tuple[str, str]]) -> str:
    """`attention=...` is short for `model.attention=...`, and so are the keys below it."""
    sign = "~" if word.startswith("~") else ""
    first, *rest = re.split(r"(?=[.=])", word.removeprefix("~"), maxsplit=1)
    long = [key for key in groups if key.endswith(f".{first}")]
    return f"{sign}{long[0]}{''.join(rest)}" if len(long) == 1 and first not in groups else word


def _named(command: str, words: list[str]) -> list[str]:
    """The words with `path=` before a bare one, where a path is all that is required (`inspect out/cube`)."""
    keys = read_page(CONFIGS / f"{command}.yaml").keys
    if [key.name for key in keys if key.default == "required"] != ["path"]:
        return words
    named = [word for word in words if re.match(r"[+~]?[\w.]+=", word) or TAKEN_AWAY.fullmatch(word)]
    bare = [word for word in words if word not in named]
    if len(bare) > 1:
        raise UsageError(f"{' '.join(bare)}: expected one path")
    return [f"path={word}" for word in bare] + named


def _sort_words(
    words: list[str], groups: dict[str, tuple[str, str]], keys: list[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Overrides that choose a member of a group, and (key, text) of others."""
    choices: list[str] = []
    values: list[tuple[str, str]] = []
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UsageError(f"{word!r}: expected key=value")
        if not text:  # as a path it would be the working directory
            raise UsageError(f"{key}=: expected a value behind it")
        if text.startswith("~/"):  # which no shell expands behind a key
            text = str(Path(text).expanduser())
        if key not in groups:
            values.append((key, text))
            continue
        folder = groups[key][0]
        group = key if folder == key else f"{folder}@{key}"
        names = options(folder)
        if text in (*names, "null") and text != "from_path":
            choices.append(f"{group}={text}")
        elif "from_path" in names and text:
            choices.append(f"{group}=from_path")
            [first, *_] = read_page(CONFIGS / folder / "from_path.yaml").keys
            values.append((f"{key}.{first.name}", text))
        else:
            other = nearest(key.split(".")[-1], keys, 0.9) if text.startswith("[") else ""
            meant = nearest(text, names) or other
            raise UsageError(f"{key}={text}: expected one of {', '.join(names)}{meant}")
    return choices, values


def _check(key: str, text: str, known: set[str], plain: Any) -> None:
    """Refuses a key that does not exist, and a value of another kind than the default's."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    if key.startswith(("+", "~")):
        return
    _check_known(key, known)
    default = OmegaConf.select(plain, key, throw_on_missing=False)
    value = OverridesParser.create().parse_override(_override(key, text)).value()
    if OmegaConf.is_list(default) and not isinstance(value, list | None):
        raise UsageError(f"{key}={text}: expected a list, such as [{text}]")
    wanted = {bool: (bool,), int: (int,), float: (int, float)}.get(type(default))
    if wanted and (not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool)):
        raise UsageError(f"{key}={text}: expected {KINDS[type(default)]}, such as {str(default).lower()}")


def _check_known(key: str, known: set[str]) -> None:
    """Refuses a key that does not exist, with those that do."""
    if key in known:
        return
    every = sorted(name for name in known if not name.split(".")[-1].startswith("_"))
    outer, beside = _beside(key, every)
    told = f"the keys of {outer} are" if outer else "the keys are"
    raise UsageError(f"no key {key!r}{nearest(key, every)}; {told}: {', '.join(beside)}")


def _take_away(config: Any, key: str) -> None:
    """Deletes a key, unless what is called with it has no default of its own for it."""
    from omegaconf import OmegaConf, open_dict

    outer, _, name = key.rpartition(".")
    node = OmegaConf.select(config, outer) if outer else config
    if not OmegaConf.is_dict(node) or name not in set(node):  # `in node` is false of a null
        raise UsageError(f"~{key}: it is gone already, with another key that was given")
    target = node.get("_target_")
    wanted = _parameters(target).get(name) if target else None
    if wanted is not None and wanted.default is wanted.empty:
        raise UsageError(f"~{key}: {target} cannot do without {name}; expected {key}= and another value")
    with open_dict(node):
        del node[name]


def _is_path(plain: Any, key: str, text: str) -> bool:
    """Whether a key wants a path: it has no default, for nothing but paths is required.

    Where several are taken too, `[a,b]` is a list of them, unless a folder has just that name.
    """
    from hydra.utils import get_method
    from omegaconf import OmegaConf

    outer, _, name = key.rpartition(".")
    node = OmegaConf.select(plain, outer) if outer else plain
    if node is None or not OmegaConf.is_missing(node, name):
        return False
    if outer or not text.startswith("[") or Path(text).exists():
        return True
    return not _fits([""], get_type_hints(get_method(plain["_target_"])).get(key, str))


def _override(key: str, text: str, is_path: bool = False) -> str:
    """One Hydra override; text that is no Hydra value (a path with a blank, or of digits) is quoted."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(f"{key}={text}")
        wrong = (dict, list, bool, int, float, type(None)) if is_path else dict
        if not parsed.is_sweep_override() and not isinstance(parsed.value(), wrong):
            return f"{key}={text}"
    except HydraException:
        pass
    quoted = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{quoted}'"


def _flatten(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of all keys."""
    for key, value in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _flatten(value, f"{prefix}{key}.")


def _check_calls(node: Any, prefix: str = "") -> None:
    """Refuses a key that what is called does not take, before anything is called."""
    for key, value in node.items():
        if isinstance(value, dict):
            _check_calls(value, f"{prefix}{key}.")
    if "_target_" not in node:
        return
    taken = _parameters(node["_target_"])
    if not taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        return
    for key in node:
        if not key.startswith("_") and key not in taken:
            given = f"{prefix}{key}"
            raise UsageError(f"{given}: {node['_target_']} takes no {key}; ~{given} takes the key away")


def _parameters(target: object) -> Mapping[str, inspect.Parameter]:
    """What is called takes; nothing where that cannot be told, and the call will say what is wrong."""
    from hydra.utils import get_object

    try:
        with _silent("hydra.utils", "hydra._internal.utils"):
            return inspect.signature(get_object(str(target))).parameters
    except (AttributeError, ImportError, TypeError, ValueError):
        return {}


@contextmanager
def _silent(*names: str) -> Iterator[None]:
    """Keeps some loggers quiet meanwhile."""
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        yield
    finally:
        for logger, was in zip(loggers, before, strict=True):
            logger.disabled = was


def _missing(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names of keys without a value, also where others refer to them."""
    for key, value in node.items() if isinstance(node, dict) else ():
        if value == "???":
            yield f"{prefix}{key}"
        yield from _missing(value, f"{prefix}{key}.")


def _say_missing(command: str, missing: list[str]) -> str:
    meanings = {key.name: key.meaning for key in read_page(CONFIGS / f"{command}.yaml").keys}
    wanted = "; ".join(f"{key}= ({meanings[key]})" if key in meanings else f"{key}=" for key in missing)
    return f"missing {wanted}. See metnet {command} --help"


def _beside(key: str, every: list[str]) -> tuple[str, list[str]]:
    """The innermost known part of a dotted key, and the keys that stand right in it."""
    outer = key.rpartition(".")[0]
    while outer and outer not in every:
        outer = outer.rpartition(".")[0]
    prefix = f"{outer}." if outer else ""
    return outer, [name for name in every if name.startswith(prefix) and "." not in name.removeprefix(prefix)]


def call(config: Any) -> Any:
    """Calls the function that the configuration names, with every nested `_target_` built first."""
    from hydra.utils import get_method, instantiate
    from omegaconf import OmegaConf

    function = get_method(config["_target_"])
    hints = get_type_hints(function)
    arguments: dict[str, Any] = {}
    for key in config:
        if key == "_target_":
            continue
        value = config[key]
        plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        if key in hints and not _fits(plain, hints[key]):
            raise UsageError(f"{key}={plain}: expected {_kind(hints[key])}")
        if isinstance(plain, int | float) and not isinstance(plain, bool) and _fits("", hints.get(key, int)):
            value = str(plain)  # a date of digits
        arguments[key] = instantiate(value, _convert_="all") if OmegaConf.is_config(value) else value
    if "config" in inspect.signature(function).parameters:
        arguments["config"] = OmegaConf.to_container(config)
    return function(**arguments)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation wants; a call that is still to be made fits any."""
    if isinstance(value, dict) and "_target_" in value:
        return True
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    if get_origin(hint) in (list, Sequence):
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint not in KINDS:
        return isinstance(value, dict)
    wanted = {float: (int, float), str: (int, float, str)}.get(hint, hint)
    return isinstance(value, wanted) and isinstance(value, bool) == (hint is bool)


def _kind(hint: Any) -> str:
    """What an annotation wants, in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_kind(part) for part in get_args(hint) if part in KINDS or get_args(part))
    if get_origin(hint) in (list, Sequence):
        return f"a list (each {_kind(get_args(hint)[0])})"
    return KINDS.get(hint, "a call with _target_")


def run(command: str, words: list[str]) -> None:
    """Runs one command: a function, or (`demo`) a list of commands, each in a process of its own."""
    config = compose(command, words)
    if "steps" not in config:
        result = call(config)
        if result is not None:
            typer.echo(str(result))
        return
    for step in config["steps"]:
        typer.secho(f"\n$ metnet {shlex.join(step)}", bold=True)
        code = _in_a_process(step)
        if code:
            raise SystemExit(code)
    typer.echo(f"\n{config['made'].rstrip()}")
    if config["serve"]:
        os.execv(sys.executable, [sys.executable, __file__, *config["served"]])


def _in_a_process(step: list[str]) -> int:
    """Runs a command in a process of its own, which ends in order when this one is to end; its exit code."""
    with subprocess.Popen([sys.executable, __file__, *step]) as process:
        try:
            return process.wait()
        except BaseException as ended:
            if not isinstance(ended, KeyboardInterrupt):  # Ctrl+C reaches both
                process.terminate()
            process.wait()
            raise


# ---- the door itself -------------------------------------------------------------------------------


def answer(command: str, words: list[str]) -> int:
    """Runs one command and says in one line what went wrong, if anything did; the exit code."""
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    console = Console(stderr=True, highlight=False)
    handler = RichHandler(console=console, show_time=False, show_path=False, rich_tracebacks=True)
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(message)s", handlers=[handler]
    )
    logging.getLogger("pipelines").setLevel(logging.DEBUG if debug else logging.INFO)
    for noisy in ("matplotlib", "asyncio", "rasterio", "fontTools", "PIL", "h5py", "numcodecs", "fsspec"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if "--help" in words or "-h" in words:
        page = Console(highlight=False)
        for part in command_help(command):
            page.print(part, soft_wrap=isinstance(part, str) and part.startswith("  "))
        return 0
    try:
        with ending_in_order():
            run(command, words)
    except UsageError as error:
        typer.echo(f"metnet {command}: {error}", err=True)
        return 2
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        typer.echo(f"metnet {command}: {_one_line(error)}", err=True)
        return 1
    return 0


def _one_line(error: BaseException) -> str:
    """An error as its user should read it."""
    from pipelines.words import printable

    while type(error).__module__.startswith("hydra") and error.__cause__ is not None:
        error = error.__cause__
    text = printable(str(error))
    if isinstance(error, ModuleNotFoundError):
        return f"{text}: pip install 'metnet-nowcast[serve,verify]' brings what is optional"
    if isinstance(error, ValueError | OSError):
        return text or type(error).__name__
    return f"{type(error).__name__}: {text} (metnet ... --debug shows where)"


app = typer.Typer(
    name="metnet",
    help="From raw radar files to a served, verified, probabilistic rain forecast.",
    epilog="metnet COMMAND --help teaches a command: its keys, defaults, units and examples.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
)


def _register(command: str) -> None:
    settings = {"ignore_unknown_options": True, "help_option_names": []}
    summary = read_page(CONFIGS / f"{command}.yaml").summary

    @app.command(command, help=summary, context_settings=settings)
    def _(words: list[str] = typer.Argument(None, metavar="[key=value ...]")) -> None:  # noqa: B008
        raise typer.Exit(answer(command, words or []))


def _keep_freed_memory() -> None:
    """Has malloc keep what is freed for what comes next, where it can be told so (glibc).

    By default the memory of each map goes back to the system and is asked for again, page by page: a quarter
    of a forecast's CPU time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, size) for size in LARGE):
        mallopt(M_TRIM_THRESHOLD, KEPT)  # after the other: alone it would end malloc's own adapting


def main() -> None:
    """The console command `metnet`."""
    if sys.platform == "linux" and sys.argv[1:2] != ["serve"]:  # which lives long and makes no maps
        _keep_freed_memory()
    for command in COMMANDS:
        _register(command)
    app()


if __name__ == "__main__":
    main()
