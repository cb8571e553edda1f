"""Attacks by chance, each a file with ATTACKS: {what is tried: (how often, run)}.

run(count, rng, folder) returns a Counter of outcomes; those that BAD names must not occur. `make attack` runs all and
prints the figures of docs/reliability.md.
"""
