"""The pictures of a pack as they are written: their own bytes, or shrunk or encoded anew.

A picture that neither changes size nor format keeps its bytes. Others are decoded as every reader
here does (`vlp.data.picture`), turned upright, shrunk and encoded once. Transparency stays where
the format holds it and lies on white in JPEG; the colour profile goes along; other metadata do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from PIL import Image

    from vlp.data.picture import Header

FORMATS = ("keep", "jpeg", "webp", "avif")
_KINDS = {"jpeg": "JPEG", "webp": "WEBP", "avif": "AVIF"}
_EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "AVIF": "avif"}
# Pixels of a side that a format can hold; the decoder's limits are below that of PNG. AVIF is
# written with longer sides as well, but libavif does not read them.
_LONGEST = {"WEBP": 16383, "JPEG": 65500, "AVIF": 32768}
_DEFAULT_QUALITY = 90


def arguments(parser: argparse.ArgumentParser) -> None:
    """Options on how pictures are written."""
    add = parser.add_argument
    add(
        "--max-side",
        type=int,
        metavar="N",
        help="shrink images whose longer side has more than N pixels to N; none is enlarged",
    )
    add(
        "--format",
        choices=FORMATS,
        default="keep",
        help="of the images: as they came (default; what is shrunk stays JPEG, PNG, WebP or AVIF, "
        "other kinds become PNG), or encoded anew unless they are of this format already",
    )
    add(
        "--quality",
        type=int,
        metavar="Q",
        help="of JPEG, WebP and AVIF that are encoded, 1 to 100 (default: 90)",
    )
    add(
        "--lossless",
        action="store_true",
        help="with --format: images that came without loss (PNG, BMP, …) stay without, as lossless "
        "WebP, else as PNG",
    )


class Written(NamedTuple):
    """A picture as it goes into a shard, and what that cost."""

    data: bytes
    extension: str  # "": that of its name
    numbers: dict[str, int]  # for the shard's statistics; empty where all pictures stay


@dataclass(frozen=True)
class Pictures:
    """How the pictures of a pack are written."""

    max_side: int  # pixels; 0: as large as they are
    format: str  # one of FORMATS
    quality: int  # of lossy formats, 1 to 100
    lossless: bool  # what came without loss is written without

    @classmethod
    def of(cls, args: argparse.Namespace) -> Pictures:
        """What the options ask for; raises ValueError for what is wrong or cannot be written."""
        changes = bool(args.max_side is not None or args.format != "keep")
        if args.max_side is not None and args.max_side < 1:
            raise ValueError(f"--max-side {args.max_side} must be at least 1 pixel")
        if args.quality is not None and not changes:
            raise ValueError(
                "--quality is of pictures that are encoded; add --max-side or --format"
            )
        if args.lossless and args.format == "keep":
            raise ValueError(
                "--lossless is for --format jpeg, webp or avif; keep leaves lossless pictures "
                "lossless"
            )

        quality = _DEFAULT_QUALITY if args.quality is None else args.quality
        if not 1 <= quality <= 100:
            raise ValueError(f"--quality {quality} must be from 1 to 100")
        pictures = cls(args.max_side or 0, args.format, quality, args.lossless)
        pictures._check_encoder()
        return pictures

    @property
    def change(self) -> bool:
        """Whether any picture may be written otherwise than it came."""
        return bool(self.max_side) or self.format != "keep"

    def refuse(self, data: bytes) -> None:
        """Raise ValueError for a picture that its new format cannot hold."""
        from vlp.data.picture import header

        if not self.change:
            return
        self._refuse(header(data))

    def _refuse(self, about: Header) -> None:
        kind, _ = self._target(about)
        if self._stays(about, kind):
            return
        width, height = self._size(about)
        longest = _LONGEST.get(kind, max(width, height))
        if max(width, height) > longest:
            raise ValueError(
                f"{width} × {height} pixels are more than {kind} holds ({longest} a side); "
                "shrink it with --max-side, or write another --format"
            )

    def written(self, data: bytes) -> Written:
        """The picture as it goes into a shard; raises BadImage for one that does not open, and
        ValueError for one that its new format cannot hold.
        """
        from vlp.data.picture import header, layered

        if not self.change:
            return Written(data, "", {})
        about = header(data)
        self._refuse(about)
        kind, lossless = self._target(about)
        n_pixels = about.width * about.height
        numbers = {"pixels_before": n_pixels, "bytes_before": len(data)}
        if self._stays(about, kind):
            return Written(data, "", numbers | {"pixels": n_pixels, "bytes": len(data)})

        width, height = self._size(about)
        is_smaller = (width, height) != (about.width, about.height)
        # A JPEG may be decoded at twice the size that is needed: the filter then sees enough.
        side = 2 * max(width, height) if is_smaller else 0
        picture = layered(data, side)
        if is_smaller:
            from PIL import Image

            # Pillow weighs colours by their opacity, so that hidden ones do not shine through.
            picture = _resized(picture, (width, height), Image.Resampling.LANCZOS)

        encoded = _encoded(picture, kind, self.quality, lossless)
        numbers |= {
            "pixels": width * height,
            "bytes": len(encoded),
            "shrunk": int(is_smaller),
            "encoded": 1,
            "on_white": int(kind == "JPEG" and picture.mode == "RGBA"),
        }
        return Written(encoded, _EXTENSIONS[kind], numbers)

    def _target(self, about: Header) -> tuple[str, bool]:
        """The format of a picture in the output, and whether it is written there without loss."""
        if self.format != "keep":
            kind = _KINDS[self.format]
            lossless = self.lossless and about.lossless
        else:
            kind = about.kind if about.kind in _EXTENSIONS else "PNG"
            lossless = about.lossless

        # These two have no lossless form that every reader knows.
        if lossless and kind in ("JPEG", "AVIF"):
            kind = "PNG"
        return kind, lossless

    def _stays(self, about: Header, kind: str) -> bool:
        """Whether a picture keeps its bytes: a second encoding would only cost quality."""
        fits = not self.max_side or max(about.width, about.height) <= self.max_side
        return fits and (self.format == "keep" or about.kind == kind)

    def _size(self, about: Header) -> tuple[int, int]:
        """(width, height) with the longer side at most `max_side`."""
        longer = max(about.width, about.height)
        if not self.max_side or longer <= self.max_side:
            return about.width, about.height
        width = max(1, round(about.width * self.max_side / longer))
        height = max(1, round(about.height * self.max_side / longer))
        return width, height

    def _check_encoder(self) -> None:
        """Raise ValueError where Pillow was built without the encoder that is asked for."""
        if self.format == "keep":
            return
        from PIL import Image

        # Tried out: a library may have come with its decoder only.
        try:
            _encoded(Image.new("RGB", (16, 16)), _KINDS[self.format], 50, False)
        except Exception as error:
            raise ValueError(
                f"--format {self.format} cannot be written: this Pillow has no encoder for it "
                f"({str(error)[:80]}); install a Pillow that has (pip install -U pillow), "
                "or choose another --format"
            ) from None


def loss_of(totals: dict[str, int], n_images: int) -> list[str]:
    """What shrinking and encoding changed, in lines; `totals` are the sums of `Written.numbers`."""
    if not totals:
        return []
    shares = [
        f"{name} {totals[f'{name}_before']:,} → {totals[name]:,} "
        f"({totals[name] / max(totals[f'{name}_before'], 1):.1%})"
        for name in ("pixels", "bytes")
    ]
    n_shrunk, n_encoded = totals.get("shrunk", 0), totals.get("encoded", 0)
    lines = [
        f"shrunk {n_shrunk:,} of {n_images:,} images, encoded {n_encoded:,} anew; "
        f"{', '.join(shares)}"
    ]
    if totals.get("retold"):
        lines.append(
            f"note: the JSON of {totals['retold']:,} images told their size, format, bytes or "
            "digest; it tells those of the new ones, and the earlier under original_…"
        )
    if totals.get("on_white"):
        lines.append(f"note: {totals['on_white']:,} images with transparency lie on white now")
    return lines


def sum_of(stats: Iterable[dict]) -> dict[str, int]:
    """The sums over the statistics of shards."""
    sums: dict[str, int] = {}
    for one in stats:
        for name, value in one.get("totals", {}).items():
            sums[name] = sums.get(name, 0) + value
    return sums


def _resized(
    picture: Image.Image, size: tuple[int, int], resampling: Image.Resampling
) -> Image.Image:
    profile = picture.info.get("icc_profile")
    smaller = picture.resize(size, resampling)
    if profile:
        smaller.info["icc_profile"] = profile
    return smaller


def _encoded(picture: Image.Image, kind: str, quality: int, lossless: bool) -> bytes:
    """The bytes of a picture in L, RGB or RGBA."""
    from vlp.data.picture import to_rgb

    profile = _fitting_profile(picture, kind)
    options: dict[str, object] = {"icc_profile": profile} if profile else {}
    if kind == "JPEG":
        picture = picture if picture.mode == "L" else to_rgb(picture)
        options["quality"] = quality
    elif kind == "WEBP":
        options |= {"quality": quality, "lossless": lossless, "exact": lossless}
    elif kind == "AVIF":
        # Pictures are encoded side by side; threads of one picture would only wait.
        options |= {"quality": quality, "max_threads": 1}

    # The info would be written too: what a GIF or PNG says of transparency is in the pixels now.
    picture = picture.copy()
    picture.info = {}
    file = BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _fitting_profile(picture: Image.Image, kind: str) -> bytes:
    """The picture's colour profile, where it is of the colours that are written: a CMYK one, say,
    is not of the RGB that was made of it.
    """
    profile = picture.info.get("icc_profile") or b""
    is_gray = picture.mode == "L" and kind in ("JPEG", "PNG")
    return profile if profile[16:20] == (b"GRAY" if is_gray else b"RGB ") else b""
