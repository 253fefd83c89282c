"""open_clip's module of tokenizers, without the rest of open_clip: a loader process needs no
models.

Importing the package would take each server of loader processes two seconds and 75 MB that nothing
shares.
"""

import importlib.util
import sys

if "open_clip.tokenizer" in sys.modules:
    tokenizers = sys.modules["open_clip.tokenizer"]
else:
    _package = importlib.util.find_spec("open_clip")
    assert _package is not None and _package.submodule_search_locations is not None
    _file = f"{_package.submodule_search_locations[0]}/tokenizer.py"
    _spec = importlib.util.spec_from_file_location(__name__ + ".tokenizers", _file)
    assert _spec is not None and _spec.loader is not None
    tokenizers = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(tokenizers)
