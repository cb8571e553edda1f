"""Pretraining as ESM-1b was: token store, masking, packed batches, the loop, checkpoints. See docs/pretraining.md."""
