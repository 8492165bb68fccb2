"""Layers 2 and 3. From files to batches: registry, formats, dataset, checks, vocabulary."""
