"""A data set made by many processes at once: who starts them. What each does is esm_fast/dataset's."""
