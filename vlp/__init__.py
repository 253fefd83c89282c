"""vlp: pretraining of image-text dual encoders over an exact, memory-bounded, group-aware pairwise engine.

Importing this package imports nothing heavy. Start reading at README.md, then configs/demo.yaml.
"""

__version__ = "0.1.0"
