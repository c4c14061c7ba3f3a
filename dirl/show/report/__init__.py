"""A run's directory -> one self-contained page: curves, configuration, environment, completions that can be played.

The page holds its own style, script and data, and forbids itself everything else, so that it opens from disk, offline,
and can be sent by mail. Everything a run brought in is data to it: texts become text nodes, never markup.
"""
