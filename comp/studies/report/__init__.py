"""The page of a run, HTML and Markdown."""
