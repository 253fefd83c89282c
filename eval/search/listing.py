"""Which pictures a person means: files, folders of pictures, tars, patterns of shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vlp.data.archives import image_type
from vlp.data.paths import expand, is_packed, shards_in
from vlp.eval.pictures import DataError, Picture, open_archive, picture_of


def pictures_in(places: str) -> list[Picture]:
    """The pictures of one or several places joined by `::`, in order, each once.

    A place is a picture, a folder (its pictures at any depth, and its tars), a tar, or a pattern
    with braces or `*` of tars. Raises DataError for a place that holds none.
    """
    pictures: dict[tuple[str, int], Picture] = {}
    for place in places.split("::"):
        of_place = list(_of(place))
        if not of_place:
            raise DataError(f"{place} holds no picture; expected a folder, a tar or shards of them")
        for picture in of_place:
            pictures.setdefault((picture.path, picture.offset), picture)
    return list(pictures.values())


def _of(place: str) -> Iterator[Picture]:
    path = Path(place).expanduser()
    if path.is_file() and image_type(path.name):
        yield Picture(str(path), str(path))
        return

    if path.is_dir():
        yield from _of_archive(path)
        tars = [tar for tar in shards_in(path) if not is_packed(tar.name)]
    else:
        tars = _tars(place)
    for tar in tars:
        yield from _of_archive(tar)


def _of_archive(path: Path) -> Iterator[Picture]:
    archive = open_archive(path)
    for name in archive.names:
        picture = picture_of(archive, name)
        # Two tars may hold members of one name.
        yield picture if path.is_dir() else replace(picture, name=f"{path}/{name}")


def _tars(place: str) -> list[Path]:
    try:
        return expand(place)
    except ValueError as error:
        raise DataError(
            f"no pictures at {place}: expected a picture, a folder, a tar, or a pattern of tars"
            f" ({error})"
        ) from None
