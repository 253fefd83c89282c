"""Small English for rules on captions: words, numbers, shuffles, traits. Pure functions."""
