"""A folder (or tar) of pictures without a table: pairs where texts lie beside the pictures, else
one folder a class.

    00000/000000001.jpg + .txt, .json (img2dataset's `files`) or .caption, at any depth     pairs
    images/1.jpg + texts/1.txt and other loose texts (`vlp.data.loose_texts`)                pairs
    cat/1.jpg, cat/more/2.jpg, dog/1.jpg                                                     classes

A tree in which any picture has a text beside it is never taken for classes. A folder of splits, or
one that only wraps the tree, is refused with the folder to name instead.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

from vlp.data import splits
from vlp.data.archives import Archive, extension_of, printable
from vlp.data.captions import Choice, form_of, lines_of, read_texts
from vlp.data.stored import StoredPath
from vlp.data.tables import Item, fetched
from vlp.data.texts_beside import stem_of, texts_beside, with_loose_texts

_TABLES = (".csv", ".tsv", ".token", ".jsonl", ".ndjson", ".parquet")
# What a .txt or .json is called that is a table rather than a note.
_TABLE_NAME = re.compile(r"caption|annotation|metadata|token|dataset|result|label|train|test|val")
# What a sample's JSON calls its class, by name and by number.
_LABELS = ("class", "cls")


@dataclass
class Tree:
    """The usable pictures of a tree."""

    items: list[Item]
    classes: list[str]  # sorted; empty unless all of them come by name
    paired: bool  # whether texts lie beside the pictures
    # What cannot be used, a line each.
    problems: list[str] = field(default_factory=list)
    # What was decided and may surprise.
    notes: list[str] = field(default_factory=list)


def read_tree(archive: Archive, lines: Literal["one", "each"] = "one") -> Tree:
    """The pictures of an archive with their captions or classes; raises ValueError saying what is
    there instead.

    `lines`: a text file of several lines is one caption, or each of its lines is one.
    """
    refuse_without_images(archive)

    beside = texts_beside(archive)
    texts, n_loose = with_loose_texts(archive, beside)

    # One folder "train" of pairs is a name like another; of classes it would be the only class.
    split_folders = splits_in(archive)
    if len(split_folders) > 1 or (split_folders and not texts):
        raise ValueError(
            f"{archive.path} holds splits, not classes: {', '.join(split_folders)}; "
            f"give one of them, such as {_how_to_name(archive, split_folders[0])}"
        )
    if texts:
        tree = _pairs(archive, texts, lines)
        tree.notes += [f"{n:,} {how}" for how, n in n_loose.items()]
        return tree
    # Their folders are numbered as they were fetched, which says nothing of the pictures.
    if fetched.files_in(archive.path):
        raise ValueError(
            f"{archive.path} holds what img2dataset fetched, without texts beside the images; "
            f"name its tables: --captions {archive.path} (configuration: captions: {archive.path})"
        )
    return _classes(archive)


def refuse_without_images(archive: Archive) -> None:
    """Raise ValueError for an archive without an image, saying what it holds and what can be done
    with that."""
    if not archive.names:
        others = f"{_found_instead(archive)}{_other_hint(archive)}"
        raise ValueError(f"{archive.path} holds no images{others}")


def splits_in(archive: Archive) -> list[str]:
    """The folders at the top that are splits of a data set, unless others of them are classes
    ("train" beside "bus")."""
    return splits.among_folders(name.split("/")[0] for name in archive.names if "/" in name)


def class_name(folder: str) -> str:
    """What a class is called whose pictures lie in `folder`: its underscores are spaces."""
    return " ".join(printable(folder).replace("_", " ").split())


def _how_to_name(archive: Archive, folder: str) -> str:
    """How a person names a folder of an archive: by its path, or by the option of each command."""
    is_tar = archive.path.is_file()
    # A folder's path holds `below` already; a tar's does not.
    below = f"{archive.below}/{folder}" if is_tar and archive.below else folder
    options = f"--split-folder {below} (configuration: split: {below}; vlp eval: split={below})"
    return options if is_tar else f"{archive.path}/{folder}, or {options}"


def _other_hint(archive: Archive) -> str:
    """What to do with files that are no pictures and may hold some."""
    counts = archive.left_out.counts
    if counts[".tar"]:
        return (
            ". Its .tar files may be shards already: train on them with {name: shards}, change "
            "them with vlp data filter or vlp data reshard, or name one of them"
        )
    if not counts[".parquet"]:
        return ""

    if isinstance(archive.path, StoredPath):
        return (
            ". Pictures in parquet files are packed of a folder of this machine: copy it here "
            "first (img2dataset's output_format: parquet), or train with {name: huggingface}"
        )
    if any(map(fetched.picture_column, fetched.files_in(archive.path))):
        return (
            ". Its parquet files hold the pictures that img2dataset fetched; make shards of them: "
            f"vlp data pack {archive.path} --to DIR"
        )
    return (
        ". Parquet files that hold pictures are read by the source {name: huggingface} and by "
        "vlp eval"
    )


def _tables_in(archive: Archive) -> list[str]:
    """The files of a tree that may be tables of its pictures, some of each kind."""
    # Tables of other kinds are no texts, so they are among what is left out.
    tables: list[str] = []
    for kind in _TABLES:
        tables += archive.left_out.names.get(kind, [])

    return tables + sorted(name for name in archive.texts if _may_be_table(name))


def _may_be_table(name: str) -> bool:
    """Whether a text that is of no picture may be a table of all: by its name, or as a JSON at the
    top.
    """
    is_json_at_top = "/" not in name and extension_of(name) == "json"
    return is_json_at_top or bool(_TABLE_NAME.search(_last(name).casefold()))


def _naming(archive: Archive) -> str:
    """How a table of captions is named, those that may be meant first."""
    tables = _tables_in(archive)
    table = "TABLE"
    if tables and archive.path.is_dir():
        table = f"{archive.path}/{tables[0]}"

    there = f"found {', '.join(tables[:3])}; " if tables else ""
    return (
        f"{there}name a table of captions: --captions {table} (configuration: captions: {table}; "
        f"vlp eval: --data {table} images={archive.path})"
    )


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


# --- pairs ----------------------------------------------------------------------------------------


def _pairs(
    archive: Archive, texts: dict[str, dict[str, str]], lines: Literal["one", "each"]
) -> Tree:
    """The pictures with what their texts say."""
    choice = Choice(lines=lines)
    items: list[Item] = []
    problems: list[str] = []
    json_keys: set[str] = set()
    stand_ins: Counter[str] = Counter()
    n_of_several_lines = 0
    for name in archive.names:
        if name not in texts:
            problems.append(f"{name!r} has no text beside it ({_expected(name)})")
            continue
        try:
            members = {kind: archive.texts[text].read_text() for kind, text in texts[name].items()}
        except OSError as error:
            problems.append(f"the text beside {name!r} cannot be used: {error}")
            continue

        content = read_texts(members)
        for kind in content.spare:
            archive.left_out.add(kind, name)
        json_keys |= content.meta.keys()
        captions = choice.captions(content.meta, content.text)
        if stand_in := choice.stand_in(form_of(content.meta, content.text)):
            stand_ins[stand_in] += 1
        if captions == (content.text,) and len(lines_of(content.text)) > 1:
            n_of_several_lines += 1

        # A class may stand for a caption: templates make one of it.
        if captions or any(label in content.meta for label in _LABELS):
            meta = {"image": printable(name), **content.meta}
            items.append(Item(name, 0, list(captions), meta))
            continue
        fault = "holds no caption"
        unread = [*content.notes, *content.spare]
        if unread:
            fault = f"cannot be used: {'; '.join(unread)}"
        problems.append(f"the text beside {name!r} {fault}")

    # What no picture takes is told: its name may be mistyped.
    used_texts: set[str] = set()
    for beside in texts.values():
        used_texts.update(beside.values())
    _leave_out_texts(archive, sorted(archive.texts.keys() - used_texts))

    if not items:
        keys = ", ".join(sorted(json_keys)[:12])
        there = f"; the JSON files have the keys {keys}" if keys else ""
        raise ValueError(
            f"{archive.path}: {len(texts)} of {len(archive.names)} images have a text beside them, "
            f"none a caption ({problems[0]}){there}{_found_instead(archive)}. "
            "Where folders are the classes, move those texts away"
        )

    notes = []
    if n_of_several_lines:
        notes.append(
            f"text files of several lines are one caption each beside {n_of_several_lines:,} "
            "images; lines: each (--lines each) makes each line a caption"
        )
    for field_name, n in stand_ins.items():
        notes.append(f"captions are taken from the JSON's {field_name!r} beside {n:,} images")
    return Tree(items, _class_names(items), True, problems, notes)


def _class_names(items: list[Item]) -> list[str]:
    """The classes of pictures with texts, sorted; empty unless each names its class."""
    names: set[Any] = {item.meta.get("class") for item in items}
    has_numbers = any("cls" in item.meta for item in items)
    if has_numbers or not all(isinstance(name, str) for name in names):
        return []
    return sorted(names)


def _leave_out_texts(archive: Archive, names: list[str]) -> None:
    for name in names:
        archive.left_out.add(f".{extension_of(name)} without an image", name)


def _found_instead(archive: Archive) -> str:
    """What lies there that is neither an image nor the text of one, as "; found …"."""
    parts = [str(archive.left_out)] if archive.left_out.counts else []
    if archive.texts and not archive.names:
        kinds = Counter(extension_of(name) for name in archive.texts)
        parts += [f"{n:,} .{kind}" for kind, n in kinds.most_common()]
    return f"; found {', '.join(parts)}" if parts else ""


def _expected(name: str) -> str:
    stem = os.path.splitext(_last(name))[0]
    return f"{stem}.txt, {stem}.json or {stem}.caption"


# --- classes --------------------------------------------------------------------------------------


def _classes(archive: Archive) -> Tree:
    """The pictures with the folders at the top as their classes."""
    _refuse_texts_elsewhere(archive)
    _leave_out_texts(archive, sorted(archive.texts))

    loose = [name for name in archive.names if "/" not in name]
    if len(loose) == len(archive.names):
        raise ValueError(
            f"{archive.path} is no tree with one folder a class: its {len(loose)} images lie "
            f"outside of any folder, and none has a text beside it ({_expected(loose[0])}"
            f"{_found_instead(archive)}); {_naming(archive)}"
        )

    tops = {name.split("/")[0] for name in archive.names if "/" in name}
    if not loose:
        _refuse_wrapper(archive)
    if len(tops) == 1 and _tables_in(archive):
        raise ValueError(
            f"{archive.path} holds its images in one folder, {printable(min(tops))!r}, which would "
            f"be one class without captions; {_naming(archive)}. If it is a class, move the tables "
            "away"
        )

    # What lies at the root is of no class.
    problems = [f"{name!r} lies outside of any class folder" for name in loose]
    for folder, extensions in sorted(archive.folders.items()):
        holds_shards = "tar" in extensions  # perhaps an earlier output
        if folder in tops or holds_shards:
            continue
        counts = [f"{n:,} .{extension}" for extension, n in extensions.most_common()]
        problems.append(
            f"the class folder {printable(folder)!r} holds no image "
            f"(found {', '.join(counts) or 'nothing'}); convert or remove it"
        )

    items = []
    for name in archive.names:
        folder, slash, _ = name.partition("/")
        if slash:
            meta = {"image": printable(name), "class": class_name(folder)}
            items.append(Item(name, 0, [], meta))
    classes = sorted({item.meta["class"] for item in items})
    return Tree(items, classes, False, problems, _notes(tops))


def _refuse_texts_elsewhere(archive: Archive) -> None:
    """Raise where texts lie in folders of their own, with the names of the images: they would be
    lost."""
    images = {_last(stem_of(name)): name for name in archive.names}
    # A few notes may be called as an image is by chance; most of the texts are not.
    paired = [text for text in sorted(archive.texts) if _last(stem_of(text)) in images]
    if 2 * len(paired) > len(archive.texts):
        image = images[_last(stem_of(paired[0]))]
        raise ValueError(
            f"{archive.path}: {len(paired)} texts are called as images are, but lie in other "
            f"folders (as {paired[0]} for {image}); put each beside its image, in the same folder. "
            "Where folders are the classes, move those texts away"
        )


def _refuse_wrapper(archive: Archive) -> None:
    """Raise where all classes are sub-folders of one folder, as an unpacked zip leaves them."""
    folders = {name.rpartition("/")[0] for name in archive.names}
    shared = os.path.commonpath(folders)

    # The folders next below the shared one: those may be the classes.
    depth = shared.count("/") + 2
    below = sorted({"/".join(folder.split("/")[:depth]) for folder in folders})
    if shared and len(below) > 1 and shared not in folders:
        some = ", ".join([*below[:3], *(["…"] if len(below) > 3 else [])])
        raise ValueError(
            f"{archive.path} holds one folder, {shared!r}, and below it {len(below)} with images "
            f"({some}); if those are the classes, give {_how_to_name(archive, shared)}"
        )


def _notes(folders: set[str]) -> list[str]:
    """What was decided about the class folders and may surprise."""
    notes = []
    if all(folder.isdecimal() for folder in folders):
        first, last = min(folders, key=int), max(folders, key=int)
        notes.append(
            f"the folders' names are numbers ({first} to {last}) and no image has a .txt or .json "
            "beside it: the numbers are taken as class names"
        )

    if len(folders) == 1:
        notes.append(f"there is one class folder only, {printable(next(iter(folders)))!r}")

    # Folders whose names differ in blanks, underscores or composition only.
    spellings = defaultdict(list)
    for folder in sorted(folders):
        spellings[class_name(folder)].append(printable(folder))
    for same_class in spellings.values():
        if len(same_class) > 1:
            notes.append(f"the folders {', '.join(map(repr, same_class))} are one class")

    by_case = defaultdict(list)
    for name in spellings:
        by_case[name.casefold()].append(name)
    for names in by_case.values():
        if len(names) > 1:
            notes.append(
                f"{', '.join(map(repr, names))} differ in case only: they stay classes apart"
            )
    return notes
