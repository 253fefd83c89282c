"""Published models: what names one, where it lies, and its weights in our towers."""
