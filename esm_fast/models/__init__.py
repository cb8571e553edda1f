"""Model families, one file each, and what they share: `encoder`, `layers`; `family` says what a family is."""
