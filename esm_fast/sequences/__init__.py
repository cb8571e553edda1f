"""FASTA bytes, or sequences in memory, to Records and Tokens; nothing is lost without being counted."""
