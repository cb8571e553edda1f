"""What is raised of data sets."""


class DatasetError(ValueError):
    """A data set that is damaged, incomplete, or another one than was asked for; the message says what to do."""
