"""Writers, one file a format. None of them names a file or a key by an id as it came: see `names`."""
