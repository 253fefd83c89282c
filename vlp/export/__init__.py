"""Trained models for others: folders that open_clip and transformers load, and the Hub."""
