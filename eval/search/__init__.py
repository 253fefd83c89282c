"""Pictures embedded once, and asked: `vlp search` and `vlp embed`.

listing.py     which pictures a folder, a tar or shards hold
library.py     their embeddings on disk, which a later call goes on with
nearest.py     the nearest rows: exact in blocks, or by FAISS
coded.py       the rows in a byte or a bit a number
ask.py         `vlp search`; page.py: its answers as one HTML file
write.py       `vlp embed`: rows as .npy or .parquet
"""
