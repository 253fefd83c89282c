"""ImageNet and its relatives: which folder means which class. Names come from open_clip, synset
numbers from timm.

A tree's folders are synsets (`n01440764`: ImageNet, -A, -R, Sketch), class numbers (`0` … `999`:
V2) or ObjectNet's names. ImageNet-A and -R hold 200 classes and are scored among those 200, as
their authors do.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.eval.pictures import DataError
from vlp.eval.prompts import translated

if TYPE_CHECKING:
    from vlp.eval.datasets.source import Source

SYNSET = re.compile(r"n\d{8}")
N_CLASSES = 1000
SUBSETS = ("imagenet_a", "imagenet_r")  # relatives that are scored among classes of their own


def is_list(choice: object) -> bool:
    """Whether `classes=` names one of ImageNet's lists."""
    return choice == "imagenet" or is_translated(choice)


def is_translated(choice: object) -> bool:
    """Whether `classes=` names a list in another language than English."""
    return isinstance(choice, str) and choice in translated.IMAGENET


def names(which: str = "imagenet") -> list[str]:
    """The 1,000 class names that the field prompts with: open_clip's repair of the originals, or
    their translations (imagenet_zh, …). DataError where those are not installed.
    """
    if which != "imagenet":
        try:
            return translated.class_names(which)
        except ValueError as error:
            raise DataError(str(error)) from None
    from open_clip import IMAGENET_CLASSNAMES

    return list(IMAGENET_CLASSNAMES)


def synsets(which: str = "imagenet") -> list[str]:
    """Synset numbers in class order, from the lists that timm ships; `which`: imagenet, imagenet_a
    or imagenet_r.
    """
    from importlib.resources import files

    return (files("timm.data") / "_info" / f"{which}_synsets.txt").read_text().split()


def looks_like(source: Source) -> bool:
    """Whether the labels are synsets, or folders that count all classes as V2's do."""
    return _has_synsets(source) or _counts_all(source)


def _has_synsets(source: Source) -> bool:
    return all(
        isinstance(record.label, str) and SYNSET.fullmatch(record.label)
        for record in source.records
    )


def _counts_all(source: Source) -> bool:
    """Whether the labels are exactly the names "0" to "999": fewer may count anything."""
    return {record.label for record in source.records} == set(map(str, range(N_CLASSES)))


def classes_of(
    source: Source, partial: bool, which: str = "imagenet"
) -> tuple[list[str], dict[str, int]]:
    """(class names, folder -> class number) for a tree whose folders are synsets or numbers.

    The folders must be all 1,000 classes or the 200 of ImageNet-A or -R, since fewer classes make
    the task easier: anything else is refused unless `partial`. which: as for `names`.
    """
    folders = sorted({str(record.label) for record in source.records})
    all_names = names(which)
    listed = synsets() if _has_synsets(source) else map(str, range(len(all_names)))
    numbers = {folder: i for i, folder in enumerate(listed)}

    # A folder of another name would be scored as some class or other.
    unknown = [folder for folder in folders if folder not in numbers]
    if unknown:
        raise DataError(
            f"{source.name}: {len(unknown)} folders are no ImageNet classes: "
            f"{', '.join(unknown[:5])}"
        )

    complete = len(folders) == len(all_names)
    if not complete and not partial and not _is_subset_of_its_own(folders):
        raise DataError(
            f"{source.name} holds {len(folders)} of ImageNet's {len(all_names)} classes and is "
            "neither ImageNet-A nor -R; complete it, or pass partial=true for a score among those "
            "classes only"
        )

    # Scores are among the present classes, numbered anew in ImageNet's order.
    in_class_order = sorted(folders, key=numbers.__getitem__)
    class_names = [all_names[numbers[folder]] for folder in in_class_order]
    return class_names, {folder: i for i, folder in enumerate(in_class_order)}


def _is_subset_of_its_own(folders: list[str]) -> bool:
    """Whether the folders are exactly those of ImageNet-A or -R."""
    return any(set(folders) == set(synsets(subset)) for subset in SUBSETS)


def objectnet_images(root: Path) -> Path:
    """Where the class folders of an ObjectNet lie, as its zip unpacks or below the images alone."""
    if root.name == "images":
        return root
    places = (root / "objectnet-1.0" / "images", root / "images", root / "objectnet-1.0")
    return next((place for place in places if place.is_dir()), root)


def objectnet_folders(root: Path) -> dict[str, str] | None:
    """Folder -> class name of ObjectNet's 113 classes that overlap with ImageNet, or None if this
    is not ObjectNet.

    Source: ObjectNet's `mappings/folder_to_objectnet_label.json` and
    `objectnet_to_imagenet_1k.json`, as wise-ft and clip_benchmark use them: scored among these 113,
    names in lower case.
    """
    places = [root / "mappings", root / "objectnet-1.0" / "mappings", root]
    if root.name == "images":
        places.append(root.parent / "mappings")
    place = next((p for p in places if (p / "objectnet_to_imagenet_1k.json").exists()), None)
    if place is None:
        return None

    # The labels of all folders, of which only those count that ImageNet has too.
    labels = json.loads((place / "folder_to_objectnet_label.json").read_text(encoding="utf-8"))
    overlap = json.loads((place / "objectnet_to_imagenet_1k.json").read_text(encoding="utf-8"))
    return {folder: label.lower() for folder, label in labels.items() if label in overlap}
