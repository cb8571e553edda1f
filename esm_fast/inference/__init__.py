"""Running models: load one, stream proteins through it, and what is made of each."""
