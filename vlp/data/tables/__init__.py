"""Tables of captions and classes: one reader for `vlp data pack`, the sources, evaluation and the
tools.

read       any of the files below -> Table
files      a file's bytes as text: gzip, encodings
delimited  CSV, TSV and their relatives; sniff, quotes
forms      JSON: rows, COCO's, Karpathy's, LLaVA's, mappings
parquet    pyarrow's columns
columns    which columns hold image, captions, class
values     cells -> captions, numbers, lists
items      Table -> one item an image
names      lists of images that choose among them
"""

from vlp.data.tables.columns import TableOptions
from vlp.data.tables.items import Item, Listing, items, join
from vlp.data.tables.read import Table, read, read_json

__all__ = ["Item", "Listing", "Table", "TableOptions", "items", "join", "read", "read_json"]
