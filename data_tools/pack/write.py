"""The shards of a pack, and what clip_benchmark's layout has beside them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlp.data_tools.pack.progress import progress

if TYPE_CHECKING:
    from vlp.data.archives import Archive
    from vlp.data.listing import Named


def write_shards(
    named: list[Named], archive: Archive, classes: list[str], args: argparse.Namespace, folder: Path
) -> int:
    from vlp.data.archives import image_type
    from vlp.data.format import ShardWriter
    from vlp.data.listing import families

    is_benchmark = args.layout == "clip_benchmark"
    is_retrieval = is_benchmark and not classes
    inner = folder / args.split if is_benchmark else folder
    shard_name = "{}" if is_benchmark else "{:05d}"
    class_number = {name: i for i, name in enumerate(classes)}

    with ShardWriter(inner, args.samples_per_shard, shard_name=shard_name) as writer:
        for family in progress(families(named), "packed"):
            writer.make_room(len(family))
            for item, name in family:
                txt = _caption_lines(item.captions) if is_retrieval else None
                cls = class_number.get(item.class_name, item.meta.get("cls"))
                if type(cls) is not int or cls < 0:
                    cls = None  # it stays in the JSON
                try:
                    image = archive.read(name)
                    writer.add(
                        None, image, image_type(name), item.captions, item.meta, cls, txt=txt
                    )
                except ValueError as error:
                    raise ValueError(f"{item.image}: {error}") from None

    texts = {"classnames.txt": classes}
    if is_benchmark:
        (inner / "nshards.txt").write_text(f"{len(writer.paths)}\n")
        # clip_benchmark formats its templates with c=…, everybody else's have empty braces.
        texts["zeroshot_classification_templates.txt"] = [
            template.replace("{}", "{c}") for template in args.template
        ]
        texts["dataset_type.txt"] = ["retrieval"] if is_retrieval else []
    for name, lines in texts.items():
        if lines:
            (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(writer.paths)


def _caption_lines(captions: tuple[str, ...]) -> str:
    """A caption a line, as clip_benchmark reads them; a training .txt holds one caption."""
    return "\n".join(" ".join(caption.split()) for caption in captions)
