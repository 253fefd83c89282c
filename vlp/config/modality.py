"""A further modality of the section `model`: what of a sample is read, and its tower."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sound:
    """A sound that lies beside picture and text in the shards, KEY.wav or KEY.NAME.wav, as log-mel
    rows (vlp.data.sounds).
    """

    # what the tower hears of a sample: of a longer sound a piece, drawn anew at every visit in
    # training and from the middle in validation and evaluation. Rows of a shorter one are filled
    # up with zeros, which a transformer does not see
    seconds: float = 10.0
    bands: int = 64  # F, mel bands up to half the rate
    rate: int = 16_000  # Hz; sounds of another rate are resampled
    window_ms: float = 25.0  # of sound that one row tells of
    hop_ms: float = 10.0  # between two rows
    member: str = ""  # NAME of KEY.NAME.wav; empty: the first sound of a sample

    def __post_init__(self) -> None:
        if not 1 <= self.hop_ms <= self.window_ms or self.rate < 1000 or self.bands < 1:
            raise ValueError(
                f"hop_ms is {self.hop_ms:g}, window_ms {self.window_ms:g}, rate {self.rate} and "
                f"bands {self.bands}; expected 1 <= hop_ms <= window_ms, at least 1,000 Hz and a "
                "band"
            )
        if self.n_rows < 1:
            raise ValueError(
                f"seconds is {self.seconds:g}; expected at least one row of {self.hop_ms:g} ms"
            )
        most_bands = self.rate * self.window_ms / 2000
        if self.bands > most_bands:
            raise ValueError(
                f"bands is {self.bands}; a window of {self.window_ms:g} ms at {self.rate} Hz tells "
                f"{most_bands:.0f} apart at most"
            )

    @property
    def n_rows(self) -> int:
        """T, of the longest sound."""
        return round(self.seconds * 1000 / self.hop_ms)


@dataclass(frozen=True)
class Frames:
    """A video that lies beside picture and text in the shards as frames KEY.000.jpg, KEY.001.jpg,
    …: the image tower embeds each frame, and the modality's tower reads these embeddings in time.
    """

    # T, frames that the tower sees: one of each of so many equal parts of a longer video, drawn
    # anew at every visit in training and the middle one in validation and evaluation
    n: int = 8

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n is {self.n}; expected at least 1 frame")


Members = Sound | Frames  # what makes a modality of members of the samples


@dataclass(frozen=True)
class Modality:
    """A tower of a further modality over rows in time (vlp.models.modalities): frames of a sound or
    a video, or one embedding. The rows lie beside the shards, or are made of members of the samples
    when these are read.
    """

    # F, numbers of a row: width of stored embeddings; of `sound` and `frames` it is left out
    features: int = 0
    length: int = 1  # T, rows in time of a sample, at most; of `sound` and `frames` left out
    # log-mel rows of a sound among the sample's members; None: rows that a source's `modalities`
    # names
    sound: Sound | None = None
    # embeddings of a video's frames among the sample's members by the image tower; None: none
    frames: Frames | None = None
    layers: int = 0  # of a transformer over the rows; 0: a linear map of their mean
    patch: int = 1  # rows that become one token of the transformer; must divide length
    width: int = 256  # of the transformer
    heads: int = 4  # of the transformer; must divide width

    def __post_init__(self) -> None:
        if self.sound is not None and self.frames is not None:
            raise ValueError("sound and frames are both given; a modality is one of them")
        if self.sound is not None:
            self._take_shape(self.sound.n_rows, self.sound.bands)
        if self.frames is not None:
            # As many numbers as the shared space has, which the model knows.
            self._take_shape(self.frames.n, 0)
        features = self.features if self.frames is None else 1
        if min(features, self.length, self.patch, self.width, self.heads) < 1:
            raise ValueError(
                "features, length, patch, width and heads: found "
                f"{self.features}, {self.length}, {self.patch}, {self.width} and {self.heads}, "
                "expected numbers >= 1"
            )
        if self.layers < 0 or self.length % self.patch or self.width % self.heads:
            raise ValueError(
                f"layers is {self.layers}, length {self.length} in patches of {self.patch}, width "
                f"{self.width} of {self.heads} heads; expected layers >= 0, and numbers that divide"
            )

    def _take_shape(self, n_rows: int, n_features: int) -> None:
        """Fill in T and F as members give them; ValueError where others are written."""
        if self.length not in (1, n_rows) or self.features not in (0, n_features):
            raise ValueError(
                f"features is {self.features} and length {self.length}, but the members give "
                f"{n_rows} rows of {n_features or 'embeddings'}; leave both out"
            )
        object.__setattr__(self, "length", n_rows)
        object.__setattr__(self, "features", n_features)

    @property
    def members(self) -> Members | None:
        """What makes the rows of members of the samples; None: they lie beside the shards."""
        return self.sound or self.frames

    @property
    def n_tokens(self) -> int:
        """Of the transformer, at most."""
        return self.length // self.patch
