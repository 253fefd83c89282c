"""The `vlp` command. Nothing heavy is imported before a subcommand is known, so that help answers
at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from vlp import __version__, faults, lifetime, log
from vlp.files import check_writable
from vlp.lifetime import Stopped, silence_console
from vlp.privacy import scrubbed
from vlp.schema import did_you_mean

TRAIN_EXAMPLE = """examples:
  vlp train configs/demo.yaml
  vlp train caltech101 train.batch=512 out=runs/large
  vlp train configs/demo.yaml resume=auto
  vlp train configs/demo.yaml --dry-run
  accelerate launch --config_file launch/accelerate/cpu2.yaml launch/train.py configs/demo.yaml

`vlp config` prints every key with type, default and meaning; `vlp config --search WORD` finds one.
"""
CONFIG_EXAMPLE = """examples:
  vlp config                              every key
  vlp config train.optimizer              a section, with all inside it
  vlp config objective.hard_negatives     a term's options; likewise image_tower.vit, eval.zeroshot
  vlp config --search flip                keys that speak of it
"""
PUSH_EXAMPLE = """example:
  vlp push exported/demo you/demo-clip --private

The token is huggingface_hub's: `hf auth login`, or the environment variable HF_TOKEN. It is never
written anywhere.
"""
DEMO_EXAMPLE = """example:
  vlp demo --out runs/demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 refused or failed, 2 wrong usage, 75 put
    off until data can be had again, 128 + n stopped by signal n.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser(arguments)

    # Known ones first, so that an unknown one can be answered by what the command has.
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.error(_about_unknown(unknown, arguments, options))
    if not hasattr(options, "run"):
        parser.print_help()
        return 2

    try:
        # What cannot be written is said before anything long starts.
        for name in ("out", "to"):
            place = getattr(options, name, None)
            if isinstance(place, str):
                _check_place(place, options.command)

        status = options.run(options)
        sys.stdout.flush()
        _leave_others()
        return status
    except Stopped as stopped:
        log.say(f"vlp: {stopped}")
        _leave_others()
        return stopped.status
    except KeyboardInterrupt:
        print("\nvlp: interrupted", file=sys.stderr)
        _fail_others(128 + signal.SIGINT)
        return 128 + signal.SIGINT
    except Exception as error:
        # Other pipes break, too: that of a command which a source reads from.
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            silence_console()
            return 128 + signal.SIGPIPE
        faults.say(error)
        _fail_others(1)
        return 1


def _check_place(place: str, command: str) -> None:
    """Raise OSError or ValueError where nothing can be written at a place."""
    if "://" not in place or place.startswith("file://"):
        check_writable(Path(place.removeprefix("file://")))
    # Tools of `vlp data` look by themselves, once --storage is known.
    elif command != "data":
        raise ValueError(
            f"{scrubbed(place)} lies in a store, and `vlp {command}` writes into folders of this "
            "machine only; name one, and copy what is there then"
        )


def _leave_others() -> None:
    """Where ranks were joined: leave them in good order."""
    # Who has joined none has not imported this either, and should not wait for torch now.
    if "vlp.joining" in sys.modules:
        from vlp import joining

        joining.leave()


def _fail_others(status: int) -> None:
    """Where ranks were joined: end at once, so that none waits for this one."""
    if "vlp.joining" in sys.modules:
        from vlp import joining

        joining.fail(status)


def _reader_is_gone() -> bool:
    """Whether nobody reads our output any more, as after `| head`."""
    # Asked without writing, for nothing is left to be written.
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    events = poll.poll(0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in events)


def _about_unknown(
    unknown: list[str], arguments: Sequence[str], options: argparse.Namespace
) -> str:
    """What to say of arguments that a command does not know."""
    text = f"unrecognized arguments: {' '.join(unknown)}"
    first = unknown[0].partition("=")[0]

    # Other trainers take settings as flags; the usual first mistake.
    if options.command == "train" and first.startswith("--"):
        _, equals, value = unknown[0].partition("=")

        # `--batch 512` in two arguments, as well as `--batch=512`.
        after = arguments[arguments.index(unknown[0]) + 1 :]
        if not equals:
            value = after[0] if after and not after[0].startswith("--") else "…"
        setting = f"{first[2:].replace('-', '_')}={value}"
        return f"{text}; a setting of the configuration is written without dashes: {setting}"

    # argparse lets a list end at the next option.
    pairs = [word for word in unknown if "=" in word and not word.startswith("-")]
    if options.command == "eval" and pairs:
        return (
            f"{text}; options of a task stand right behind its name or its data, before further "
            f"--options: --data PATH {' '.join(pairs)}"
        )
    if options.command == "data" and Path(first).is_file():
        return f"{text}; one SOURCE is expected, and a table is named by --captions {first}"

    known = [name for name in options.parser._option_string_actions if name.startswith("--")]
    return text + (did_you_mean(first, known) if first.startswith("--") else "")


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the choice that was meant."""

    def error(self, message: str) -> NoReturn:
        # argparse lists all choices; the near one tells more.
        wrong = re.search(r"invalid choice: '(.+?)' \(choose from (.+)\)", message)
        if wrong:
            choices = re.findall(r"[\w.-]+", wrong[2])
            suggestion = did_you_mean(wrong[1], choices)
            message = f"{message[: wrong.start()]}there is no {wrong[1]!r}{suggestion}"
        super().error(scrubbed(message))


def build_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser; only the subcommand that `arguments` name is filled in with its options."""
    parser = _Parser(
        prog="vlp",
        description="Pretrain, evaluate and export image-text dual encoders.",
        epilog="`vlp COMMAND --help` shows the options and an example of a command.",
    )
    parser.set_defaults(parser=parser, command=None)
    parser.add_argument("--version", action="version", version=f"vlp {__version__}")

    # Filling in a command imports its room; help and the others' answers need not wait for it.
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    of_commands = (
        ("train", "train a configuration", _train),
        ("config", "print the keys of a configuration, with type, default and meaning", _config),
        ("eval", "evaluate a model zero-shot, or compare results", _eval),
        ("search", "find the pictures that fit a text or a picture", _search),
        ("embed", "write the embeddings of pictures or texts as .npy or .parquet", _embed),
        ("export", "write a run as a folder that transformers and open_clip load", _export),
        ("push", "upload an export to the Hugging Face Hub", _push),
        ("report", "write a page about a run, or compare two", _report),
        ("data", "make, look at and enrich data sets", _data),
        ("cache", "list what is kept between calls, or remove it", _cache),
        ("demo", "generate data, train, evaluate and export in a few minutes", _demo),
    )
    for name, summary, fill in of_commands:
        command = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(parser=command, command=name)
        if name == chosen:
            fill(command)
    return parser


def _train(parser: argparse.ArgumentParser) -> None:
    parser.epilog = TRAIN_EXAMPLE
    parser.add_argument(
        "config",
        help="a YAML file, or the name of an installed configuration (demo, caltech101, …)",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="dotted keys with YAML values: train.batch=512",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, make three steps in memory, say what the run will take, and stop",
    )

    def run(options: argparse.Namespace) -> int:
        from vlp import config, locks
        from vlp.data import server

        loaded = config.load(config.find(options.config), options.overrides)

        check_writable(Path(loaded.out) / "config.yaml")

        # The other ranks would meet the lock of their own run.
        if os.environ.get("RANK", "0") == "0":
            locks.refuse_if_held(Path(loaded.out), advice=locks.OF_RUNS)

        server.start_for(loaded)  # its imports take seconds, which pass beside ours
        from vlp.assembly import check_places
        from vlp.eval.evaluation import in_training, read_all
        from vlp.joining import local_device

        # Too few GPUs, or a machine without them, and models that are not there, before anything
        # that takes long.
        local_device(loaded.train.device)
        check_places(loaded)
        read_all(loaded.eval)  # wrong evaluation data show now, not hours later
        if options.dry_run:
            from vlp.dry_run import dry_run

            dry_run(loaded)
        else:
            from vlp.train import train

            train(loaded, in_training)
        return 0

    parser.set_defaults(run=run)


def _config(parser: argparse.ArgumentParser) -> None:
    parser.epilog = CONFIG_EXAMPLE
    parser.add_argument(
        "section",
        nargs="?",
        metavar="SECTION",
        help="such as train, train.optimizer, objective.siglip, image_tower.vit; a key's own name",
    )
    parser.add_argument("--search", metavar="WORD", help="only keys that speak of this")

    def run(options: argparse.Namespace) -> int:
        from vlp.config import reference

        # A section would hide that a word has hits elsewhere.
        if options.section and options.search:
            raise ValueError("found SECTION and --search, expected one of the two; leave one out")
        if options.search:
            chosen = reference.search(options.search)
        elif options.section:
            chosen = reference.find(options.section)
        else:
            chosen = list(reference.sections())
        print("\n".join(reference.lines(chosen)))
        return 0

    parser.set_defaults(run=run)


def _eval(parser: argparse.ArgumentParser) -> None:
    _fill(parser, importlib.import_module("vlp.eval.run"))


def _search(parser: argparse.ArgumentParser) -> None:
    _fill(parser, importlib.import_module("vlp.eval.search.ask"))


def _embed(parser: argparse.ArgumentParser) -> None:
    _fill(parser, importlib.import_module("vlp.eval.search.write"))


def _export(parser: argparse.ArgumentParser) -> None:
    _fill(parser, importlib.import_module("vlp.export.command"))


def _push(parser: argparse.ArgumentParser) -> None:
    parser.epilog = PUSH_EXAMPLE
    parser.add_argument("folder", metavar="DIR", help="what `vlp export` wrote")
    parser.add_argument("repository", metavar="USER/NAME", help="created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create it private")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace other content that is already there"
    )
    parser.add_argument(
        "--endpoint", metavar="URL", help="another hub than huggingface_hub's default"
    )

    def run(options: argparse.Namespace) -> int:
        from vlp.export.push import push

        address = push(
            options.folder,
            options.repository,
            private=options.private,
            overwrite=options.overwrite,
            endpoint=options.endpoint,
        )
        print(address)
        return 0

    parser.set_defaults(run=run)


def _report(parser: argparse.ArgumentParser) -> None:
    _fill(parser, importlib.import_module("vlp.eval.report.page"))


def _data(parser: argparse.ArgumentParser) -> None:
    """One subcommand for every public module of vlp.data_tools."""
    package = importlib.import_module("vlp.data_tools")
    tools = parser.add_subparsers(title="tools", metavar="TOOL", required=True)

    # The folder is the list: a new tool is one file.
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    for name in sorted(name for name in modules if not name.startswith("_")):
        tool = importlib.import_module(f"vlp.data_tools.{name}")
        command = tools.add_parser(
            name,
            help=tool.HELP,
            description=tool.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _fill(command, tool)
        command.add_argument(
            "--storage",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="option of fsspec for addresses, such as endpoint_url=…; of one kind alone "
            "s3:KEY=VALUE; secrets belong into the environment or the files of the store's tools; "
            "may be repeated",
        )
        command.set_defaults(run=_ended_by_signals(_giving_back(_with_storage(tool.run))))


def _with_storage(run: Callable[[argparse.Namespace], int]) -> Callable[..., int]:
    """A tool whose addresses are opened with the options --storage."""

    def with_storage(options: argparse.Namespace) -> int:
        if options.storage:
            from vlp.data import stores

            stores.use(stores.options_of(options.storage))

        # A folder is tried by the note of who writes there.
        for name in ("to", "json"):
            place = getattr(options, name, None)
            if isinstance(place, Path) and "://" in str(place):
                from vlp.data.stored import StoredPath, check_writable

                assert isinstance(place, StoredPath)
                check_writable(place)
        return run(options)

    return with_storage


def _giving_back(run: Callable[[argparse.Namespace], int]) -> Callable[..., int]:
    """A tool that leaves no process waiting for work."""

    def giving_back(options: argparse.Namespace) -> int:
        try:
            return run(options)
        finally:
            lifetime.release_all()

    return giving_back


def _ended_by_signals(run: Callable[[argparse.Namespace], int]) -> Callable[..., int]:
    """A command that a signal ends at once, with a line on what it had finished: raises Stopped."""

    def until_ended(options: argparse.Namespace) -> int:
        try:
            with lifetime.ending():
                return run(options)
        except lifetime.Ended as ended:
            raise Stopped(ended.signum, f"{ended}; {ended.outcome}") from None

    return until_ended


def _cache(parser: argparse.ArgumentParser) -> None:
    _fill(parser, importlib.import_module("vlp.eval.cache"))


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.epilog = DEMO_EXAMPLE
    parser.add_argument(
        "--out", default="runs/demo", help="folder for data, run and export (default: runs/demo)"
    )

    def run(options: argparse.Namespace) -> int:
        from vlp.demo import demo

        return demo(Path(options.out))

    parser.set_defaults(run=run)


def _fill(parser: argparse.ArgumentParser, room: ModuleType) -> None:
    """Let a module that brings `arguments`, `run` and `EXAMPLE` describe its own command."""
    parser.epilog = room.EXAMPLE
    room.arguments(parser)
    parser.set_defaults(run=room.run, parser=parser)


if __name__ == "__main__":
    sys.exit(main())
