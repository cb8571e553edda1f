"""Embeddings of a proteome of any size: a folder of files that are whole or not there. See docs/embedding.md.

plan -> work (compute, shards) -> verify; commit is how every file gets its name.
"""
