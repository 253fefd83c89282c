"""What a language model of transformers writes about captions: batches, any device, a cache."""
