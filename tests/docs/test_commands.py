"""Commands, configurations and links of the documentation are true."""

import re
import shlex
from dataclasses import fields
from itertools import dropwhile

import yaml

from tests.docs.blocks import PAGES, PLAIN, ROOT, blocks, merged
from vlp import cli, config, plugin
from vlp.schema import ConfigError

SHELL = ("cd", "rm", "for", "source", "export", "make", "python", "pytest", "git", "ruff",
         "kubectl", "pip")  # fmt: skip


def commands():
    """(page, words) of every command line in a fenced block; lines that end with \\ go on."""
    found = []
    for block in blocks("bash", PLAIN):
        for line in block.text.replace("\\\n", " ").splitlines():
            found += [(block.page, words) for words in [shlex.split(line, comments=True)] if words]
    return found


def check_vlp(words):
    """Raise for what the real parser, task or configuration refuses."""
    parser = cli.build_parser(words)
    options, unknown = parser.parse_known_args(words)
    assert not unknown, unknown

    # key=value is free text for the parser; configuration and tasks know the keys.
    if words[0] == "train":
        config.load(config.find(options.config), options.overrides)
    if words[0] == "eval" and options.task:
        from vlp.eval.run import _tasks

        plugin.keyed("vlp.eval.tasks", _tasks(options))


def check_ray(words):
    """Raise for what the real command `ray` refuses."""
    from click import ClickException
    from ray.scripts.scripts import cli as ray

    try:
        ray.commands[words[0]].make_context(words[0], words[1:])
    except ClickException as error:
        raise ValueError(error.message) from None


def check_command(words):
    # Settings of the environment stand before the command.
    words = list(dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\w+", word), words))
    if words[0] == "ray":
        return check_ray(words[1:])

    # Also behind srun and its like.
    if "vlp" in words:
        return check_vlp(words[words.index("vlp") + 1 :])
    if words[0] in ("accelerate", "bash", "sbatch"):
        files = [word for word in words if word.startswith("launch/")]

        # What follows the script is what follows `vlp train`.
        assert files and all((ROOT / file).is_file() for file in files), files
        name, *overrides = words[words.index(files[-1]) + 1 :]
        return config.load(config.find(name), overrides)

    # Of other programs only what is ours is looked at.
    assert words[0] in SHELL, words
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
    for word in words[1:]:
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists(), word


def test_every_command_is_one_that_the_programs_take(capsys):
    wrong = []
    lines = commands()

    # All that is wrong at once: a renamed option stands on several pages.
    for page, words in lines:
        try:
            check_command(words)
        except (SystemExit, AssertionError, ValueError) as error:
            said = capsys.readouterr().err.strip().splitlines()[-1:] or [str(error)]
            wrong.append(f"{page.name}: {' '.join(words)}\n    {said[0]}")

    assert not wrong, "\n".join(wrong)
    assert len(lines) > 60


def test_every_command_named_in_a_sentence_exists():
    tools = {path.stem for path in (ROOT / "data_tools").iterdir() if path.stem[0] != "_"}
    (choice,) = (
        action for action in cli.build_parser([])._actions if action.dest == "==SUPPRESS=="
    )
    subcommands = set(choice.choices)
    n = 0
    for page in PLAIN:
        for command, tool in re.findall(r"`vlp (\w+) ?([a-z]*)", page.read_text(encoding="utf-8")):
            n += 1
            known = command in subcommands - {"data"}
            is_tool = command == "data" and (not tool or tool in tools)
            assert known or is_tool, f"{page.name}: vlp {command} {tool}"
    assert n > 20


def test_every_configuration_is_read():
    demo = yaml.safe_load(config.find("demo").read_text(encoding="utf-8"))
    wrong, n = [], 0
    for block in blocks("yaml", PLAIN):
        n += 1
        try:
            config.parse(merged(demo, yaml.safe_load(block.text)))
        except ConfigError as error:
            wrong.append(f"{block.name}\n    {error}")

    assert not wrong, "\n".join(wrong)
    assert n >= 11


def test_every_override_named_in_a_sentence_is_a_key():
    sections = {field.name for field in fields(config.Config)}
    n = 0
    for page in PLAIN:
        # key=value of other commands (missing=skip) names no section.
        text = page.read_text(encoding="utf-8")
        for override, section in re.findall(r"`((\w+)(?:\.\w+)*=[^`…]+)`", text):
            if section in sections:
                n += 1
                config.load(config.find("demo"), [override])
    assert n >= 55


def test_links_between_files_lead_somewhere():
    n = 0
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            n += 1

            # Generated pages are not there before the first build.
            name = target.rpartition("generated/objectives/")[2].removesuffix(".md")
            is_generated = name in plugin.names("vlp.losses") or "generated/" in target
            assert is_generated or (page.parent / target).exists(), f"{page.name}: {target}"
    assert n > 60


def test_files_named_in_a_sentence_exist():
    folders = "vlp|eval|data_tools|tests|configs|launch|docs|examples"
    n = 0
    for page in PLAIN:
        for name in re.findall(rf"`((?:{folders})/[\w/.-]+)`", page.read_text(encoding="utf-8")):
            n += 1
            assert (ROOT / name).exists(), f"{page.name}: {name}"
    assert n >= 40
