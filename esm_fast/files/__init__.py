"""Files that appear whole or not at all, and the formats of other tools, one file a format."""
