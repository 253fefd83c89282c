"""The configuration: one typed tree, read strictly from YAML with dotted overrides.

`load("configs/demo.yaml", ["train.batch=512"])` reports every problem at once, each with file and
line. Plug-ins (sources, towers, terms, tasks) validate their own options by name through
`vlp.plugin`.
"""

from vlp.config.data import Augment, Captions, Data, StrongAugment, TextAugment, Views
from vlp.config.durations import Duration, Plan, WholePlan
from vlp.config.modality import Frames, Members, Modality, Sound
from vlp.config.model import (
    Captioner,
    ConcentrationHead,
    Decoder,
    Heads,
    Model,
    PredictorHead,
    RegionHead,
    Scale,
    TeacherHead,
    TranslatorHead,
    ViewHead,
)
from vlp.config.optimizer import Group, LayerDecay, Optimizer
from vlp.config.reading import dump, find, load, parse, read_yaml, recorded, shipped, shown
from vlp.config.running import Best, HeldOut, Stop, Validation
from vlp.config.stages import Stage
from vlp.config.teacher import Teacher
from vlp.config.training import Checkpoint, Log, Pairwise, Train
from vlp.config.tree import Config
from vlp.schema import ConfigError

__all__ = [
    "Augment",
    "Best",
    "Captioner",
    "Captions",
    "Checkpoint",
    "ConcentrationHead",
    "Config",
    "ConfigError",
    "Data",
    "Decoder",
    "Duration",
    "Frames",
    "Group",
    "Heads",
    "HeldOut",
    "LayerDecay",
    "Log",
    "Members",
    "Modality",
    "Model",
    "Optimizer",
    "Pairwise",
    "Plan",
    "PredictorHead",
    "RegionHead",
    "Scale",
    "Sound",
    "Stage",
    "Stop",
    "StrongAugment",
    "Teacher",
    "TeacherHead",
    "TextAugment",
    "Train",
    "TranslatorHead",
    "Validation",
    "ViewHead",
    "Views",
    "WholePlan",
    "dump",
    "find",
    "load",
    "parse",
    "read_yaml",
    "recorded",
    "shipped",
    "shown",
]
